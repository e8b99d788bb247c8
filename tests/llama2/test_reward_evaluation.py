"""The report on a reward model, against numbers worked out by hand."""

import json
import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama2.reward_evaluation import (
    ScoredPair,
    calibration,
    calibration_error,
    correlation,
    headline,
    length_bias,
    quantile,
    report,
    sigmoid,
    unsafe_answers,
)

A = ScoredPair("safety/mine", 2.0, -1.0, "significantly better", "chosen_safe", 30, 10)
PAIRS = [
    A,
    replace(A, chosen=1.0, rejected=1.5, rating="better", safety="both_safe", chosen_tokens=5),
    replace(A, chosen=-0.5, rejected=-0.5, rating="better", safety="both_unsafe"),
    replace(A, data="helpfulness/open", chosen=0.5, rejected=-2.5, rating=None, safety=None),
]


def test_accuracies_by_rating_data_set_and_safety() -> None:
    tables = report(PAIRS)
    whole = tables["accuracy"][0]
    # Right, wrong, a tie, right.
    assert (whole["accuracy"], whole["pairs"]) == (2.5 / 4, 4)
    assert whole["score gap"] == pytest.approx((3 - 0.5 + 0 + 3) / 4)
    # Sample variance of (1, 0, 1/2, 1) over 4.
    assert whole["error"] == pytest.approx(math.sqrt((0.140625 * 2 + 0.390625 + 0.015625) / 3 / 4))
    rows = {
        row["pairs of"]: (row["accuracy"], row["pairs"]) for row in tables["accuracy_by_rating"]
    }
    assert rows == {"significantly better": (1.0, 1), "better": (0.25, 2)}
    rows = {
        row["pairs of"]: (row["accuracy"], row["pairs"]) for row in tables["accuracy_by_data_set"]
    }
    assert rows == {"safety/mine": (0.5, 3), "helpfulness/open": (1.0, 1)}
    rows = {row["pairs of"]: row["accuracy"] for row in tables["accuracy_by_safety"]}
    assert rows == {"chosen_safe": 1.0, "both_safe": 0.0, "both_unsafe": 0.5}
    both = tables["accuracy_by_data_set_and_rating"]
    assert [(row["data set"], row["pairs of"], row["accuracy"]) for row in both] == [
        ("safety/mine", "significantly better", 1.0),
        ("safety/mine", "better", 0.25),
    ]
    # A single pair has no spread; JSON knows no infinity.
    assert tables["accuracy_by_rating"][0]["error"] is None
    json.dumps(tables, allow_nan=False)


def test_unsafe_recall_at_one_half() -> None:
    # Safe: 2, 1, 1.5. Unsafe: -1, -0.5, -0.5. All unsafe ones lie below 0, no safe one does.
    assert unsafe_answers(PAIRS) == [
        {"unsafe recall": 1.0, "unsafe precision": 1.0, "safe recall": 1.0, "unsafe": 3, "safe": 3}
    ]
    # Now one unsafe answer is taken for safe, and a safe one for unsafe.
    shifted = [replace(A, chosen=-0.1), replace(A, rejected=0.1), *PAIRS[2:]]
    (row,) = unsafe_answers(shifted)
    assert row["unsafe recall"] == 3 / 4
    assert row["unsafe precision"] == 3 / 4
    assert row["safe recall"] == 1 / 2
    assert unsafe_answers([PAIRS[3]]) == []
    # Exactly 0.5 is not below it.
    assert unsafe_answers([replace(A, rejected=0.0)])[0]["unsafe recall"] == 0.0


def test_calibration_bins() -> None:
    claims = [(0.52, 1.0), (0.58, 0.0), (0.95, 1.0), (1.0, 1.0)]
    curve = calibration(claims)
    assert [(row["from"], row["count"], row["observed"]) for row in curve] == [
        (0.5, 2, 0.5),
        (0.9, 2, 1.0),
    ]
    assert curve[0]["predicted"] == pytest.approx(0.55)
    assert calibration_error(curve) == pytest.approx((2 * 0.05 + 2 * 0.025) / 4)


def test_preferences_are_calibrated_by_the_gap_alone() -> None:
    """A model that is three times as sure as it may be is found out."""
    gap = math.log(3)  # sigmoid(gap) = 3/4
    good = [replace(A, chosen=gap, rejected=0.0)] * 3 + [replace(A, chosen=0.0, rejected=gap)]
    assert headline(report(good))["heldout/calibration_error"] == pytest.approx(0, abs=1e-12)
    sure = [replace(p, chosen=3 * p.chosen, rejected=3 * p.rejected) for p in good]
    found = headline(report(sure))["heldout/calibration_error"]
    assert found == pytest.approx(27 / 28 - 3 / 4)


def test_length_bias() -> None:
    rows = {row["measure"]: row["value"] for row in length_bias(PAIRS)}
    # Chosen is longer in pairs 0, 2, 3; the longer answer scores higher in 0, 1, 3, and ties in 2.
    assert rows["the longer answer is the chosen one"] == 3 / 4
    assert rows["the longer answer scores higher"] == 3.5 / 4
    assert rows["accuracy where the chosen answer is longer"] == pytest.approx(2.5 / 3)
    assert rows["accuracy where the chosen answer is shorter"] == 0.0
    assert rows["accuracy of the better of longer and shorter"] == 3 / 4
    even = length_bias([replace(A, chosen_tokens=10)])
    assert {row["value"] for row in even} == {None}
    by_length = [replace(A, chosen=n / 2, rejected=m / 2, chosen_tokens=n, rejected_tokens=m)
                 for n, m in ((3, 7), (9, 1), (4, 2))]  # fmt: skip
    assert length_bias(by_length)[0]["value"] == pytest.approx(1.0)


def test_distributions() -> None:
    rows = {row["answers"]: row for row in report(PAIRS)["score_distributions"]}
    assert {name: row["count"] for name, row in rows.items()} == {
        "chosen": 4, "rejected": 4, "safe": 3, "unsafe": 3,
    }  # fmt: skip
    assert rows["chosen"]["mean"] == pytest.approx(0.75)
    assert rows["chosen"]["50%"] == pytest.approx(0.75)
    assert rows["unsafe"]["25%"] == pytest.approx(-0.75)


def test_what_cannot_be_reported() -> None:
    with pytest.raises(ValueError, match="no held-out comparison"):
        report([])
    with pytest.raises(ValueError, match="held-out pair 1 of safety/mine as nan and -1"):
        report([A, replace(A, chosen=math.nan)])


def test_without_labels_the_rest_stands() -> None:
    plain = [replace(pair, rating=None, safety=None) for pair in PAIRS]
    tables = report(plain)
    assert not tables["unsafe_answers_at_0.5"] and not tables["accuracy_by_rating"]
    assert headline(tables)["heldout/accuracy"] == 2.5 / 4


SCORES = st.floats(-20, 20)


@given(st.lists(st.tuples(SCORES, SCORES), min_size=1, max_size=20))
def test_a_shift_of_all_scores_changes_no_preference(scores: list[tuple[float, float]]) -> None:
    pairs = [replace(A, chosen=round(c, 3), rejected=round(r, 3)) for c, r in scores]
    moved = [replace(p, chosen=p.chosen + 8, rejected=p.rejected + 8) for p in pairs]
    one, two = report(pairs), report(moved)
    assert one["accuracy"][0]["accuracy"] == two["accuracy"][0]["accuracy"]
    # Swapping the answers of every pair turns right into wrong.
    swapped = [replace(p, chosen=p.rejected, rejected=p.chosen) for p in pairs]
    turned = report(swapped)["accuracy"][0]["accuracy"]
    assert turned == pytest.approx(1 - one["accuracy"][0]["accuracy"])


def test_small_functions() -> None:
    assert sigmoid(0.0) == 0.5
    assert sigmoid(-800.0) == 0.0 and sigmoid(800.0) == 1.0
    assert sigmoid(2.0) + sigmoid(-2.0) == pytest.approx(1.0)
    assert quantile([4.0, 1.0, 2.0], 0.25) == 1.5
    assert quantile([7.0], 0.95) == 7.0
    assert correlation([1, 2, 3], [6, 4, 2]) == pytest.approx(-1.0)
    assert correlation([1, 2, 3, 4], [1, 3, 2, 4]) == pytest.approx(0.8)
    assert correlation([1, 1], [1, 2]) is None
