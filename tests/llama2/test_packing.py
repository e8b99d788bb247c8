"""Packing, balancing and orders, as arithmetic on lengths."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama2.packing import balance, best_fit, deal, micro_batches, sample_order, shuffled


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


LENGTHS = st.lists(st.integers(1, 100), min_size=1, max_size=60)


def rounds_spread(lengths: list[int], shares: int) -> int:
    """The most that the lengths of one round of dealing differ, an absent one counting 0."""
    longest = sorted(lengths, reverse=True)
    longest += [0] * (-len(longest) % shares)
    turns = [longest[start : start + shares] for start in range(0, len(longest), shares)]
    return max(turn[0] - turn[-1] for turn in turns)


@given(LENGTHS, st.integers(1, 7))
def test_balance_deals_all_with_close_totals(lengths: list[int], shares: int) -> None:
    parts = balance(lengths, shares)
    assert sorted(i for part in parts for i in part) == list(range(len(lengths)))
    counts = [len(part) for part in parts]
    assert max(counts) - min(counts) <= 1
    totals = [sum(lengths[i] for i in part) for part in parts]
    assert max(totals) - min(totals) <= rounds_spread(lengths, shares) <= max(lengths)


def test_balance_by_hand() -> None:
    # 9 and 8 are dealt; then 7 goes to the 8 and 2 to the 9; then 1 to the lighter part.
    assert balance([2, 9, 7, 1, 8], 2) == [[1, 0, 3], [4, 2]]


@given(LENGTHS, st.integers(1, 400))
def test_micro_batches_keep_to_the_budget(lengths: list[int], budget: int) -> None:
    found = micro_batches(lengths, budget)
    assert sorted(i for micro in found for i in micro) == list(range(len(lengths)))
    for micro in found:
        assert len(micro) == 1 or len(micro) * max(lengths[i] for i in micro) <= budget
    # Greedy: a micro-batch with one more row, of those that come next, would not fit.
    for micro, following in itertools.pairwise(found):
        assert (len(micro) + 1) * max(lengths[i] for i in (*micro, following[0])) > budget


def test_micro_batches_by_hand() -> None:
    # Twice 10 is within 25, twice 7 with a third one is not; 30 is alone, too long as it is.
    assert micro_batches([7, 10, 30, 10, 7, 7, 1], 25) == [[2], [1, 3], [0, 4, 5], [6]]


@given(LENGTHS, st.integers(1, 7), st.integers(1, 400))
def test_dealt_batches_are_whole_and_in_step(lengths: list[int], shares: int, budget: int) -> None:
    dealt = deal(lengths, shares, budget)
    assert len(dealt) == shares
    assert sorted(i for share in dealt for micro in share for i in micro) == list(
        range(len(lengths))
    )
    assert len({len(share) for share in dealt}) == 1
    for share in dealt:
        for micro in share:
            assert len(micro) <= 1 or len(micro) * max(lengths[i] for i in micro) <= budget
    # No more passes than the share that needs most.
    needed = [len(micro_batches([lengths[i] for i in p], budget)) for p in balance(lengths, shares)]
    assert len(dealt[0]) == max(needed)
    # A pass is empty only where a share has fewer rows than there are passes.
    for share in dealt:
        rows = sum(map(len, share))
        assert sum(not micro for micro in share) == max(0, len(share) - rows)


@given(LENGTHS, st.integers(1, 400))
def test_one_share_is_the_whole_batch(lengths: list[int], budget: int) -> None:
    assert deal(lengths, 1, budget) == [micro_batches(lengths, budget)]


def test_all_shares_make_as_many_passes_as_the_slowest() -> None:
    # The shares are 9; 9 and 2; 2 and 2. Within 9 tokens the second needs two passes, so the third
    # halves its one, and the first, of one row, waits in an empty one.
    dealt = deal([9, 9, 2, 2, 2], 3, 9)
    lengths = [9, 9, 2, 2, 2]
    found = [[[lengths[i] for i in micro] for micro in share] for share in dealt]
    assert sorted(found) == [[[2], [2]], [[9], []], [[9], [2]]]


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
