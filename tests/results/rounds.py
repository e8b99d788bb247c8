"""The base model, SFT, and the versions V1 to V5 of jobs/rlhf.py, by the gold judge.

python -m tests.results.rounds --seeds 0 1 2 --runs FOLDER

Each seed is a whole `make rlhf ARGS="--seed N"`: data, models and samples of its own, in the one
world that command has.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from cluster.run_directory import RunDirectory
from jobs import rlhf
from jobs.presets import Preset, tiny
from jobs.rlhf_config import RlhfConfig
from llama2.evaluation import mean_of, side_by_side
from tests.results import world
from tests.results.experiment import (
    Experiment,
    Json,
    Results,
    Shown,
    by_seed,
    gain,
    main,
    number,
    percent,
    table,
    wins,
)
from tests.results.plots import Plot, Spot

PROMPTS = 1024
WORLD = tiny().prepare.world_seed


def folder(runs: Path, seed: int) -> Path:
    """The runs of one call of the loop, beside a seed's other experiments."""
    return (world.folder(runs, seed) / "rounds").resolve()


def started(runs: Path, seed: int) -> Preset:
    """The preset, for evaluations beside the loop."""
    root, preset = folder(runs, seed), tiny()
    return replace(preset, ppo=replace(preset.ppo, runs=root, seed=seed))


def measure(runs: Path, seed: int) -> Json:
    """Verdicts of the gold judge on each version's answers, and of the base model's beside SFT's,
    each in an evaluation of its own."""
    root = folder(runs, seed)
    loop = RunDirectory(root, "tiny-rlhf")
    rlhf.main(replace(RlhfConfig.of(tiny()), runs=root, seed=seed))
    summary = loop.summary()
    assert summary is not None, "the loop has finished"
    evaluation = RunDirectory(loop.path, "evaluation")
    first = world.evaluated(
        started(runs, seed), "sft-evaluation",
        [RunDirectory(root, "tiny-pretrain"), RunDirectory(root, "tiny-sft")],
        most_prompts=PROMPTS, conversations=0,
    )  # fmt: skip
    return {
        "base": world.verdicts(first, "tiny-pretrain", WORLD),
        "SFT beside base": world.verdicts(first, "tiny-sft", WORLD),
        "versions": {
            row[""]: world.verdicts(evaluation, row["run"], WORLD) for row in summary[rlhf.TABLE]
        },
        "chosen": summary["best"],
        "seconds": summary["seconds in all"],
    }


def gold(results: Results, version: str) -> list[float]:
    """Gold scores of a version's answers over all seeds."""
    return [one["gold"] for found in results.values() for one in found["versions"][version]]


def show(results: Results) -> Shown:
    """A table of versions, and a plot of their gold score."""
    names = list(next(iter(results.values()))["versions"])
    base, beside = (
        [one["gold"] for found in results.values() for one in found[key]]
        for key in ("base", "SFT beside base")
    )
    rows = [{"version": "base", "gold score": number(base)}]
    alone = [{seed: found} for seed, found in results.items()]
    before: dict[str, Sequence[float]] = {}
    for place, name in enumerate(names):
        values = gold(results, name)
        row = {"version": name, "gold score": number(values)}
        row["by seed"] = by_seed([mean_of(gold(one, name)).value for one in alone], 1, 3)
        if place == 0:
            row["win rate against base"] = wins(base, beside)
        else:
            row["win rate against SFT"] = wins(before[names[0]], values)
            row["win rate by seed, %"] = by_seed(
                [side_by_side(gold(one, name), gold(one, names[0])).rate.value for one in alone]
            )
            row["gold score, change from the version before"] = gain(
                before[names[place - 1]], values
            )
        row["violations"] = percent(verdicts(results, name, "violation", adversarial=True))
        row["false refusals"] = percent(verdicts(results, name, "refusal", adversarial=False))
        before[name] = values
        rows.append(row)
    scores = [Spot(place, *_ends(gold(results, name))) for place, name in enumerate(names)]
    minutes = by_seed([found["seconds"] for found in results.values()], 1 / 60, 0)
    note = f"Wins are by gold score, a tie is half. The rounds took {minutes} minutes."
    axis = "version, 0 being SFT"
    return Shown(
        f"{note}\n\n{table(rows)}", {"rounds.svg": Plot(axis, "gold score", {"gold score": scores})}
    )


def verdicts(results: Results, version: str, verdict: str, adversarial: bool) -> list[bool]:
    """Verdicts on a version's answers to adversarial prompts, or to all others."""
    return [
        one[verdict]
        for found in results.values()
        for one in found["versions"][version]
        if (one["kind"] == "unsafe") is adversarial
    ]


def _ends(values: Sequence[float]) -> tuple[float, float | None, float | None]:
    found = mean_of(values)
    return found.value, found.low, found.high


EXPERIMENT = Experiment("rounds", measure, show)

if __name__ == "__main__":
    main(EXPERIMENT, __doc__)
