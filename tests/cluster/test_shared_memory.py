"""Memory that processes of a node share: who may write, who reads, and what is left of it."""

import multiprocessing
import os
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing.connection import Connection

import pytest

from cluster import shared_memory
from cluster.shared_memory import Gone, Lease, Segment, Segments


@pytest.fixture
def segments() -> Iterator[Segments]:
    made = Segments()
    yield made
    made.release()
    assert not shared_memory._attached


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
    assert filled(segments, 2).path == first.path  # nobody had begun to read
    third = filled(segments, 3)
    lease, other = Lease(third), Lease(third)
    second = filled(segments, 4)
    assert second.path != first.path
    del lease
    assert filled(segments, 5).path == second.path
    assert other.memory[:3].tolist() == [3, 3, 3]
    del other
    # Two are free now; one of them is enough, and only that stays attached.
    claimed = segments.claim()
    assert claimed is not None and claimed.path == first.path
    assert {path for path, *_ in shared_memory._attached} == {first.path}
    with pytest.raises(FileNotFoundError):
        shared_memory.attach(second)


def test_nobody_reads_what_is_being_written(segments: Segments) -> None:
    segment = segments.claim()
    assert segment is not None
    with pytest.raises(Gone):
        Lease(segment)
    again = segments.claim()  # whoever was to write it has not
    assert again is not None and again.path == segment.path
    segments.open_to_readers(again)
    assert not Lease(again).memory[:9].any()


def test_nobody_takes_one_version_for_another(segments: Segments) -> None:
    """Where a reader was told of a segment and comes late."""
    first = filled(segments, 1)
    second = filled(segments, 2)
    assert second.path == first.path
    with pytest.raises(Gone):
        Lease(first)
    assert Lease(second).memory[:3].tolist() == [2, 2, 2]
    segments.release()
    with pytest.raises(Gone):
        Lease(second)
    reused = os.open(os.devnull, os.O_RDONLY)
    try:
        with pytest.raises(Gone):  # the number of the descriptor may be another file's by now
            Lease(replace(second, descriptor=reused))
    finally:
        os.close(reused)


def test_memory_outlives_its_maker_for_those_that_read_it(segments: Segments) -> None:
    lease = Lease(filled(segments, 5))
    segments.release()
    assert not shared_memory._attached
    assert lease.memory[:3].tolist() == [5, 5, 5]
    again = filled(segments, 6)
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
    theirs.close()  # so that the pipe ends with the reader
    assert ours.recv() == [8, 8, 8]
    claimed = segments.claim()
    assert claimed is not None and claimed.path != segment.path
    reader.kill()
    reader.join()
    claimed = segments.claim()
    assert claimed is not None and claimed.path == segment.path
