"""How results become tables and plots."""

import re
from itertools import combinations
from pathlib import Path
from statistics import fmean
from xml.dom import minidom

import pytest

from tests.results import reward_models, sampling
from tests.results.all import BEGIN, END, write
from tests.results.experiment import Json, Shown, percent_gain, wins
from tests.results.plots import Plot, Spot


def test_best_is_the_mean_over_all_choices() -> None:
    keys, values = [0.3, -1.0, 2.0, 0.7, 0.1], [5.0, 1.0, 0.0, 4.0, 2.0]
    for size in (1, 2, 3, 5):
        choices = list(combinations(range(5), size))
        by_hand = fmean(values[max(one, key=lambda i: keys[i])] for one in choices)
        assert sampling.best(keys, values, size) == pytest.approx(by_hand)


def test_reward_tables_read_scores_by_pair_and_label() -> None:
    """Labels: 0 chosen_safe, 1 both_safe, 2 both_unsafe, as `SAFETY_LABELS` orders them."""
    labels = [reward_models.SAFETY_LABELS.index(name) for name in ("chosen_safe", "both_unsafe")]
    found: Json = {
        "pairs": {"safety": [[3, labels[0]], [0, labels[1]]]},
        "scores": {"m": {"safety": [2.0, -1.0, -0.5, 0.5]}},
    }
    assert reward_models.right(found, "m", "safety") == [True, False]
    assert reward_models.right(found, "m", "safety", 3) == [True]
    unsafe, safe = reward_models.called_unsafe(found, "m")
    assert unsafe == [True, True, False] and safe == [False]


def test_paired_numbers() -> None:
    assert percent_gain([0, 1, 0, 1], [1, 1, 1, 0]).startswith("+25.0 points")
    assert wins([0.2, 0.5, 0.5, 0.9], [0.4, 0.5, 0.6, 0.1]).startswith("62.5%")


def test_the_page_keeps_what_is_outside_the_markers(tmp_path: Path) -> None:
    page = tmp_path / "results.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    plot = Plot("S", "reward", {"best & worst": [Spot(1, 0.5), Spot(8, 0.9, 0.8, 1.0)]}, True)
    for _ in range(2):
        write({"Title": Shown("the table", {"a.svg": plot})}, page)
    text = page.read_text()
    assert text.startswith(f"before\n{BEGIN}") and text.endswith(f"{END}\nafter\n")
    assert text.count("the table") == 1 and "old" not in text
    minidom.parse(str(tmp_path / "results" / "a.svg"))
    page.write_text("no markers")
    with pytest.raises(ValueError, match=re.escape(str(page))):
        write({}, page)


def test_a_plot_puts_values_where_they_belong() -> None:
    picture = Plot("x", "y", {"line": [Spot(0, 0.0), Spot(1, 1.0), Spot(2, 0.5)]}).svg()
    points = re.search(r'points="([^"]+)"', picture)
    assert points is not None
    (x0, y0), (x1, y1), (x2, y2) = (map(float, p.split(",")) for p in points[1].split())
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2)
    assert y2 == pytest.approx((y0 + y1) / 2, abs=0.2) and y1 < y0
