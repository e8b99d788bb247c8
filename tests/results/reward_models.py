"""Reward models: accuracy by rating and domain, margins, and the auxiliary safety loss.

python -m tests.results.reward_models --seeds 0 1 2 --runs FOLDER
"""

from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import get_args

import torch

from llama2 import checkpoint
from llama2.encoding import RATINGS, SAFETY_LABELS
from llama2.evaluation import rate_of
from llama2.preference_mix import ASPECTS
from llama2.records import SAFE_ANSWERS, Rating
from llama2.scoring import last_scores
from llama2.shards import Shards
from tests.results import world
from tests.results.experiment import (
    Experiment,
    Json,
    Results,
    Shown,
    by_seed,
    main,
    percent,
    percent_gain,
    table,
)
from tests.results.plots import Plot, Spot

MARGINS = ("none", "small", "large")
AUXILIARY = "safety-auxiliary"
WELL_SEPARATED: Rating = "significantly better"


def measure(runs: Path, seed: int) -> Json:
    """Scores of all held-out pairs of both domains by each model, and the pairs' labels."""
    configs = world.base(runs, seed)
    models = {}
    for base in (configs.helpfulness, configs.safety):
        for margin in MARGINS:
            name = f"{base.kind}-{margin}"
            models[name] = world.rewarded(replace(base, margin=margin), name)
    models[AUXILIARY] = world.rewarded(replace(configs.safety, safety_weight=1.0), AUXILIARY)
    data = world.folder(runs, seed) / "tiny-data"
    found: Json = {"pairs": {}, "scores": {name: {} for name in models}}
    for aspect in ASPECTS:
        shards = Shards(data / aspect / "heldout")
        rows = range(len(shards))
        found["pairs"][aspect] = [[shards.rating(i), shards.safety(i)] for i in rows]
        sequences = [s.tokens.tolist() for i in rows for s in shards.row(i)]
        for name, run in models.items():
            with torch.inference_mode():
                scores = last_scores(checkpoint.load_scalar(run.model).eval(), sequences)
            found["scores"][name][aspect] = scores
    return found


def right(found: Json, model: str, aspect: str, rating: int | None = None) -> list[bool]:
    """Of each pair (of one rating), whether the chosen answer scores higher."""
    scores = found["scores"][model][aspect]
    return [
        scores[2 * i] > scores[2 * i + 1]
        for i, (given, _) in enumerate(found["pairs"][aspect])
        if rating in (None, given)
    ]


def called_unsafe(found: Json, model: str) -> tuple[list[bool], list[bool]]:
    """Whether sigmoid(score) is below 0.5: of the unsafe answers, and of the safe ones."""
    unsafe, safe = [], []
    scores = found["scores"][model]["safety"]
    for i, (_, label) in enumerate(found["pairs"]["safety"]):
        for answer, is_safe in enumerate(SAFE_ANSWERS[SAFETY_LABELS[label]]):
            (safe if is_safe else unsafe).append(scores[2 * i + answer] < 0)
    return unsafe, safe


def all_right(
    results: Results, model: str, aspect: str, rating: Rating | None = None
) -> list[bool]:
    """The same over all seeds."""
    number = None if rating is None else RATINGS.index(rating)
    return [flag for found in results.values() for flag in right(found, model, aspect, number)]


def show(results: Results) -> Shown:
    """Four tables, and a plot of accuracy by rating."""
    ratings: list[Rating] = list(reversed(get_args(Rating)))
    by_rating, lines = [], {}
    for aspect in ASPECTS:
        flags = [all_right(results, f"{aspect}-small", aspect, rating) for rating in ratings]
        by_rating.append(
            {"model": aspect} | {n: percent(f) for n, f in zip(ratings, flags, strict=True)}
        )
        lines[f"{aspect} model on {aspect}"] = [
            Spot(place, rate.value, rate.low, rate.high)
            for place, rate in enumerate(map(rate_of, flags))
        ]
    domains = [
        {"model": model}
        | {f"{a} pairs": percent(all_right(results, f"{model}-small", a)) for a in ASPECTS}
        for model in ASPECTS
    ]
    parts = {
        "Accuracy by rating, each model on its own domain:": by_rating,
        "Each model on both domains:": domains,
        f'Margins, on pairs rated "{WELL_SEPARATED}" and on all:': margins(results),
        "The auxiliary loss, on held-out answers with a safety label (called unsafe where "
        "sigmoid(score) is below 0.5):": auxiliary(results),
    }
    text = "\n\n".join(f"{title}\n\n{table(rows)}" for title, rows in parts.items())
    axis = "rating, from negligibly (0) to significantly better (3)"
    return Shown(text, {"reward_models.svg": Plot(axis, "accuracy", lines)})


def margins(results: Results) -> list[dict[str, str]]:
    """A row for each model and margin."""
    rows = []
    for aspect in ASPECTS:
        without = all_right(results, f"{aspect}-none", aspect, WELL_SEPARATED)
        for margin in MARGINS:
            name = f"{aspect}-{margin}"
            flags = all_right(results, name, aspect, WELL_SEPARATED)
            top = RATINGS.index(WELL_SEPARATED)
            rows.append(
                {
                    "model": aspect,
                    "margin": margin,
                    "well separated": percent(flags),
                    "by seed, %": by_seed(
                        [fmean(right(f, name, aspect, top)) for f in results.values()]
                    ),
                    "against none, paired": ""
                    if margin == "none"
                    else percent_gain(without, flags),
                    "all pairs": percent(all_right(results, name, aspect)),
                }
            )
    return rows


def auxiliary(results: Results) -> list[dict[str, str]]:
    """A row for each weight of the auxiliary loss."""
    rows = []
    for weight, model in ((0, "safety-small"), (1, AUXILIARY)):
        called = [called_unsafe(found, model) for found in results.values()]
        unsafe = [flag for flags, _ in called for flag in flags]
        rows.append(
            {
                "safety_weight": str(weight),
                "unsafe recall": percent(unsafe),
                "by seed, %": by_seed([fmean(flags) for flags, _ in called]),
                "safe recall": percent([not flag for _, flags in called for flag in flags]),
                "unsafe answers": str(len(unsafe)),
                "accuracy on pairs": percent(all_right(results, model, "safety")),
            }
        )
    return rows


EXPERIMENT = Experiment("reward_models", measure, show)

if __name__ == "__main__":
    main(EXPERIMENT, __doc__)
