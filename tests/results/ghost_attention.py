"""Ghost Attention: how many models keep to an instruction of the first message, turn by turn.

python -m tests.results.ghost_attention --seeds 0 1 2 --runs FOLDER
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from cluster.run_directory import RunDirectory
from jobs import ghost_attention
from jobs.ghost_attention_config import GhostAttentionConfig
from jobs.presets import tiny
from llama2.evaluation import rate_of
from tests.results import world
from tests.results.experiment import Experiment, Json, Results, Shown, by_seed, main, percent, table
from tests.results.plots import Plot, Spot

MODELS = {"without": "tiny-sft", "with": "ghost"}
TURNS = (2, 4, 6)
CONVERSATIONS = 200


def measure(runs: Path, seed: int) -> Json:
    """The evaluation of the SFT model, and of it after fine-tuning on Ghost-Attention data."""
    configs = world.base(runs, seed)
    root = world.folder(runs, seed)
    chat, data = RunDirectory(root, MODELS["without"]), RunDirectory(root, "ghost-data")
    ghost_attention.main(
        replace(GhostAttentionConfig.of(tiny()), name=data.name, runs=root, seed=seed)
    )
    dataset = data.path / ghost_attention.DATASET
    ghost = world.tuned(configs, MODELS["with"], chat, [dataset])
    evaluation = world.evaluated(
        configs, "ghost-evaluation", [chat, ghost], conversations=CONVERSATIONS
    )
    found: Json = json.loads((evaluation.path / "evaluation.json").read_text())
    return {
        "answers to learn from": len(dataset.read_text().splitlines()),
        **{
            key: {part: found["models"][name][part] for part in ("adherence", "answers")}
            for key, name in MODELS.items()
        },
    }


def kept(found: Json, model: str, turn: int) -> list[bool]:
    """Of each conversation that came to the turn, whether its answer kept to the instruction."""
    rate = found[model]["adherence"].get(f"turn {turn}")
    if rate is None:
        return []
    count = round(rate["value"] * rate["count"])
    return [True] * count + [False] * (rate["count"] - count)


def show(results: Results) -> Shown:
    """Adherence by turn, and what the training did to single answers."""

    def pooled(model: str, turn: int) -> list[bool]:
        return [flag for found in results.values() for flag in kept(found, model, turn)]

    rows, lines = [], {}
    for model in MODELS:
        row = {"Ghost Attention": model}
        for turn in TURNS:
            rates = [_rate(kept(found, model, turn)) for found in results.values()]
            row[f"turn {turn}"] = f"{percent(pooled(model, turn))}; {by_seed(rates)}"
        gold = [found[model]["answers"]["gold"]["value"] for found in results.values()]
        row["gold score of single answers, by seed"] = by_seed(gold, 1, 3)
        rows.append(row)
        measured = {t: rate_of(flags) for t in range(1, 7) if (flags := pooled(model, t))}
        lines[f"{model} Ghost Attention"] = [
            Spot(turn, rate.value, rate.low, rate.high) for turn, rate in measured.items()
        ]
    text = f"Adherence, pooled and by seed:\n\n{table(rows)}"
    return Shown(text, {"ghost_attention.svg": Plot("turn", "adherence", lines)})


def _rate(flags: Sequence[bool]) -> float:
    return sum(flags) / len(flags) if flags else float("nan")


EXPERIMENT = Experiment("ghost_attention", measure, show)

if __name__ == "__main__":
    main(EXPERIMENT, __doc__)
