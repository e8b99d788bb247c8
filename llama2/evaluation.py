"""Held-out results of a policy, and two policies side by side."""

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Judged:
    """One held-out answer. Scores of the reward models are before the sigmoid."""

    id: str
    prompt: str
    answer: str
    kind: str
    reward: float
    """The composite of both reward models, as PPO sees it before whitening."""
    helpfulness: float
    safety: float
    kl: float
    """Estimate of the KL from the initial policy: log-ratios summed over the answer, in nats."""
    tokens: int
    gold: float | None = None
    """The gold judge's score in [0, 1], where one is at hand."""
    violation: bool | None = None
    false_refusal: bool | None = None


@dataclass(frozen=True)
class Estimate:
    """A mean and its standard error."""

    mean: float
    error: float


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and standard error of independent values; the error of a single one is infinite."""
    if not values:
        raise ValueError("There is nothing to average: the evaluation has no answers.")
    mean = sum(values) / len(values)
    if len(values) == 1:
        return Estimate(mean, math.inf)
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return Estimate(mean, math.sqrt(variance / len(values)))


def win_rate(before: Sequence[Judged], after: Sequence[Judged]) -> Estimate:
    """How often the second policy's answer beats the first's to the same prompt; a tie is half a
    win.

    By gold score, or by reward where there is no gold judge.
    """
    return estimate(
        [
            (strength(b) > strength(a)) + 0.5 * (strength(b) == strength(a))
            for a, b in _pairs(before, after)
        ]
    )


def improvement(before: Sequence[Judged], after: Sequence[Judged]) -> Estimate:
    """Mean paired difference of the strength of answers to the same prompts, and its standard
    error."""
    return estimate([strength(b) - strength(a) for a, b in _pairs(before, after)])


def strength(answer: Judged) -> float:
    """Gold score, or reward where there is none."""
    return answer.reward if answer.gold is None else answer.gold


def _pairs(before: Sequence[Judged], after: Sequence[Judged]) -> list[tuple[Judged, Judged]]:
    if [a.id for a in before] != [b.id for b in after]:
        raise ValueError("The two evaluations are of different prompts; compare like with like.")
    return list(zip(before, after, strict=True))


def summary(answers: Sequence[Judged]) -> dict[str, float]:
    """Means over held-out answers; gold figures only where there is a gold judge."""
    means = {
        "reward": estimate([a.reward for a in answers]).mean,
        "helpfulness": estimate([a.helpfulness for a in answers]).mean,
        "safety": estimate([a.safety for a in answers]).mean,
        "kl": estimate([a.kl for a in answers]).mean,
        "tokens": estimate([float(a.tokens) for a in answers]).mean,
    }
    judged = [a for a in answers if a.gold is not None]
    if judged:
        means["gold"] = estimate([a.gold or 0.0 for a in judged]).mean
        means["violations"] = estimate([float(bool(a.violation)) for a in judged]).mean
        means["false_refusals"] = estimate([float(bool(a.false_refusal)) for a in judged]).mean
    return means
