"""Work in threads: whose result is whose, who has how many threads, and errors."""

import threading
import time
from collections.abc import Iterator

import pytest
import torch

from llama2.at_once import at_once, in_turn

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU works go in turn")


def counting(number: int, count: int, pause: float = 0.0) -> Iterator[tuple[int, int]]:
    for i in range(count):
        time.sleep(pause)
        yield number, i


@pytest.mark.parametrize("number", [1, 2, 3])
def test_results_come_in_the_order_of_the_works(threads: None, number: int) -> None:
    torch.set_num_threads(number)
    lengths = [3, 0, 5, 1, 2]
    works = [counting(i, length, 0.001 * i) for i, length in enumerate(lengths)]
    expected = [[(i, j) for j in range(length)] for i, length in enumerate(lengths)]
    assert at_once(works) == expected
    assert torch.get_num_threads() == number
    assert in_turn([counting(i, length) for i, length in enumerate(lengths)]) == expected
    assert at_once([]) == []


def test_works_run_at_the_same_time_with_a_thread_each(threads: None) -> None:
    torch.set_num_threads(3)
    both = threading.Barrier(2, timeout=20)

    def work() -> Iterator[tuple[int, int]]:
        both.wait()
        yield torch.get_num_threads(), threading.get_ident()

    ((number, first),), ((other_number, second),) = at_once([work(), work()])
    assert number == other_number == 1
    assert first != second
    assert torch.get_num_threads() == 3


@pytest.mark.parametrize(("number", "works"), [(1, 2), (4, 2), (9, 3), (3, 1)])
def test_they_go_in_turn_where_most_threads_would_have_nothing_to_do(
    threads: None, number: int, works: int
) -> None:
    torch.set_num_threads(number)
    order: list[tuple[int, int]] = []

    def work(which: int) -> Iterator[None]:
        for _ in range(3):
            order.append((which, torch.get_num_threads()))
            yield

    at_once([work(i) for i in range(works)])
    assert order == [(i, number) for i in range(works) for _ in range(3)]


@pytest.mark.parametrize("failing", [0, 1])
def test_an_error_is_raised_when_the_others_have_ended(threads: None, failing: int) -> None:
    torch.set_num_threads(2)
    done: list[int] = []

    def work(number: int) -> Iterator[None]:
        if number == failing:
            raise FloatingPointError("no number")
        time.sleep(0.05)
        done.append(number)
        yield

    with pytest.raises(FloatingPointError, match="no number"):
        at_once([work(0), work(1)])
    assert done == [1 - failing]
    assert torch.get_num_threads() == 2
