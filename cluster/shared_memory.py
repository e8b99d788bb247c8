"""Memory that a node's processes share. It has no name, and so is gone with the last of them.

One process makes segments, one writes, any number read. A reader's lease is a lock on the segment's
file, which the system takes back from a process that dies.
"""

import fcntl
import mmap
import os
import weakref
from dataclasses import dataclass, replace
from uuid import uuid4

import numpy as np

Bytes = np.ndarray[tuple[int], np.dtype[np.uint8]]

TOKEN = 32
"""Bytes of a token, which stands behind a segment's memory."""


class Gone(RuntimeError):
    """What was to be read from a segment is not there any more."""


@dataclass(frozen=True)
class Segment:
    """Where the memory is: a file descriptor of the process that made it."""

    process: int
    descriptor: int
    size: int
    token: str = ""
    """Of what is written into it this time."""

    @property
    def path(self) -> str:
        """A file that other processes can open while the maker has it."""
        return f"/proc/{self.process}/fd/{self.descriptor}"


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
        forget_closed()
        if not free:
            if not hasattr(os, "memfd_create"):
                return None
            size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
            descriptor = os.memfd_create("weights")
            os.ftruncate(descriptor, size + TOKEN)
            free = [Segment(os.getpid(), descriptor, size)]
            self._made += free
            assert _locked(free[0])
        claimed = replace(free[0], token=uuid4().hex)
        os.pwrite(claimed.descriptor, claimed.token.encode(), claimed.size)
        return claimed

    def open_to_readers(self, segment: Segment) -> None:
        """What was to be written into a claimed segment is there."""
        fcntl.flock(segment.descriptor, fcntl.LOCK_UN)

    def release(self) -> None:
        """Let go of all segments; those that have one attached keep its memory."""
        for segment in self._made:
            os.close(segment.descriptor)
        self._made.clear()
        forget_closed()


def _locked(segment: Segment) -> bool:
    try:
        fcntl.flock(segment.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


class Lease:
    """A segment's memory, read-only. Nobody writes into it as long as this object is there.

    Raises `Gone` where others are written there, or were, or where the maker has let go of it.
    """

    def __init__(self, segment: Segment) -> None:
        try:
            descriptor = os.open(segment.path, os.O_RDONLY)
            weakref.finalize(self, os.close, descriptor)  # the lock goes with it
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
            if os.pread(descriptor, TOKEN, segment.size) != segment.token.encode():
                raise Gone("the segment was written again")
            self.memory = _mapped(segment, f"/proc/self/fd/{descriptor}", writable=False)
        except (BlockingIOError, FileNotFoundError) as error:
            raise Gone("the segment is written to, or its maker has closed it") from error


_attached: dict[tuple[str, int, bool], Bytes] = {}
"""By path, inode and whether it is writable. Attaching memory again would bring back a page fault
for each of its pages."""


def attach(segment: Segment, writable: bool = False) -> Bytes:
    """The memory of a segment that a process of this node has made.

    Raises `FileNotFoundError` where that process has closed it or has ended.
    """
    return _mapped(segment, segment.path, writable)


def _mapped(segment: Segment, path: str, writable: bool) -> Bytes:
    """`path` is the segment's file. A lease gives its own, which cannot be another file by now; it
    is opened anew, since a mapping keeps what it was made from, and would keep the lock."""
    forget_closed()
    descriptor = os.open(path, os.O_RDWR if writable else os.O_RDONLY)
    try:
        key = segment.path, os.fstat(descriptor).st_ino, writable
        if key not in _attached:
            access = mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ
            mapped = mmap.mmap(descriptor, segment.size, access=access)
            _attached[key] = np.frombuffer(mapped, dtype=np.uint8)
    finally:
        os.close(descriptor)
    return _attached[key]


def forget_closed() -> None:
    """Keep no memory attached that its maker has let go of; what is still used stays until then."""
    for path, inode, writable in list(_attached):
        if _inode(path) != inode:
            del _attached[path, inode, writable]


def _inode(path: str) -> int | None:
    try:
        return os.stat(path).st_ino
    except FileNotFoundError:
        return None
