"""Published weights: their bytes, checksums and places, and how they are gathered."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed
import xxhash
from torch import Tensor, nn

from cluster import weights
from cluster.engine import Engine, EngineConfig
from cluster.weights import Field
from tests.cluster.gloo import run_group
from tests.cluster.nets import Tied, net


def test_the_checksum_is_xxh3_over_names_and_bytes() -> None:
    named = [("a", torch.tensor([1.0, -2.0])), ("b", torch.tensor([[3]], dtype=torch.int64))]
    whole = b"a" + np.float32([1, -2]).tobytes() + b"b" + np.int64(3).tobytes()
    assert weights.checksum(named) == xxhash.xxh3_128(whole).hexdigest()


def test_the_checksum_sees_one_bit_and_a_swap_of_names() -> None:
    trainer = net(0, torch.float32)
    whole = weights.checksum(trainer.state_dict().items())
    flipped = {name: tensor.clone() for name, tensor in trainer.state_dict().items()}
    flipped["1.weight"].view(-1).view(torch.int32)[3] ^= 1
    assert weights.checksum(flipped.items()) != whole
    renamed = [(name[::-1], tensor) for name, tensor in trainer.state_dict().items()]
    assert weights.checksum(renamed) != whole


def test_places_are_aligned_and_apart() -> None:
    fields = [Field(str(n), torch.bfloat16, (n,)) for n in (1, 32, 33, 0, 5)]
    places = [(place.start, place.stop) for place in weights.places(fields)]
    assert places == [(0, 2), (64, 128), (128, 194), (256, 256), (256, 266)]


def gathered(module: nn.Module) -> int:
    """Bytes of the weights that are here in full."""
    sizes = [getattr(p, "ds_numel", p.numel()) for p in module.parameters()]
    whole = [p.numel() == size for p, size in zip(module.parameters(), sizes, strict=True)]
    return 4 * sum(size for size, here in zip(sizes, whole, strict=True) if here)


def draw_buckets(stage: Any) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Linear(8, 8) for _ in range(6)), Tied(True), nn.Linear(8, 32))
    config = EngineConfig(zero_stage=stage)
    expected = {name: weight.detach().clone() for name, weight in net.named_parameters()}
    engine = Engine(net, config, lambda _: 0.1)
    size, found, before = 600, {}, []
    for bucket in engine.buckets(size):
        taken = sum(4 * weight.numel() for _, weight in bucket)
        assert taken <= size or len(bucket) == 1
        # The bucket before is here still, as drawn; no other one is.
        for name, weight in before:
            assert torch.equal(weight, expected[name])
        if stage == 3:
            assert gathered(net) <= taken + sum(4 * weight.numel() for _, weight in before)
        found |= {name: weight.clone() for name, weight in bucket}
        before = bucket
    assert list(found) == list(expected)
    assert all(torch.equal(weight, expected[name]) for name, weight in found.items())
    assert stage < 3 or gathered(net) == 0
    # An engine that was asked for some only goes on as if it had not been.
    for _ in engine.buckets(size):
        break
    assert stage < 3 or gathered(net) == 0
    assert {name for name, _ in engine.weights()} == {*expected, "6.last.weight"}
    engine.close()


@pytest.mark.parametrize("stage", [1, 3])
def test_no_rank_gathers_more_than_two_buckets(stage: int) -> None:
    run_group(2, draw_buckets, stage)


def test_a_tensor_of_the_host_is_packed_where_it_is() -> None:
    tensor: Tensor = torch.arange(6.0)
    bucket = weights.pack([("x", tensor)])
    tensor[0] = 7
    assert dict(bucket.tensors())["x"].tolist() == tensor.tolist()
