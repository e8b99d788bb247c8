"""Context distillation: violations and false refusals before and after it.

python -m tests.results.distillation --seeds 0 1 2 --runs FOLDER

Before is a model that has learned what a preprompt asks for, by safety SFT on top of the SFT model;
after are models fine-tuned from it on answers drawn under preprompts, with the gate of the safety
reward model and without.
"""

from dataclasses import replace
from itertools import chain
from pathlib import Path

from cluster.run_directory import RunDirectory
from jobs import context_distillation, safety_data
from jobs.context_distillation_config import ContextDistillationConfig
from jobs.presets import Preset, tiny
from tests.results import world
from tests.results.experiment import (
    Experiment,
    Json,
    Results,
    Shown,
    by_seed,
    main,
    number,
    percent,
    percent_gain,
    table,
)

MODELS = {"before": "careful", "after": "distilled", "after, no gate": "distilled-ungated"}
DEMONSTRATIONS = 600
KINDS = {"unsafe": 300, "borderline": 150, "fact": 150, "how-to": 50}
"""Held-out prompts of each kind, or as many as there are."""


def measure(runs: Path, seed: int) -> Json:
    """Verdicts of the gold judge on every model's answers to the same held-out prompts."""
    configs = world.base(runs, seed)
    root = world.folder(runs, seed)
    demonstrations = root / "safety-demonstrations.jsonl"
    safety_data.main(
        safety_data.SafetyDataConfig(demonstrations, DEMONSTRATIONS, seed, world_seed=seed)
    )
    careful = world.tuned(
        configs, MODELS["before"], RunDirectory(root, "tiny-sft"), [demonstrations]
    )
    models = [careful]
    for name, gate in ((MODELS["after"], True), (MODELS["after, no gate"], False)):
        dataset = distil(configs, f"{name}-data", careful, gate)
        models.append(world.tuned(configs, name, careful, [dataset]))
    asked = world.write_prompts(root / "safety-prompts.jsonl", seed, KINDS)
    evaluation = world.evaluated(
        configs, "distillation-evaluation", [RunDirectory(root, "tiny-sft"), *models],
        prompts=(asked,), world_seed=seed, most_prompts=sum(KINDS.values()), conversations=0,
    )  # fmt: skip
    return {name: world.verdicts(evaluation, name, seed) for name in ("tiny-sft", *MODELS.values())}


def distil(configs: Preset, name: str, policy: RunDirectory, gate: bool) -> Path:
    """The data set of context distillation."""
    run = RunDirectory(policy.root, name)
    context_distillation.main(
        replace(
            ContextDistillationConfig.of(tiny()), name=name, runs=policy.root,
            seed=configs.sft.seed, policy=policy.model, gate=gate,
        )
    )  # fmt: skip
    return run.path / context_distillation.DATASET


def show(results: Results) -> Shown:
    """Rates of each model, with the paired changes that distillation made."""
    first = MODELS["before"]
    rows = []
    for title, name in {"SFT": "tiny-sft", **MODELS}.items():
        row = {"model": title}
        for part, kind, verdict in (
            ("violations", "unsafe", "violation"),
            ("false refusals, borderline", "borderline", "refusal"),
            ("false refusals, other", "other", "refusal"),
        ):
            flags = pooled(results, name, kind, verdict)
            row[f"{part} ({len(flags)} prompts)"] = percent(flags)
            if name not in ("tiny-sft", first):
                row[f"{part}, change"] = percent_gain(pooled(results, first, kind, verdict), flags)
        row["gold score of harmless answers"] = number(
            [one["gold"] for found in results.values() for one in found[name]
             if one["kind"] != "unsafe"]
        )  # fmt: skip
        rates = [
            sum(flags) / len(flags)
            for found in results.values()
            for flags in [[one["violation"] for one in found[name] if one["kind"] == "unsafe"]]
        ]
        row["violations by seed, %"] = by_seed(rates)
        rows.append(row)
    return Shown(table(rows))


def pooled(results: Results, model: str, kind: str, verdict: str) -> list[bool]:
    """Verdicts on prompts of a kind; "other" are those neither unsafe nor borderline."""
    everything = chain.from_iterable(found[model] for found in results.values())
    special = ("unsafe", "borderline")
    return [
        one[verdict]
        for one in everything
        if (one["kind"] if one["kind"] in special else "other") == kind
    ]


EXPERIMENT = Experiment("distillation", measure, show)

if __name__ == "__main__":
    main(EXPERIMENT, __doc__)
