"""What a replica holds after loading is summed up from its own memory."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed
import xxhash
from torch import Tensor, nn

from cluster import weights
from cluster.engine import Engine, EngineConfig
from cluster.weights import Bucket, Field, Snapshot, Version
from tests.cluster.gloo import run_group


def net(seed: int, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 3), nn.Embedding(4, 2)).to(dtype)


def snapshot(module: nn.Module, number: int) -> Snapshot:
    """Its weights where they lie, in two buckets."""
    named = list(module.state_dict().items())
    version = Version(number, weights.checksum(named))
    return Snapshot(version, (weights.pack(named[:1]), weights.pack(named[1:])))


def same(module: nn.Module, other: nn.Module) -> bool:
    there = other.state_dict()
    return all(torch.equal(tensor, there[name]) for name, tensor in module.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_replica_ends_with_the_trainers_bytes(dtype: torch.dtype) -> None:
    trainer, replica = net(0, dtype), net(1, dtype)
    source = snapshot(trainer, number=7)
    assert weights.checksum(replica.state_dict().items()) != source.version.checksum
    assert weights.load(replica, source) == source.version
    assert same(trainer, replica)


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


def test_weights_of_any_size_are_loaded_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where they do not fill the pieces that are copied at once."""
    monkeypatch.setattr(weights, "CHUNK", 64)
    for count in (1, 15, 16, 17, 100):
        trainer, replica = nn.Linear(1, count, False), nn.Linear(1, count, False)
        assert weights.load(replica, found := snapshot(trainer, 0)) == found.version
        assert same(trainer, replica)


def test_a_byte_that_changes_on_the_way_is_noticed() -> None:
    trainer, replica = net(0, torch.float32), net(1, torch.float32)
    source = snapshot(trainer, number=1)
    damaged = source.buckets[1].parts[-1].copy()
    damaged[5] ^= 16
    last = Bucket(source.buckets[1].fields, (*source.buckets[1].parts[:-1], damaged))
    found = weights.load(replica, Snapshot(source.version, (source.buckets[0], last)))
    assert found != source.version
    assert found.checksum == weights.checksum(replica.state_dict().items())


def test_a_replica_in_other_precision_or_order_of_memory_is_told_apart() -> None:
    """Rounded weights are other weights: the receipt must not claim the trainer's. Weights that lie
    otherwise in memory are the same."""
    trainer = net(0, torch.float32)
    source = snapshot(trainer, number=1)
    assert weights.load(net(1, torch.bfloat16), source) != source.version
    assert weights.load(net(1, torch.float64), source) == source.version
    replica = net(1, torch.float32)
    replica[0].weight = nn.Parameter(replica[0].weight.detach().T.contiguous().T)  # type: ignore[index]
    assert weights.load(replica, source) == source.version
    assert same(trainer, replica)


class Tied(nn.Module):
    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 3, False), nn.Linear(3, 3, False)
        if tied:
            self.last.weight = self.first.weight


def test_tied_weights_come_once_and_none_is_forgotten() -> None:
    trainer, replica = Tied(True), Tied(True)
    once = list(trainer.named_parameters())
    assert [name for name, _ in once] == ["first.weight"]
    source = Snapshot(Version(1, weights.checksum(once)), (weights.pack(once),))
    assert weights.load(replica, source) == source.version
    assert same(trainer, replica)
    with pytest.raises(AssertionError, match=r"no weights for \['last.weight'\]"):
        weights.load(Tied(False), source)
    # Else the last of the two would be what both are.
    with pytest.raises(AssertionError, match="tied"):
        weights.load(Tied(True), snapshot(Tied(False), 1))


def test_a_shape_that_would_be_broadcast_is_refused() -> None:
    narrow = Snapshot(Version(1, ""), (weights.pack([("weight", torch.ones(3, 1))]),))
    with pytest.raises(AssertionError, match=r"weight is \(3, 3\), not \(3, 1\)"):
        weights.load(nn.Linear(3, 3, False), narrow)


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


def test_a_segment_is_shared_and_ends_with_its_users(tmp_path: Path) -> None:
    from cluster import shared_memory

    segment = shared_memory.create()
    assert segment is not None
    there = shared_memory.attach(segment, writable=True)
    there[:3] = 1, 2, 3
    shared_memory.attach.cache_clear()
    here = shared_memory.attach(segment)
    assert here[:4].tolist() == [1, 2, 3, 0]
    with pytest.raises(ValueError, match="read-only"):
        here[0] = 9
    shared_memory.release(segment)
    assert here[:3].tolist() == [1, 2, 3]
    again = shared_memory.create()
    assert again is not None and again != segment
    assert not shared_memory.attach(again)[:4].any()
    shared_memory.release(again)
    with pytest.raises(OSError):
        shared_memory.attach(segment, writable=True)


def test_a_tensor_of_the_host_is_packed_where_it_is() -> None:
    tensor: Tensor = torch.arange(6.0)
    bucket = weights.pack([("x", tensor)])
    tensor[0] = 7
    assert dict(bucket.tensors())["x"].tolist() == tensor.tolist()
