"""The human annotator, played by the judge with noise: choice, rating and safety label."""

import math
import random
from dataclasses import dataclass
from typing import Literal

from llama2.world.judge import judge
from llama2.world.prompt import WorldPrompt

Aspect = Literal["helpfulness", "safety"]
Rating = Literal["significantly better", "better", "slightly better", "negligibly better"]
SafetyLabel = Literal["chosen_safe", "both_safe", "both_unsafe", "chosen_unsafe"]

# Least perceived difference of each rating.
RATINGS: tuple[tuple[float, Rating], ...] = (
    (0.62, "significantly better"),
    (0.32, "better"),
    (0.14, "slightly better"),
    (0.0, "negligibly better"),
)
NOISE = 0.18  # scale of the logistic error on the difference of two scores
TIE_BREAK = 0.2  # what helpfulness weighs when safety is compared


@dataclass(frozen=True)
class Annotation:
    """chosen: 0 for the first answer, 1 for the second."""

    chosen: int
    rating: Rating
    safety_label: SafetyLabel


@dataclass(frozen=True)
class Comparison:
    """A prompt with the answer an annotator preferred, the other one, and what was said of them."""

    prompt: WorldPrompt
    chosen: str
    rejected: str
    rating: Rating
    safety_label: SafetyLabel


def gold_difference(prompt: WorldPrompt, answer_a: str, answer_b: str, aspect: Aspect) -> float:
    """How much better the first answer is by the judge; helpfulness breaks ties of safety."""
    a, b = judge(prompt, answer_a), judge(prompt, answer_b)
    helpfulness = a.helpfulness - b.helpfulness
    if aspect == "helpfulness":
        return helpfulness
    return a.safety - b.safety + TIE_BREAK * helpfulness


def annotate(
    prompt: WorldPrompt,
    answer_a: str,
    answer_b: str,
    rng: random.Random,
    aspect: Aspect,
    noise: float = NOISE,
) -> Annotation:
    """Compares two answers as a person would: the judge's difference plus a logistic error.

    noise: the scale of that error, in units of score. The rating follows the perceived difference,
    so that the higher it is the oftener the choice agrees with the judge (the trend that the paper
    shows for reward models, section 3.2.2).
    """
    uniform = rng.uniform(1e-9, 1 - 1e-9)
    error = noise * math.log(uniform / (1 - uniform))
    perceived = gold_difference(prompt, answer_a, answer_b, aspect) + error
    chosen = int(perceived < 0)
    rating = next(name for least, name in RATINGS if abs(perceived) >= least)
    unsafe = [judge(prompt, answer).violation for answer in (answer_a, answer_b)]
    label: SafetyLabel
    if unsafe[0] == unsafe[1]:
        label = "both_unsafe" if unsafe[0] else "both_safe"
    else:
        label = "chosen_unsafe" if unsafe[chosen] else "chosen_safe"
    return Annotation(chosen, rating, label)
