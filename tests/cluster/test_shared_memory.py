"""Memory that processes of a node share: who may write, who reads, and what is left of it."""

import multiprocessing
import os
from collections.abc import Iterator
from multiprocessing.connection import Connection

import pytest

from cluster import shared_memory
from cluster.shared_memory import Lease, Segment, Segments


@pytest.fixture
def segments() -> Iterator[Segments]:
    made = Segments()
    yield made
    made.release()
    shared_memory.attach.cache_clear()


def filled(segments: Segments, value: int) -> Segment:
    segment = segments.claim()
    assert segment is not None
    shared_memory.attach(segment, writable=True)[:3] = value
    segments.open_to_readers(segment)
    return segment


def test_readers_see_what_was_written_and_cannot_write(segments: Segments) -> None:
    lease = Lease(filled(segments, 7))
    assert lease.memory[:4].tolist() == [7, 7, 7, 0]
    with pytest.raises(ValueError, match="read-only"):
        lease.memory[0] = 9


def test_nobody_writes_where_somebody_reads(segments: Segments) -> None:
    first = filled(segments, 1)
    assert filled(segments, 2) == first  # nobody had begun to read
    lease, other = Lease(first), Lease(first)
    second = filled(segments, 3)
    assert second != first
    del lease
    assert filled(segments, 4) == second
    del other
    # Two are free now; one of them is enough.
    assert segments.claim() == first
    with pytest.raises(OSError):
        second.open(os.O_RDONLY)


def test_nobody_reads_what_is_being_written(segments: Segments) -> None:
    segment = segments.claim()
    assert segment is not None
    with pytest.raises(BlockingIOError):
        Lease(segment)
    assert segments.claim() == segment  # whoever was to write it has not
    segments.open_to_readers(segment)
    assert not Lease(segment).memory[:9].any()


def test_memory_outlives_its_maker_for_those_that_read_it(segments: Segments) -> None:
    segment = filled(segments, 5)
    lease = Lease(segment)
    segments.release()
    assert lease.memory[:3].tolist() == [5, 5, 5]
    with pytest.raises(OSError):
        segment.open(os.O_RDONLY)
    again = filled(segments, 6)
    assert again != segment
    assert lease.memory[:3].tolist() == [5, 5, 5]
    assert Lease(again).memory[:3].tolist() == [6, 6, 6]


def read_on(segment: Segment, pipe: Connection) -> None:
    lease = Lease(segment)
    pipe.send(lease.memory[:3].tolist())
    pipe.recv()


def test_a_reader_that_is_killed_reads_no_more(segments: Segments) -> None:
    segment = filled(segments, 8)
    ours, theirs = multiprocessing.Pipe()
    reader = multiprocessing.get_context("spawn").Process(target=read_on, args=(segment, theirs))
    reader.start()
    assert ours.recv() == [8, 8, 8]
    assert segments.claim() != segment
    reader.kill()
    reader.join()
    assert segments.claim() == segment
