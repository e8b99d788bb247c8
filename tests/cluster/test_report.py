"""The report: numbers read back out of its plots and tables, and texts that stay texts."""

import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from cluster.report import (
    BOTTOM,
    LEFT,
    POINTS_DRAWN,
    RIGHT,
    TOP,
    html_table,
    line_plot,
    write_report,
)
from cluster.run_directory import RunDirectory, append_json


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    directory = RunDirectory(tmp_path, "demo")
    directory.open({"seed": 7, "note": "<b>bold</b>"})
    return directory


def _polylines(figure: str) -> list[list[tuple[float, float]]]:
    lines = []
    for points in re.findall(r'<polyline[^>]* points="([^"]*)"', figure):
        pairs = [point.split(",") for point in points.split()]
        lines.append([(float(x), float(y)) for x, y in pairs])
    return lines


def _labels(figure: str) -> list[str]:
    return re.findall(r"<text[^>]*>([^<]*)</text>", figure)


class _Page(HTMLParser):
    """Checks that tags nest, and collects tags, headings, table cells and attribute values."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.addresses: list[str] = []
        self.cells: list[str] = []
        self.headings: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.addresses += [str(v) for k, v in attrs if k in ("src", "href", "action", "data")]
        if tag != "meta":
            self.open.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")
        if tag == "h2":
            self.headings.append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if {"td", "th"} & set(self.open):
            self.cells[-1] += data
        if "h2" in self.open:
            self.headings[-1] += data


def test_a_plot_places_every_point_on_the_scale_of_its_labels() -> None:
    points = [(0, 4.0), (10, 1.0), (20, 2.5), (30, 2.0)]
    figure = line_plot("loss", points, (0, 40))
    (line,) = _polylines(figure)
    expected = [
        (LEFT + (RIGHT - LEFT) * step / 40, BOTTOM - (BOTTOM - TOP) * (value - 1.0) / 3.0)
        for step, value in points
    ]
    assert line == [pytest.approx(place, abs=0.051) for place in expected]
    assert sorted(_labels(figure)) == ["0", "1", "4", "40"]
    assert "last 2<" in figure
    assert figure.count("<circle") == 4


def test_values_that_are_not_finite_break_the_line_and_are_counted() -> None:
    values = [3.0, 2.0, math.nan, 1.0, math.inf, 2.0, 2.5, 3.0]
    figure = line_plot("loss", list(enumerate(values)), (0, 7))
    assert [len(line) for line in _polylines(figure)] == [2, 3]
    assert figure.count("<circle") == 6, "the lone point between two breaks is marked too"
    assert "2 of 8 not finite" in figure
    assert "nan" not in figure.lower()


def test_a_metric_never_finite_or_constant_still_has_a_plot() -> None:
    figure = line_plot("kl", [(0, math.nan), (1, math.nan)], (0, 1))
    assert "2 of 2 not finite" in figure
    assert _polylines(figure) == []
    (line,) = _polylines(line_plot("lr", [(0, 0.5), (1, 0.5)], (0, 1)))
    assert {y for _, y in line} == {(TOP + BOTTOM) / 2}
    assert line_plot("one", [(5, 0.5)], (5, 5)).count("<circle") == 1


def test_many_points_are_thinned_to_their_extremes() -> None:
    points = [(step, math.sin(step / 900)) for step in range(20_000)]
    points[12_345] = (12_345, 50.0)
    points[777] = (777, -30.0)
    (line,) = _polylines(line_plot("loss", points, (0, 19_999)))
    assert POINTS_DRAWN // 2 <= len(line) <= POINTS_DRAWN + 2
    assert min(y for _, y in line) == TOP, "the upward spike is drawn"
    assert max(y for _, y in line) == BOTTOM, "the downward spike is drawn"
    assert line[0][0] == LEFT
    assert line[-1][0] == RIGHT
    assert [x for x, _ in line] == sorted(x for x, _ in line)


def test_texts_stay_texts_wherever_they_come_from(run: RunDirectory) -> None:
    attack = '<script>alert("x")</script>'
    append_json(run.metrics, {"step": 0, "loss": 1.0, attack: 2.0})
    append_json(run.samples, {"step": 0, "prompt": attack, attack: "</div></td>&amp;"})
    write_report(run, f"Title {attack}", {attack: [{attack: attack, "list": [attack]}]}, attack)
    text = run.report.read_text("utf-8")
    page = _Page(text)
    assert "script" not in page.tags
    assert attack not in text
    assert page.addresses == [], "nothing is fetched"
    assert page.cells.count(attack) == 4, "a heading and a cell in each of two tables"
    assert "</div></td>&amp;" in page.cells
    assert "<b>bold</b>" not in text.split("<pre>")[1]


def test_the_page_groups_metrics_and_shows_those_of_some_steps_only(run: RunDirectory) -> None:
    for step in range(100):
        line = {"loss": 3.0 - step / 50, "ppo/kl": step / 100, "ppo/clip_fraction": 0.1}
        append_json(
            run.metrics, {"step": step, **line, **({"eval/gold": 0.5} if step == 50 else {})}
        )
    run.finish({"held_out": [{"metric": "gold", "before": 0.41237, "after": 0.6}], "seconds": 12})
    write_report(run, "Demo")
    text = run.report.read_text("utf-8")
    page = _Page(text)
    assert page.headings == [
        "Held out",
        "Summary",
        "Metrics: training",
        "Metrics: ppo",
        "Metrics: eval",
        "Config",
    ]
    assert page.cells[:6] == ["metric", "before", "after", "gold", "0.4124", "0.6"]
    assert page.cells[6:] == ["result", "value", "seconds", "12"]
    figures = re.findall(r"<figure>.*?</figure>", text, flags=re.DOTALL)
    assert [sum(map(len, _polylines(figure))) for figure in figures] == [100, 100, 100, 0]
    assert figures[3].count("<circle") == 1
    assert f'cx="{LEFT + (RIGHT - LEFT) * 50 / 99:.1f}"' in figures[3], "on the axis of all steps"
    assert "100 steps, finished" in text
    assert "seed: 7" in text


def test_only_the_last_samples_are_shown_and_an_empty_run_has_a_page(run: RunDirectory) -> None:
    write_report(run, "Nothing yet")
    assert "no steps yet, not finished" in run.report.read_text("utf-8")
    for step in range(30):
        append_json(run.samples, {"step": step, "before": f"old {step}", "after": f"new {step}"})
    write_report(run, "Samples")
    cells = _Page(run.report.read_text("utf-8")).cells
    assert cells[:6] == ["step", "before", "after", "18", "old 18", "new 18"]
    assert cells[-3:] == ["29", "old 29", "new 29"]


def test_rows_may_differ_in_their_columns() -> None:
    cells = _Page(html_table([{"a": 1, "b": True}, {"b": None, "c": "x"}])).cells
    assert cells == ["a", "b", "c", "1", "true", "—", "—", "—", "x"]
