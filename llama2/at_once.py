"""Independent work in threads that need not wait for each other."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")


def at_once(works: Sequence[Iterator[T]]) -> list[list[T]]:
    """What each of some independent `works` yields. Raises what one of them raises, after the
    others have ended.

    On a CPU as many at a time as torch has threads, with one each: threads that compute the same
    product wait for each other after each, and whatever stops one of them stops all. One after the
    other, with all threads, where half of the threads or more would have no work.
    """
    threads, count = torch.get_num_threads(), at_a_time(len(works))
    if count == 1:
        return in_turn(works)
    try:
        with ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            calls = [pool.submit(list, work) for work in works]
    finally:
        torch.set_num_threads(threads)
    return [call.result() for call in calls]


def at_a_time(works: int) -> int:
    """How many of so many works `at_once` does at a time."""
    threads = torch.get_num_threads()
    if torch.cuda.is_available() or not 1 < threads < 2 * works:
        return 1
    return min(threads, works)


def in_turn(works: Sequence[Iterator[T]]) -> list[list[T]]:
    """What each of some `works` yields, one work after the other."""
    return [list(work) for work in works]
