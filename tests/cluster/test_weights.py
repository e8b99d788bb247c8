"""Published weights: what a replica holds is summed up from its own memory."""

import torch
from torch import nn

from cluster import weights


def net(seed: int, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 3), nn.Embedding(4, 2)).to(dtype)


def test_a_replica_ends_with_the_trainers_bytes() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        trainer, replica = net(0, dtype), net(1, dtype)
        source = weights.snapshot(trainer.state_dict().items(), number=7)
        assert weights.checksum(replica.state_dict().items()) != source.version.checksum
        assert weights.load(replica, source) == source.version
        for name, tensor in replica.state_dict().items():
            assert torch.equal(tensor, trainer.state_dict()[name])


def test_a_snapshot_does_not_follow_later_updates() -> None:
    trainer, replica = net(0, torch.float32), net(1, torch.float32)
    before = trainer.state_dict()["0.weight"].clone()
    source = weights.snapshot(trainer.state_dict().items(), number=1)
    with torch.no_grad():
        trainer.state_dict()["0.weight"].add_(1.0)
    weights.load(replica, source)
    assert torch.equal(replica.state_dict()["0.weight"], before)


def test_the_checksum_sees_one_bit_and_a_swap_of_names() -> None:
    trainer = net(0, torch.float32)
    whole = weights.checksum(trainer.state_dict().items())
    flipped = {name: tensor.clone() for name, tensor in trainer.state_dict().items()}
    flipped["1.weight"].view(-1).view(torch.int32)[3] ^= 1
    assert weights.checksum(flipped.items()) != whole
    renamed = [(name[::-1], tensor) for name, tensor in trainer.state_dict().items()]
    assert weights.checksum(renamed) != whole


def test_a_replica_in_lower_precision_is_noticed() -> None:
    """Rounded weights are other weights: the receipt must not claim the trainer's."""
    trainer, replica = net(0, torch.float32), net(1, torch.bfloat16)
    source = weights.snapshot(trainer.state_dict().items(), number=1)
    assert weights.load(replica, source) != source.version
