"""One experiment: what it measures for a seed, kept beside the runs, and how results of several
seeds are shown.

Intervals hold 95%. They are over the held-out items of all seeds together, each seed having a
world and models of its own: Wilson's for rates, Student's for other means, and of the differences
of pairs where the same items were measured twice.
"""

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.run_directory import write_atomically
from cluster.session import session
from llama2.evaluation import Measure, mean_of, rate_of, side_by_side
from tests.results import world
from tests.results.plots import Plot

Json = dict[str, Any]
Results = Mapping[int, Json]
"""What was measured, by seed."""


@dataclass(frozen=True)
class Shown:
    """A part of docs/results.md, and its plots by the names of their files."""

    text: str
    plots: Mapping[str, Plot] = field(default_factory=dict)


@dataclass(frozen=True)
class Experiment:
    """A measurement that is made once for each seed."""

    name: str
    measure: Callable[[Path, int], Json]
    """Of a folder of runs and a seed; its result goes into a file of the seed's folder."""
    show: Callable[[Results], Shown]

    def file(self, runs: Path, seed: int) -> Path:
        """Where a seed's results lie."""
        return world.folder(runs, seed) / f"results-{self.name}.json"

    def run(self, runs: Path, seeds: Sequence[int]) -> Results:
        """Measure what was not measured yet."""
        for seed in seeds:
            path = self.file(runs, seed)
            if not path.exists():
                with session(world.ONE_SESSION):
                    measured = self.measure(runs, seed)
                write_atomically(path, json.dumps(measured) + "\n")
        return {seed: json.loads(self.file(runs, seed).read_text()) for seed in seeds}


def command_line(description: str) -> argparse.ArgumentParser:
    """The options that all experiments have."""
    parser = argparse.ArgumentParser(description=description.partition("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=list(world.SEEDS))
    parser.add_argument("--runs", type=Path, default=Path("runs/results"))
    return parser


def main(experiment: Experiment, description: str | None) -> None:
    """Measure and print."""
    given = command_line(description or "").parse_args()
    print(experiment.show(experiment.run(given.runs, given.seeds)).text)


def table(rows: Sequence[Mapping[str, object]]) -> str:
    """Rows as a Markdown table, a column for every key."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [columns, ["---"] * len(columns)]
    lines += [[str(row.get(column, "")) for column in columns] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def percent(flags: Sequence[bool]) -> str:
    """A rate with its interval, as "61.2% (57.1 to 65.2)"."""
    if not flags:
        return "-"
    return _percent(rate_of(flags))


def percent_gain(before: Sequence[float], after: Sequence[float]) -> str:
    """The mean difference of paired values between 0 and 1, in points."""
    found = mean_of([b - a for a, b in zip(before, after, strict=True)])
    return f"{100 * found.value:+.1f} points{_ends(found, 100, 1)}"


def number(values: Sequence[float], digits: int = 3) -> str:
    """A mean with its interval."""
    found = mean_of(values)
    return f"{found.value:.{digits}f}{_ends(found, 1, digits)}"


def gain(before: Sequence[float], after: Sequence[float], digits: int = 3) -> str:
    """The mean difference of paired values."""
    found = mean_of([b - a for a, b in zip(before, after, strict=True)])
    return f"{found.value:+.{digits}f}{_ends(found, 1, digits)}"


def wins(before: Sequence[float], after: Sequence[float]) -> str:
    """How often the second of paired values is the higher one, a tie being half."""
    return _percent(side_by_side(after, before).rate)


def by_seed(values: Sequence[float], scale: float = 100, digits: int = 1) -> str:
    """Each seed's own value."""
    return ", ".join(f"{scale * value:.{digits}f}" for value in values)


def _percent(found: Measure) -> str:
    return f"{100 * found.value:.1f}%{_ends(found, 100, 1)}"


def _ends(found: Measure, scale: float, digits: int) -> str:
    if found.low is None or found.high is None:
        return ""
    return f" ({scale * found.low:.{digits}f} to {scale * found.high:.{digits}f})"
