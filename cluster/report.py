"""One page about a run, readable offline: results, sample answers, plots of metrics, config.

It is HTML with inline styles and SVG, without scripts, and follows the reader's light or dark mode.
"""

import html
import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from cluster.run_directory import Json, RunDirectory, read_json_lines, write_atomically
from cluster.tracking import format_number

Rows = Sequence[Mapping[str, Any]]
Points = list[tuple[int, float]]

SAMPLES_SHOWN = 12
POINTS_DRAWN = 600
"""More points than this are thinned to their extremes: the page stays small, spikes stay seen."""
POINTS_DOTTED = 40
"""Up to this many points are marked one by one, since evaluations are few and far between."""

LEFT, RIGHT, TOP, BOTTOM = 48, 312, 8, 92  # the plotting area, in a picture of 320 x 112

STYLE = """
:root { color-scheme: light dark; --ink: #1c2024; --dim: #60646c; --rule: #d9dce1; --page: #fcfcfd;
  --line: #0b68cb; --bad: #c62a2f; }
@media (prefers-color-scheme: dark) { :root { --ink: #edeef0; --dim: #a0a4ab; --rule: #363a3f;
  --page: #111113; --line: #70b8ff; --bad: #ff9592; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page);
  max-width: 1080px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: 0; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
p, figcaption, .axis { color: var(--dim); }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(300px, 1fr)); gap: 1rem; }
figure { margin: 0; } figcaption { font-size: .85rem; display: flex; gap: .8em; }
figcaption b { color: var(--ink); font-weight: 600; } .bad { color: var(--bad); }
svg { width: 100%; height: auto; display: block; } .axis { fill: currentColor; font-size: 10px; }
.grid { stroke: var(--rule); } .line { fill: none; stroke: var(--line); stroke-width: 1.5; }
.dot { fill: var(--line); } .wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; } th { text-align: left; font-weight: 600; }
th, td { border-bottom: 1px solid var(--rule); padding: .4rem .8rem .4rem 0; vertical-align: top; }
td.number { font-variant-numeric: tabular-nums; white-space: nowrap; }
td div { white-space: pre-wrap; overflow-wrap: anywhere; max-height: 16rem; overflow-y: auto; }
pre { overflow-x: auto; font-size: .85rem; } summary { cursor: pointer; font-weight: 600; }
"""


def write_report(
    run: RunDirectory, title: str, tables: Mapping[str, Rows] | None = None, note: str = ""
) -> None:
    """Write `run.report` from the run's metrics, samples and config as they stand, finished or not.

    `tables` maps headings to rows (results before and after, say), a row mapping columns to texts
    or numbers; without it the lists of rows in the run's summary are taken, and its single values
    as one more table. `note` is a paragraph under the title. Metrics may be absent from steps and
    need not be finite. Raises `ValueError` as `read_json_lines` does.
    """
    metrics = read_json_lines(run.metrics) if run.metrics.exists() else []
    samples = read_json_lines(run.samples)[-SAMPLES_SHOWN:] if run.samples.exists() else []
    if tables is None:
        tables = _tables_of(run.summary() or {})
    state = "finished" if run.is_finished else "not finished"
    steps = f"{metrics[-1]['step'] + 1} steps" if metrics else "no steps yet"
    parts = [f"<h1>{_escaped(title)}</h1>", f"<p>Run {_escaped(run.name)}: {steps}, {state}.</p>"]
    if note:
        parts.append(f"<p>{_escaped(note)}</p>")
    parts += [_section(heading, html_table(rows)) for heading, rows in tables.items() if rows]
    if samples:
        parts.append(_section("Samples", html_table(samples)))
    parts += [_section(f"Metrics: {group}", plots) for group, plots in _plots(metrics).items()]
    if run.config.exists():
        config = _escaped(run.config.read_text("utf-8"))
        parts.append(
            f"<h2>Config</h2><details><summary>config.yaml</summary><pre>{config}</pre></details>"
        )
    write_atomically(run.report, _page(title, "\n".join(parts)))


def line_plot(name: str, points: Points, steps: tuple[int, int]) -> str:
    """A small plot of (step, value) points as an HTML figure with inline SVG.

    `steps` is the range of the horizontal axis; the vertical one spans the finite values. Values
    that are not finite break the line and are counted in the caption.
    """
    finite = [value for _, value in points if math.isfinite(value)]
    bad = len(points) - len(finite)
    caption = f"<b>{_escaped(name)}</b> <span>last {format_number(points[-1][1])}</span>"
    if bad:
        caption += f' <span class="bad">{bad} of {len(points)} not finite</span>'
    low, high = (min(finite), max(finite)) if finite else (0.0, 0.0)
    first, last = steps

    def place(step: int, value: float) -> str:
        # A constant is drawn half-way up; a run of one step is drawn at the left.
        height = (value - low) / (high - low) if high > low else 0.5
        x = LEFT + (RIGHT - LEFT) * (step - first) / max(last - first, 1)
        return f"{x:.1f},{BOTTOM - (BOTTOM - TOP) * height:.1f}"

    marks = []
    for segment in _segments(points):
        thinned = _thinned(segment, POINTS_DRAWN * len(segment) // len(points))
        places = [place(*point) for point in thinned]
        if len(places) > 1:
            marks.append(f'<polyline class="line" points="{" ".join(places)}"/>')
        if len(finite) <= POINTS_DOTTED or len(places) == 1:
            for x, y in (at.split(",") for at in places):
                marks.append(f'<circle class="dot" cx="{x}" cy="{y}" r="2.2"/>')
    heights = {BOTTOM: low, TOP: high} if high > low else {(TOP + BOTTOM) / 2: low}
    for height, value in heights.items() if finite else ():
        grid = f'<line class="grid" x1="{LEFT}" x2="{RIGHT}" y1="{height}" y2="{height}"/>'
        marks.insert(0, grid)
        marks.append(_axis_label(LEFT - 4, height + 3, "end", format_number(value)))
    marks.append(_axis_label(LEFT, BOTTOM + 15, "start", str(first)))
    if last > first:
        marks.append(_axis_label(RIGHT, BOTTOM + 15, "end", str(last)))
    opening = f'<svg viewBox="0 0 320 112" role="img" aria-label="{_escaped(name)}">'
    picture = f"{opening}{''.join(marks)}</svg>"
    return f"<figure><figcaption>{caption}</figcaption>{picture}</figure>"


def html_table(rows: Rows) -> str:
    """An HTML table of the rows; a column for every key, in the order of first appearance."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    head = "".join(f"<th>{_escaped(column)}</th>" for column in columns)
    body = "".join(
        f"<tr>{''.join(_cell(row.get(column)) for column in columns)}</tr>" for row in rows
    )
    return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'


def _cell(value: Any) -> str:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return f'<td class="number">{format_number(value)}</td>'
    if value is None:
        return "<td>—</td>"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return f"<td><div>{_escaped(text)}</div></td>"


def _plots(metrics: list[Json]) -> dict[str, str]:
    """Plots of all metrics by the part of their names before "/"; names without one are of
    training."""
    series: dict[str, Points] = defaultdict(list)
    for line in metrics:
        for name, value in line.items():
            if name != "step" and isinstance(value, int | float):
                series[name].append((line["step"], float(value)))
    if not series:
        return {}
    steps = (metrics[0]["step"], metrics[-1]["step"])
    groups: dict[str, list[str]] = defaultdict(list)
    for name, points in series.items():
        group = name.split("/")[0] if "/" in name else "training"
        groups[group].append(line_plot(name, points, steps))
    return {name: f'<div class="plots">{"".join(plots)}</div>' for name, plots in groups.items()}


def _segments(points: Points) -> list[Points]:
    segments: list[Points] = [[]]
    for step, value in points:
        if math.isfinite(value):
            segments[-1].append((step, value))
        else:
            segments.append([])
    return [segment for segment in segments if segment]


def _thinned(points: Points, limit: int) -> Points:
    if len(points) <= max(limit, 2):
        return points
    kept = {0, len(points) - 1}
    buckets = max(limit // 2, 1)
    for bucket in range(buckets):
        indices = range(bucket * len(points) // buckets, (bucket + 1) * len(points) // buckets)
        kept |= {min(indices, key=lambda i: points[i][1]), max(indices, key=lambda i: points[i][1])}
    return [points[index] for index in sorted(kept)]


def _tables_of(summary: Json) -> dict[str, Rows]:
    tables: dict[str, Rows] = {
        name: value
        for name, value in summary.items()
        if isinstance(value, list) and all(isinstance(row, dict) for row in value)
    }
    single = [{"result": k, "value": v} for k, v in summary.items() if k not in tables]
    return {**tables, "Summary": single}


def _section(heading: str, content: str) -> str:
    words = heading.replace("_", " ")
    return f"<h2>{_escaped(words[:1].upper() + words[1:])}</h2>\n{content}"


def _axis_label(x: float, y: float, anchor: str, text: str) -> str:
    return f'<text class="axis" x="{x}" y="{y}" text-anchor="{anchor}">{text}</text>'


def _escaped(text: str) -> str:
    return html.escape(str(text))


def _page(title: str, body: str) -> str:
    # Should a text ever slip through unescaped, the policy keeps a browser from running or fetching
    # it.
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    return (
        '<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_escaped(title)}</title><style>{STYLE}</style></head>\n"
        f"<body>\n{body}\n</body>\n</html>\n"
    )
