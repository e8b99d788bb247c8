"""What a replica holds after loading is summed up from its own memory, wherever that is."""

from collections.abc import Iterator

import pytest
import torch
import xxhash
from torch import nn

from cluster import loading, publishing, shared_memory, weights
from cluster.loading import Loader
from cluster.shared_memory import Lease, Segments
from cluster.weights import Bucket, Snapshot, Version
from tests.cluster.nets import Tied, net, same


def snapshot(module: nn.Module, number: int) -> Snapshot:
    """Its weights where they lie, in two buckets."""
    named = list(module.state_dict().items())
    version = Version(number, weights.checksum(named))
    return Snapshot(version, (weights.pack(named[:1]), weights.pack(named[1:])))


@pytest.fixture
def segments() -> Iterator[Segments]:
    made = Segments()
    yield made
    made.release()


def shared(module: nn.Module, number: int, segments: Segments) -> Snapshot:
    """Its weights as a learner on the same node writes them."""
    segment = segments.claim()
    assert segment is not None
    memory, digest = shared_memory.attach(segment, writable=True), xxhash.xxh3_128()
    fields = publishing._write([list(module.named_parameters())], digest, memory)
    segments.open_to_readers(segment)
    lease = Lease(segment)
    parts = tuple(lease.memory[place] for place in weights.places(fields))
    version = Version(number, digest.hexdigest())
    return Snapshot(version, (Bucket(tuple(fields), parts),), lease)


def within(module: nn.Module, snapshot: Snapshot) -> int:
    """How many of its weights have the shared memory as their storage."""
    assert snapshot.lease is not None
    first, size = snapshot.lease.memory.ctypes.data, snapshot.lease.memory.size
    return sum(first <= weight.data_ptr() < first + size for weight in module.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_replica_ends_with_the_trainers_bytes(dtype: torch.dtype) -> None:
    trainer, replica = net(0, dtype), net(1, dtype)
    source = snapshot(trainer, number=7)
    assert weights.checksum(replica.state_dict().items()) != source.version.checksum
    assert Loader(replica).load(source) == source.version
    assert same(trainer, replica)


def test_weights_of_any_size_are_written_and_loaded_whole(
    monkeypatch: pytest.MonkeyPatch, segments: Segments
) -> None:
    """Also where they do not fill the pieces that are copied at once."""
    monkeypatch.setattr(loading, "CHUNK", 64)
    monkeypatch.setattr(publishing, "CHUNK", 64)
    for count in (1, 15, 16, 17, 100):
        trainer, replica = nn.Linear(1, count, False), nn.Linear(1, count, False)
        assert Loader(replica).load(found := snapshot(trainer, 0)) == found.version
        assert same(trainer, replica)
        replica = nn.Linear(1, count, False)
        assert Loader(replica).load(found := shared(trainer, 0, segments)) == found.version
        assert same(trainer, replica)


def test_a_byte_that_changes_on_the_way_is_noticed() -> None:
    trainer, replica = net(0, torch.float32), net(1, torch.float32)
    source = snapshot(trainer, number=1)
    damaged = source.buckets[1].parts[-1].copy()
    damaged[5] ^= 16
    last = Bucket(source.buckets[1].fields, (*source.buckets[1].parts[:-1], damaged))
    found = Loader(replica).load(Snapshot(source.version, (source.buckets[0], last)))
    assert found != source.version
    assert found.checksum == weights.checksum(replica.state_dict().items())


def test_a_replica_in_other_precision_or_order_of_memory_is_told_apart() -> None:
    """Rounded weights are other weights: the receipt must not claim the trainer's. Weights that lie
    otherwise in memory are the same."""
    trainer = net(0, torch.float32)
    source = snapshot(trainer, number=1)
    assert Loader(net(1, torch.bfloat16)).load(source) != source.version
    assert Loader(net(1, torch.float64)).load(source) == source.version
    replica = net(1, torch.float32)
    replica[0].weight = nn.Parameter(replica[0].weight.detach().T.contiguous().T)  # type: ignore[index]
    assert Loader(replica).load(source) == source.version
    assert same(trainer, replica)


def test_tied_weights_come_once_and_none_is_forgotten() -> None:
    trainer, replica = Tied(True), Tied(True)
    once = list(trainer.named_parameters())
    assert [name for name, _ in once] == ["first.weight"]
    source = Snapshot(Version(1, weights.checksum(once)), (weights.pack(once),))
    assert Loader(replica).load(source) == source.version
    assert same(trainer, replica)
    with pytest.raises(AssertionError, match=r"no weights for \['last.weight'\]"):
        Loader(Tied(False)).load(source)
    # Else the last of the two would be what both are.
    with pytest.raises(AssertionError, match="tied"):
        Loader(Tied(True)).load(snapshot(Tied(False), 1))


def test_a_shape_that_would_be_broadcast_is_refused() -> None:
    narrow = Snapshot(Version(1, ""), (weights.pack([("weight", torch.ones(3, 1))]),))
    with pytest.raises(AssertionError, match=r"weight is \(3, 3\), not \(3, 1\)"):
        Loader(nn.Linear(3, 3, False)).load(narrow)


def test_shared_weights_are_not_copied_and_stay_until_the_next_are_loaded(
    segments: Segments,
) -> None:
    replica, late = net(9, torch.bfloat16), net(9, torch.bfloat16)
    loader, late_loader = Loader(replica), Loader(late)
    for number in range(5):
        trainer = net(number, torch.bfloat16)
        source = shared(trainer, number, segments)
        assert loader.load(source) == source.version
        assert within(replica, source) == 3
        if number == 1:
            late_loader.load(source)
        del source
        assert same(replica, trainer)
        # Others are written around those that somebody still computes with.
        assert number == 0 or same(late, net(1, torch.bfloat16))


def test_a_byte_that_changes_in_shared_memory_is_noticed(segments: Segments) -> None:
    source = shared(net(0, torch.float32), 1, segments)
    segment = segments._made[0]
    shared_memory.attach(segment, writable=True)[1] ^= 4
    replica = net(1, torch.float32)
    found = Loader(replica).load(source)
    assert found != source.version
    assert found.checksum == weights.checksum(replica.named_parameters())


def test_shared_weights_are_copied_into_other_precision(segments: Segments) -> None:
    trainer, replica = net(0, torch.float32), net(1, torch.float64)
    source = shared(trainer, 1, segments)
    assert Loader(replica).load(source) == source.version
    assert not within(replica, source)
    del source
    shared(net(2, torch.float32), 2, segments)
    assert same(replica, trainer.double())


def test_a_replica_whose_weights_come_from_another_node_then_has_its_own_memory(
    segments: Segments,
) -> None:
    replica = Tied(True)
    loader = Loader(replica)
    source = shared(Tied(True), 1, segments)
    assert loader.load(source) == source.version
    assert within(replica, source) == 1 and replica.last.weight is replica.first.weight
    trainer = Tied(True)
    once = list(trainer.named_parameters())
    other = Snapshot(Version(2, weights.checksum(once)), (weights.pack(once),))
    assert loader.load(other) == other.version
    assert not within(replica, source) and same(replica, trainer)
    del source
    again = segments.claim()  # nobody reads it any more
    assert again is not None and [again.path] == [made.path for made in segments._made]
