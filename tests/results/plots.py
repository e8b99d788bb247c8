"""Line plots with intervals as SVG files, readable on light and dark pages."""

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

COLOURS = ("#0b68cb", "#d9480f", "#2b8a3e", "#862e9c", "#b08900", "#5c677d")
WIDTH, HEIGHT = 560, 320
LEFT, RIGHT, TOP, BOTTOM = 64, 544, 16, 264
TICKS = 5


@dataclass(frozen=True)
class Spot:
    """A value with the ends of its interval, where there is one."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Plot:
    """Some lines over one horizontal axis."""

    x_title: str
    y_title: str
    lines: Mapping[str, Sequence[Spot]]
    logarithmic: bool = False
    """Whether the horizontal axis is, its ticks at the values themselves."""

    def write(self, path: Path) -> None:
        """Draw into a file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.svg())

    def svg(self) -> str:
        """The picture."""
        spots = [spot for line in self.lines.values() for spot in line]
        assert spots, "there is nothing to draw"
        horizontal = _Axis.of([self._across(s.x) for s in spots], LEFT, RIGHT)
        ends = [e for s in spots for e in (s.y, s.low, s.high) if e is not None]
        vertical = _Axis.of(ends, BOTTOM, TOP)
        parts = [_frame(self.x_title, self.y_title)]
        parts += [_rule(vertical.place(value), value) for value in vertical.ticks()]
        if self.logarithmic:
            parts += [
                _x_label(horizontal.place(self._across(x)), x) for x in sorted({s.x for s in spots})
            ]
        else:
            parts += [_x_label(horizontal.place(x), x) for x in horizontal.ticks()]
        for number, (name, line) in enumerate(self.lines.items()):
            colour = COLOURS[number % len(COLOURS)]
            places = [
                (horizontal.place(self._across(s.x)), [vertical.place(v) for v in _values(s)])
                for s in line
            ]
            parts.append(_line(places, colour))
            parts.append(_legend(number, name, colour))
        height = HEIGHT + 16 * math.ceil(len(self.lines) / 2)
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
            f'width="{WIDTH}" height="{height}" font-family="sans-serif" font-size="12" '
            f'fill="#7a7f87">\n' + "\n".join(parts) + "\n</svg>\n"
        )

    def _across(self, x: float) -> float:
        return math.log2(x) if self.logarithmic else x


@dataclass(frozen=True)
class _Axis:
    low: float
    high: float
    start: float
    end: float

    @staticmethod
    def of(values: Sequence[float], start: float, end: float) -> "_Axis":
        low, high = min(values), max(values)
        room = 0.05 * (high - low) or 0.5
        return _Axis(low - room, high + room, start, end)

    def place(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Round values."""
        rough = (self.high - self.low) / TICKS
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough)
        first, last = math.ceil(self.low / step), math.floor(self.high / step)
        return [n * step for n in range(first, last + 1)]


def _values(spot: Spot) -> list[float]:
    return [value for value in (spot.y, spot.low, spot.high) if value is not None]


def _frame(x_title: str, y_title: str) -> str:
    middle = (TOP + BOTTOM) / 2
    return (
        f'<text x="{(LEFT + RIGHT) / 2}" y="{BOTTOM + 36}" text-anchor="middle">'
        f"{html.escape(x_title)}</text>"
        f'<text transform="translate(14 {middle}) rotate(-90)" text-anchor="middle">'
        f"{html.escape(y_title)}</text>"
    )


def _rule(y: float, value: float) -> str:
    return (
        f'<line x1="{LEFT}" x2="{RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#7a7f87" '
        f'stroke-opacity="0.25"/><text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">'
        f"{value:.4g}</text>"
    )


def _x_label(x: float, value: float) -> str:
    return f'<text x="{x:.1f}" y="{BOTTOM + 18}" text-anchor="middle">{value:.4g}</text>'


def _line(places: Sequence[tuple[float, Sequence[float]]], colour: str) -> str:
    points = " ".join(f"{x:.1f},{y[0]:.1f}" for x, y in places)
    marks = [f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.8"/>']
    for x, (y, *ends) in places:
        marks.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>')
        if len(ends) == 2:
            marks.append(
                f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{ends[0]:.1f}" y2="{ends[1]:.1f}" '
                f'stroke="{colour}" stroke-opacity="0.6"/>'
            )
    return "".join(marks)


def _legend(number: int, name: str, colour: str) -> str:
    x = LEFT + (number % 2) * (RIGHT - LEFT) / 2
    y = HEIGHT - 8 + 16 * (number // 2)
    return (
        f'<line x1="{x}" x2="{x + 20}" y1="{y - 4}" y2="{y - 4}" stroke="{colour}" '
        f'stroke-width="3"/><text x="{x + 26}" y="{y}">{html.escape(name)}</text>'
    )
