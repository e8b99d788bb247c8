"""Published weights: what they are, and where they lie.

A store, an actor that outlives the learner's workers, has the newest weights. Where the learner's
first worker is on the store's node, it writes them into memory that the node's processes share, and
replicas there compute with what lies in it, or copy it to their GPUs; the next ones are written
beside it. Between nodes they travel as objects, bucket by bucket: the store asks for each, and an
object belongs to the actor that called for it, so that it is the store's although the worker wrote
it. A node fetches each object once, for all its replicas.
"""

import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import ray
import torch
import xxhash
from ray.exceptions import GetTimeoutError
from torch import Tensor

from cluster import shared_memory
from cluster.shared_memory import Bytes, Lease, Segment, Segments

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
            yield field.name, as_tensor(part).view(field.dtype).view(field.shape)


@dataclass(frozen=True)
class Snapshot:
    """All weights of one version; read without a copy where they lie in shared memory."""

    version: Version
    buckets: tuple[Bucket, ...]
    lease: Lease | None = None
    """Of the shared memory that the one bucket lies in."""

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
    return Bucket(tuple(fields), tuple(as_bytes(tensor) for _, tensor in named))


def as_bytes(tensor: Tensor) -> Bytes:
    """A tensor's bytes, without a copy where it lies contiguous in the host's memory."""
    flat = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
    found: Bytes = flat.numpy()
    return found


def as_tensor(memory: Bytes) -> Tensor:
    """A view of bytes, which may be read-only: torch cannot express that, nobody writes to it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(memory)


def checksum(weights: Iterable[tuple[str, Tensor]]) -> str:
    """xxh3-128 over names and bytes, in order."""
    digest = xxhash.xxh3_128()
    for name, tensor in weights:
        digest.update(name.encode())
        digest.update(as_bytes(tensor).data)
    return digest.hexdigest()


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
        self._segments = Segments()
        self._segment: Segment | None = None
        """Into which the newest weights are written."""
        self._writer = 0
        """The attempt that has segments."""
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
        if self._writer != attempt or node != self._node:
            self._segments.release()
        self._writer = attempt
        self._segment = self._segments.claim() if node == self._node else None
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
        if self._segment is not None:
            self._segments.open_to_readers(self._segment)
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


def answer(call: Any, what: str, timeout: float) -> Any:
    """What the store answers. Raises `TimeoutError` that says what it did not do."""
    try:
        return ray.get(call, timeout=timeout)
    except GetTimeoutError as error:
        raise TimeoutError(f"The weight store did not {what} within {timeout:g} s.") from error
