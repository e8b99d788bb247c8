"""Numbers with their intervals: by hand, from published tables, and by how often they hold."""

import random

import pytest

from llama2.evaluation import (
    _t_95,
    distinct,
    mean_of,
    rate_of,
    ratio_of,
    repetition,
    share_of,
    side_by_side,
)


def test_wilson_interval() -> None:
    """8 of 10: Wilson 1927's formula by hand, (p + z^2/2n -+ z sqrt(p q/n + z^2/4n^2)) / (1+z^2/n)
    = (0.8 + 0.19207 -+ 1.95996 * 0.15928) / 1.38415."""
    found = rate_of([True] * 8 + [False] * 2)
    assert found.value == 0.8
    assert found.count == 10
    assert (found.low, found.high) == pytest.approx((0.49016, 0.94332), abs=1e-5)


def test_wilson_at_the_end() -> None:
    """Nothing in 17: the upper end is z^2 / (n + z^2) = 3.84146 / 20.84146."""
    found = rate_of([False] * 17)
    assert found.low == 0
    assert found.high == pytest.approx(0.184318, abs=1e-6)


def test_ties_are_halves() -> None:
    """2 wins, 1 tie, 1 loss: 0.625. Spread (3 * 0.25 + 0.25) / 4, as after a fourth decision, so
    the interval is that of Wilson at 0.625 of 4: c = 0.960365, 0.5 + (0.125 -+ sqrt(c (1.960365 *
    0.25 - 0.015625))) / 1.960365."""
    found = side_by_side([3, 2, 1, 0.5], [1, 1, 1, 4])
    assert (found.wins, found.ties, found.losses) == (2, 1, 1)
    assert found.rate.value == 0.625
    assert (found.rate.low, found.rate.high) == pytest.approx((0.219427, 0.908101), abs=1e-5)


def test_sides_mirror_each_other() -> None:
    draw = random.Random(3)
    first = [draw.choice([0, 1, 2]) for _ in range(30)]
    second = [draw.choice([0, 1, 2]) for _ in range(30)]
    one, other = side_by_side(first, second).rate, side_by_side(second, first).rate
    assert one.low is not None and one.high is not None
    assert other.value == pytest.approx(1 - one.value)
    assert (other.low, other.high) == pytest.approx((1 - one.high, 1 - one.low))


def test_ties_narrow_but_prove_nothing() -> None:
    """All ties are no certainty; half of them ties say more than none."""
    tied = side_by_side([1] * 100, [1] * 100).rate
    assert tied.value == 0.5
    assert tied.low is not None and 0.48 < tied.low < 0.5
    decided = side_by_side([1, 0] * 50, [0, 1] * 50).rate
    mixed = side_by_side([1, 0, 0, 0] * 25, [0, 1, 0, 0] * 25).rate
    assert mixed.low is not None and decided.low is not None and tied.low > mixed.low > decided.low


@pytest.mark.parametrize("weights", [(0.1, 0.6, 0.3), (0.5, 0.1, 0.4), (0.02, 0.08, 0.9)])
def test_intervals_hold_as_often_as_they_say(weights: tuple[float, float, float]) -> None:
    """Of 95% intervals of 60 draws of 0, 1/2 and 1, about 95% hold the true mean."""
    draw = random.Random(0)
    truth = weights[1] / 2 + weights[2]
    hits = 0
    for _ in range(1000):
        found = share_of(draw.choices((0, 0.5, 1), weights, k=60))
        assert found.low is not None and found.high is not None
        hits += found.low <= truth <= found.high
    assert 0.93 <= hits / 1000 <= 0.99


def test_interval_of_a_mean() -> None:
    """1, 2, 3, 4: standard error sqrt(5/3 / 4) = 0.645497, 3 degrees of freedom: 3.1824."""
    found = mean_of([1, 2, 3, 4])
    assert (found.value, found.count) == (2.5, 4)
    assert (found.low, found.high) == pytest.approx((2.5 - 2.054230, 2.5 + 2.054230), abs=1e-5)
    assert (mean_of([7]).low, mean_of([7]).high) == (None, None)


@pytest.mark.parametrize(("degrees", "quantile"), [(11, 2.2010), (30, 2.0423), (120, 1.9799)])
def test_quantiles_of_student(degrees: int, quantile: float) -> None:
    assert _t_95(degrees) == pytest.approx(quantile, abs=2e-4)


def test_ratio_of_sums() -> None:
    """Losses 2, 1, 9 over 1, 1, 2 tokens: 3. Residuals -1, -2, 3, so squares 14; error
    sqrt(14 / 6) / (4 / 3) = 1.145644, 2 degrees of freedom: 4.3027."""
    found = ratio_of([2, 1, 9], [1, 1, 2])
    assert found.value == 3
    assert found.high == pytest.approx(3 + 4.3027 * 1.145644, abs=1e-4)
    assert ratio_of([1, 2, 3], [2, 4, 6]).low == 0.5  # the same everywhere: no spread


def test_nothing_to_measure() -> None:
    for measure in (rate_of, share_of, mean_of):
        with pytest.raises(ValueError, match="no answers"):
            measure([])


def test_repetition() -> None:
    """Pairs of "a b a b a b": ab, ba, ab, ba, ab, of which 3 of 5 came before."""
    assert repetition(["a", "b", "a", "b", "a", "b"], n=2) == pytest.approx(0.6)
    assert repetition(["a", "b", "c"]) == 0
    assert repetition(["a", "b", "c", "d", "e", "f"]) == 0


def test_distinct() -> None:
    """Pairs over both texts: ab, bc, ab, bd; three are different."""
    assert distinct([["a", "b", "c"], ["a", "b", "d"]]) == 0.75
    assert distinct([["a"], []]) == 0
