"""Memory that a node's processes share. It has no name, and so is gone with the last of them."""

import mmap
import os
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


def create() -> Segment | None:
    """Room for all that this node's memory can hold, of which only what is written takes memory.

    None where the system has no memory without a name, which is Linux's.
    """
    if not hasattr(os, "memfd_create"):
        return None
    size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    descriptor = os.memfd_create("weights")
    os.ftruncate(descriptor, size)
    return Segment(os.getpid(), descriptor, size, uuid4().hex)


def release(segment: Segment) -> None:
    """Let go of memory that this process made; those that still have it attached keep it."""
    os.close(segment.descriptor)


# Attaching again would bring back a page fault for each of its pages.
@lru_cache(maxsize=1)
def attach(segment: Segment, writable: bool = False) -> Bytes:
    """The memory of a segment that a process of this node has made.

    Raises `OSError` where that process has ended.
    """
    path = f"/proc/{segment.process}/fd/{segment.descriptor}"
    descriptor = os.open(path, os.O_RDWR if writable else os.O_RDONLY)
    access = mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ
    try:
        return np.frombuffer(mmap.mmap(descriptor, segment.size, access=access), dtype=np.uint8)
    finally:
        os.close(descriptor)
