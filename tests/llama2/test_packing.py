"""Packing, balancing and orders, as arithmetic on lengths."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama2.packing import balance, best_fit, sample_order, shuffled


def test_known_answer() -> None:
    sequences = [[1, 2, 3], [4, 5, 6, 7], [8]]
    rows = best_fit([len(sequence) for sequence in sequences], capacity=4)
    packed = [[token for i in row for token in sequences[i]] for row in rows]
    assert packed == [[4, 5, 6, 7], [1, 2, 3, 8]]


@given(st.lists(st.integers(1, 20), max_size=60))
def test_packing_keeps_every_sequence_once(lengths: list[int]) -> None:
    rows = best_fit(lengths, capacity=20)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= 20 for row in rows)
    # Best fit never leaves two rows that are both at most half full.
    assert sum(sum(lengths[i] for i in row) <= 10 for row in rows) <= 1


def test_packing_refuses_what_cannot_fit() -> None:
    with pytest.raises(ValueError, match="5 tokens does not fit a row of 4"):
        best_fit([2, 5], capacity=4)


@given(st.integers(1, 5), st.integers(1, 12), st.randoms())
def test_balance_deals_all_evenly(shares: int, each: int, random) -> None:  # type: ignore[no-untyped-def]
    lengths = [random.randint(1, 100) for _ in range(shares * each)]
    parts = balance(lengths, shares)
    assert sorted(i for part in parts for i in part) == list(range(len(lengths)))
    totals = [sum(lengths[i] for i in part) for part in parts]
    assert all(len(part) == each for part in parts)
    assert max(totals) - min(totals) <= max(lengths)


def test_balance_refuses_uneven_shares() -> None:
    with pytest.raises(ValueError, match="3 sequences cannot be dealt evenly to 2"):
        balance([1, 2, 3], 2)


@given(st.integers(1, 3000), st.integers(0, 2**31))
def test_shuffled_is_a_permutation(size: int, seed: int) -> None:
    order = [shuffled(i, size, seed) for i in range(size)]
    assert sorted(order) == list(range(size))


def test_shuffles_differ_by_seed_and_leave_the_identity() -> None:
    orders = {tuple(shuffled(i, 50, seed) for i in range(50)) for seed in range(20)}
    assert len(orders) == 20
    assert tuple(range(50)) not in orders


def test_each_pass_sees_every_sample_once_in_another_order() -> None:
    order = [i for step in range(6) for i in sample_order(step, batch=4, size=12, seed=5)]
    assert sorted(order[:12]) == sorted(order[12:]) == list(range(12))
    assert order[:12] != order[12:]
    assert sample_order(3, 4, 12, 5) == order[12:16]
