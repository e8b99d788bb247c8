"""Rejection sampling: reward and gold score of the best of S answers, and of what it selects by.

python -m tests.results.sampling --seeds 0 1 2 --runs FOLDER

Held-out prompts are answered, by the SFT model. Besides the paper's composite reward, answers are
selected by the plain sum of both rewards and by helpfulness alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path

from actors.sampling import read_chunks
from cluster.run_directory import RunDirectory
from jobs import rejection_sampling
from jobs.presets import tiny
from jobs.rejection_sampling_config import RejectionSamplingConfig
from llama2.evaluation import mean_of
from llama2.rejection_sampling import Candidates, expected_median, rank_chances
from llama2.sources import world_of
from llama2.world import judge
from tests.results import world
from tests.results.experiment import (
    Experiment,
    Json,
    Results,
    Shown,
    gain,
    main,
    number,
    table,
)
from tests.results.plots import Plot, Spot

SIZES = (1, 2, 4, 8, 16, 32)
GATE_SIZE = 8
PROMPTS = 700


def measure(runs: Path, seed: int) -> Json:
    """Of each answer its rewards and what the gold judge says of it; of each prompt its tag and
    kind."""
    world.base(runs, seed)
    root = world.folder(runs, seed)
    run = RunDirectory(root, "sampling")
    rejection_sampling.main(
        replace(
            RejectionSamplingConfig.of(tiny()), name=run.name, runs=root, seed=seed,
            prompts=(root / "tiny-data" / "prompts" / "heldout.jsonl",), num_prompts=PROMPTS,
            samples=SIZES[-1], temperatures=(1.0,),
        )
    )  # fmt: skip
    found: Json = {"prompts": []}
    for one in map(Candidates.from_json, read_chunks(run.path / "samples")):
        system = next((m.content for m in one.messages if m.role == "system"), None)
        known = world_of(seed).find(system, one.messages[-1].content)
        assert known is not None, "the prompts are those of this world"
        verdicts = [judge(known, sample.response) for sample in one.samples]
        found["prompts"].append(
            {
                "safety": known.safety,
                "kind": known.kind,
                "reward": [sample.reward for sample in one.samples],
                "helpfulness": [sample.helpfulness for sample in one.samples],
                "sum": [sample.helpfulness + sample.safety for sample in one.samples],
                "gold": [verdict.score for verdict in verdicts],
                "violation": [verdict.violation for verdict in verdicts],
                "refusal": [verdict.refusal for verdict in verdicts],
            }
        )
    return found


def best(keys: Sequence[float], values: Sequence[float], size: int) -> float:
    """The mean, over all choices of `size` of the answers, of the value of the one with the highest
    key."""
    order = sorted(range(len(keys)), key=lambda i: keys[i])
    chances = rank_chances(len(keys), size, size)
    return sum(chance * values[i] for i, chance in zip(order, chances, strict=True))


def show(results: Results) -> Shown:
    """A table over S with its plots, and one of what answers are selected by."""
    prompts = list(chain.from_iterable(found["prompts"] for found in results.values()))
    measures: dict[str, Callable[[Json, int], float]] = {
        "reward of the best": lambda p, size: best(p["reward"], p["reward"], size),
        "median reward": lambda p, size: expected_median(p["reward"], size),
        "gold score of the best": lambda p, size: best(p["reward"], p["gold"], size),
        "gold score, had gold selected": lambda p, size: best(p["gold"], p["gold"], size),
    }
    rows, lines = [], {name: [] for name in measures}  # type: ignore[var-annotated]
    before: dict[str, list[float]] = {}
    for size in SIZES:
        row = {"S": str(size)}
        for name, measured in measures.items():
            values = [measured(prompt, size) for prompt in prompts]
            row[name] = number(values)
            if name in before and name in ("reward of the best", "gold score of the best"):
                row[f"{name}, rise"] = gain(before[name], values)
            before[name] = values
            found = mean_of(values)
            lines[name].append(Spot(size, found.value, found.low, found.high))
        rows.append(row)
    plots = {
        f"sampling_{file}.svg": Plot(
            "S, answers per prompt", file, {n: lines[n] for n in lines if file in n}, True
        )
        for file in ("reward", "gold")
    }
    text = (
        f"{len(prompts)} held-out prompts, {SIZES[-1]} answers each; rises are paired by prompt."
        "\n\n"
        f"{table(rows)}\n\n"
        f"Of {GATE_SIZE} answers, that with the highest composite reward (the safety gate), sum of "
        f"both rewards, or helpfulness reward alone; differences are to the composite, paired by "
        f"prompt:\n\n{table(_selections(prompts))}"
    )
    return Shown(text, plots)


def _selections(prompts: Sequence[Json]) -> list[dict[str, str]]:
    adversarial = [p for p in prompts if p["safety"]]
    borderline = [p for p in prompts if p["kind"] == "borderline"]

    def picked(asked: Sequence[Json], key: str, value: str) -> list[float]:
        return [best(p[key], p[value], GATE_SIZE) for p in asked]

    rows = []
    titles = {"reward": "composite (gate)", "sum": "sum", "helpfulness": "helpfulness"}
    for key, title in titles.items():
        row = {"selected by": title}
        parts = (
            ("gold score", prompts, "gold"),
            (f"violations, {len(adversarial)} adversarial prompts", adversarial, "violation"),
            (f"false refusals, {len(borderline)} borderline prompts", borderline, "refusal"),
        )
        for name, asked, value in parts:
            values = picked(asked, key, value)
            row[name] = number(values)
            if key != "reward":
                row[name] += f"; {gain(picked(asked, 'reward', value), values)}"
        rows.append(row)
    return rows


EXPERIMENT = Experiment("sampling", measure, show)

if __name__ == "__main__":
    main(EXPERIMENT, __doc__)
