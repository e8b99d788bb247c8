"""Published weights: where they lie, and how replicas take them.

A store, an actor that outlives the learner's workers, has the newest weights. Where the learner's
first worker is on the store's node, it writes them into memory that the node's processes share, and
replicas there copy them from it into their models. Between nodes they travel as objects, bucket by
bucket: the store asks for each, and an object belongs to the actor that called for it, so that it
is the store's although the worker wrote it. A node fetches each object once, for all its replicas.
"""

import math
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import ray
import torch
import xxhash
from ray.exceptions import GetTimeoutError
from torch import Tensor, nn

from cluster import shared_memory
from cluster.shared_memory import Bytes, Segment

BUCKET = 1 << 26
"""Bytes that travel together; an object costs as much as 10 MB or so of its bytes."""
CHUNK = 1 << 19
"""Bytes that are copied before they are summed up: few enough to be in the processor's cache still,
where summing costs next to nothing."""
POLL = 0.05
"""Seconds between two looks at what another process does."""
ALIGNMENT = 64
"""Of the first byte of each weight."""


@dataclass(frozen=True)
class Version:
    """Which weights: how many updates made them, and the checksum of their bytes."""

    number: int
    checksum: str


@dataclass(frozen=True)
class Field:
    """What a tensor's bytes stand for."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Bucket:
    """Whole tensors that travel together, as bytes in the host's memory."""

    fields: tuple[Field, ...]
    parts: tuple[Bytes, ...]

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Names and views."""
        for field, part in zip(self.fields, self.parts, strict=True):
            with warnings.catch_warnings():
                # Shared memory is read-only, which torch cannot express; nobody writes to a view.
                warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
                data = torch.from_numpy(part)
            yield field.name, data.view(field.dtype).view(field.shape)


@dataclass(frozen=True)
class Snapshot:
    """All weights of one version; read without a copy where they lie in shared memory."""

    version: Version
    buckets: tuple[Bucket, ...]

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Names and read-only views."""
        for bucket in self.buckets:
            yield from bucket.tensors()


def places(fields: Iterable[Field]) -> Iterator[slice]:
    """Where weights lie that follow each other in memory."""
    start = 0
    for field in fields:
        yield slice(start, start + field.size)
        start += padded(field.size)


def padded(size: int) -> int:
    """Bytes from the start of a weight of `size` bytes to that of the next one."""
    return math.ceil(size / ALIGNMENT) * ALIGNMENT


def pack(weights: Iterable[tuple[str, Tensor]]) -> Bucket:
    """Weights as a bucket, without a copy of those that lie contiguous in the host's memory."""
    named = [(name, tensor.detach()) for name, tensor in weights]
    fields = (Field(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in named)
    return Bucket(tuple(fields), tuple(_bytes(tensor) for _, tensor in named))


def _bytes(tensor: Tensor) -> Bytes:
    flat = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
    found: Bytes = flat.numpy()
    return found


def checksum(weights: Iterable[tuple[str, Tensor]]) -> str:
    """xxh3-128 over names and bytes, in order."""
    digest = xxhash.xxh3_128()
    for name, tensor in weights:
        digest.update(name.encode())
        digest.update(_bytes(tensor).data)
    return digest.hexdigest()


def load(module: nn.Module, source: Snapshot) -> Version:
    """Copy a snapshot into `module` and return what the module now holds, summed up afresh.

    Weights are summed up from the module's own memory, right after they were written. Weights that
    are rounded on the way give another version than the snapshot's. The snapshot must have every
    weight of the module, tied ones once, and no others.
    """
    state = module.state_dict()
    _check_names(state, source)
    digest = xxhash.xxh3_128()
    with torch.no_grad():
        for name, tensor in source.tensors():
            digest.update(name.encode())
            _copy(state[name], tensor, digest)
    return Version(source.version.number, digest.hexdigest())


def _check_names(state: dict[str, Tensor], source: Snapshot) -> None:
    shapes = {field.name: field.shape for bucket in source.buckets for field in bucket.fields}
    for name, shape in shapes.items():
        assert name in state, f"the module has no weight {name}"
        assert state[name].shape == shape, f"{name} is {tuple(state[name].shape)}, not {shape}"
    # Were two of them one tensor here, the second would overwrite the first, which is summed up.
    held = {state[name].data_ptr() for name in shapes if state[name].numel()}
    assert len(held) == sum(state[name].numel() > 0 for name in shapes), "tied, but not there"
    missing = [name for name, tensor in state.items() if tensor.data_ptr() not in held]
    assert not any(state[name].numel() for name in missing), f"no weights for {missing}"


def _copy(target: Tensor, source: Tensor, digest: Any) -> None:
    """Copy, and add to the digest what `target` then holds."""
    if target.device.type != "cpu" or target.dtype != source.dtype or not target.is_contiguous():
        target.copy_(source)
        digest.update(_bytes(target.to(source.dtype)).data)
        return
    there, here = _bytes(target), _bytes(source)
    for start in range(0, len(here), CHUNK):
        chunk = there[start : start + CHUNK]
        np.copyto(chunk, here[start : start + CHUNK])
        digest.update(chunk.data)


@dataclass(frozen=True)
class Receipt:
    """A replica's word on the weights that it now serves."""

    replica: str
    version: Version


class Fenced(RuntimeError):
    """Another attempt of the learner publishes now; this one must end."""


@dataclass(frozen=True)
class Shelf:
    """What the store has: weights in a segment, with their fields in order, or in objects."""

    underway: int | None = None
    """Number of the version that is being published."""
    version: Version | None = None
    """None before the first publication, and while one is under way."""
    segment: Segment | None = None
    fields: tuple[Field, ...] = ()
    buckets: tuple["ray.ObjectRef[Bucket]", ...] = ()


@ray.remote(num_cpus=0, max_restarts=0)
class WeightStore:
    """Has the newest weights, for whoever starts late or again.

    Numbers grow within an attempt of the learner. A later attempt may begin with a lower one, that
    of its checkpoint; what an earlier attempt still sends is refused.
    """

    def __init__(self) -> None:
        self._node = ray.get_runtime_context().get_node_id()
        self._attempt, self._number = 0, -1
        self._segment: Segment | None = None
        self._writer = 0
        """The attempt that has the segment."""
        self._publisher: Any = None
        self._taken: list[ray.ObjectRef[Bucket]] = []
        self._shelf = Shelf()
        self._asked: set[str] = set()
        self._asked_before: set[str] = set()

    def enter(self) -> int:
        """Begin an attempt, which shuts out all earlier ones; returns its number."""
        self._attempt, self._number = self._attempt + 1, -1
        return self._attempt

    def begin(self, attempt: int, number: int, publisher: Any, node: str) -> Segment | None:
        """Let go of the weights that are there. The next ones are to be written into the segment
        that is returned; without one, as on other nodes, `publisher`, an actor, is to offer them
        in buckets."""
        self._check(attempt)
        assert number > self._number, f"weights {number} come after {self._number}"
        self._number, self._publisher, self._taken = number, publisher, []
        self._shelf = Shelf(underway=number)
        self._asked_before, self._asked = self._asked, set()
        # A worker of an earlier attempt that was only asleep may still write into what it has.
        if self._segment is not None and (self._writer != attempt or node != self._node):
            shared_memory.release(self._segment)
            self._segment = None
        if self._segment is None and node == self._node:
            self._segment, self._writer = shared_memory.create(), attempt
        return self._segment

    def take(self, attempt: int, place: int) -> list["ray.ObjectRef[Bucket]"]:
        """Ask the publisher for a bucket. The list has a reference to what will be its bytes."""
        self._check(attempt)
        self._taken.append(self._publisher.__ray_call__.remote(hand_over, place))
        return self._taken[-1:]

    def finish(self, attempt: int, version: Version, fields: tuple[Field, ...]) -> None:
        """All weights are there."""
        self._check(attempt)
        assert version.number == self._number
        self._shelf = Shelf(None, version, self._segment, fields, tuple(self._taken))
        self._publisher = None

    def latest(self, asker: str, node: str) -> Shelf:
        """The newest weights, as `node` can read them; the store remembers who asked."""
        self._asked.add(asker)
        if self._shelf.segment is None or node == self._node:
            return self._shelf
        if not self._taken:
            memory = shared_memory.attach(self._shelf.segment)
            self._taken = [ray.put(bucket) for bucket in _cut(self._shelf.fields, memory)]
        return replace(self._shelf, segment=None, buckets=tuple(self._taken))

    def askers(self) -> set[str]:
        """Who asked for the newest weights or for those before."""
        return self._asked | self._asked_before

    def _check(self, attempt: int) -> None:
        if attempt != self._attempt:
            raise Fenced(
                f"Attempt {attempt} of the learner cannot publish, since attempt {self._attempt} "
                "has begun; end its workers."
            )


def _cut(fields: Sequence[Field], memory: Bytes) -> Iterator[Bucket]:
    """What lies in memory, in buckets."""
    bucket: list[tuple[Field, Bytes]] = []
    for field, place in zip(fields, places(fields), strict=True):
        if bucket and sum(len(part) for _, part in bucket) + field.size > BUCKET:
            yield Bucket(*zip(*bucket, strict=True))
            bucket = []
        bucket.append((field, memory[place]))
    if bucket:
        yield Bucket(*zip(*bucket, strict=True))


offered: dict[int, Bucket] = {}
"""What this process offers to the store, whose calls come in another thread than the learner's."""


def hand_over(_: Any, place: int) -> Bucket:
    """A bucket of this process: runs in the publisher, called by the store."""
    return offered[place]


def fetch(store: "ray.actor.ActorHandle[WeightStore]", timeout: float = 60.0) -> Snapshot | None:
    """The newest weights, None before the first publication; waits for one that is under way.

    Load a snapshot at once: with the next publication others lie in its place, which shows in the
    checksum. Raises `TimeoutError` where all this takes longer than `timeout` seconds.
    """
    deadline = time.monotonic() + timeout
    node = ray.get_runtime_context().get_node_id()
    while True:
        shelf: Shelf = answer(store.latest.remote(_name(), node), "show its weights", timeout)
        if shelf.underway is None:
            break
        if time.monotonic() > deadline:
            raise TimeoutError(
                f"Weights {shelf.underway} are still being published after {timeout:g} s; look for "
                "a worker of the learner that died or hangs."
            )
        time.sleep(POLL)
    if shelf.version is None:
        return None
    if shelf.segment is None:
        buckets = answer(list(shelf.buckets), "hand out its weights", timeout)
        return Snapshot(shelf.version, tuple(buckets))
    memory = shared_memory.attach(shelf.segment)
    parts = tuple(memory[place] for place in places(shelf.fields))
    return Snapshot(shelf.version, (Bucket(shelf.fields, parts),))


def _name() -> str:
    """What messages call this process."""
    context = ray.get_runtime_context()
    actor = context.get_actor_id()
    return (context.get_actor_name() or actor) if actor else context.get_worker_id()


def answer(call: Any, what: str, timeout: float) -> Any:
    """What the store answers. Raises `TimeoutError` that says what it did not do."""
    try:
        return ray.get(call, timeout=timeout)
    except GetTimeoutError as error:
        raise TimeoutError(f"The weight store did not {what} within {timeout:g} s.") from error
