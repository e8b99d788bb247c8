"""Memory that a node's processes share. It has no name, and so is gone with the last of them.

One process makes segments, one writes, any number read. A reader's lease is a lock on the segment's
file, which the system takes back from a process that dies.
"""

import fcntl
import mmap
import os
import weakref
from dataclasses import dataclass
from functools import lru_cache
from uuid import uuid4

import numpy as np

Bytes = np.ndarray[tuple[int], np.dtype[np.uint8]]


@dataclass(frozen=True)
class Segment:
    """Where the memory is: a file descriptor of the process that made it."""

    process: int
    descriptor: int
    size: int
    name: str
    """Of no other segment: a process can use the number of a descriptor again."""

    def open(self, flags: int) -> int:
        """A file descriptor of this process. Raises `OSError` where the maker has ended."""
        return os.open(f"/proc/{self.process}/fd/{self.descriptor}", flags)


class Segments:
    """What a process makes: one segment to write into, and those that are read meanwhile."""

    def __init__(self) -> None:
        self._made: list[Segment] = []

    def claim(self) -> Segment | None:
        """A segment that nobody reads, nor can begin to read until it is opened to readers.

        It has room for all that this node's memory can hold, of which only what is written takes
        memory. None where the system has no memory without a name, which is Linux's.
        """
        free = [segment for segment in self._made if _locked(segment)]
        for spare in free[1:]:
            os.close(spare.descriptor)
            self._made.remove(spare)
        if free or not hasattr(os, "memfd_create"):
            return free[0] if free else None
        size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        descriptor = os.memfd_create("weights")
        os.ftruncate(descriptor, size)
        self._made.append(Segment(os.getpid(), descriptor, size, uuid4().hex))
        assert _locked(self._made[-1])
        return self._made[-1]

    def open_to_readers(self, segment: Segment) -> None:
        """What was to be written into a claimed segment is there."""
        fcntl.flock(segment.descriptor, fcntl.LOCK_UN)

    def release(self) -> None:
        """Let go of all segments; those that have one attached keep its memory."""
        for segment in self._made:
            os.close(segment.descriptor)
        self._made.clear()


def _locked(segment: Segment) -> bool:
    try:
        fcntl.flock(segment.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


class Lease:
    """A segment's memory, read-only. Nobody writes into it as long as this object is there.

    Raises `BlockingIOError` where the segment is claimed, `OSError` where its maker has ended.
    """

    def __init__(self, segment: Segment) -> None:
        descriptor = segment.open(os.O_RDONLY)
        weakref.finalize(self, os.close, descriptor)  # the lock goes with it
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        self.memory = attach(segment)


# Attaching again would bring back a page fault for each of its pages. There are two, in turns.
@lru_cache(maxsize=2)
def attach(segment: Segment, writable: bool = False) -> Bytes:
    """The memory of a segment that a process of this node has made.

    Raises `OSError` where that process has ended.
    """
    descriptor = segment.open(os.O_RDWR if writable else os.O_RDONLY)
    access = mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ
    try:
        mapped = mmap.mmap(descriptor, segment.size, access=access)
    finally:
        os.close(descriptor)
    return np.frombuffer(mapped, dtype=np.uint8)
