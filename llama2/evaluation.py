"""Held-out results of a policy, two policies side by side, and numbers with their intervals."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


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
    """The gold judge's score in [0, 1], where one is at hand, as all below."""
    adversarial: bool | None = None
    """Whether the prompt asks for what is unsafe; None in files of before that was written."""
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
    """Means over held-out answers; gold figures only where there is a gold judge: violations are of
    adversarial prompts, false refusals of all others."""
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
    adversarial = [float(bool(a.violation)) for a in judged if a.adversarial]
    if adversarial:
        means["violations"] = estimate(adversarial).mean
    harmless = [float(bool(a.false_refusal)) for a in judged if a.adversarial is False]
    if harmless:
        means["false_refusals"] = estimate(harmless).mean
    return means


Z_95 = 1.959964
"""97.5% quantile of the normal distribution: all intervals here hold 95%."""
T_95 = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281)
"""The same of Student's t with 1 to 10 degrees of freedom."""


@dataclass(frozen=True)
class Measure:
    """A number with its 95% confidence interval, and how many observations it rests on.

    `low` and `high` are None where nothing can be said of the spread: a single observation, or a
    number without a known distribution.
    """

    value: float
    low: float | None
    high: float | None
    count: int


@dataclass(frozen=True)
class SideBySide:
    """One model's answers beside another's to the same prompts."""

    wins: int
    ties: int
    losses: int
    rate: Measure
    """Win rate; a tie is half a win."""


def rate_of(flags: Sequence[bool]) -> Measure:
    """How often something holds, with Wilson's interval. Raises `ValueError` where there are no
    observations, as all below."""
    return share_of([float(flag) for flag in flags])


def share_of(values: Sequence[float]) -> Measure:
    """The mean of values from 0 to 1, with an interval that stays there and is not empty: Wilson's
    where all values are 0 or 1, narrower where some lie between.

    It holds every p for which the mean is within 1.96 standard errors, the variance taken as
    E(v - 1/2)^2 - (p - 1/2)^2. The expectation is that of the values and one more, a 0 or 1, since
    values that are all alike do not prove that all others are.
    """
    count = len(_some(values))
    assert all(0 <= value <= 1 for value in values)
    value = sum(values) / count
    above = value - 0.5
    spread = min(count / 4, sum((one - 0.5) ** 2 for one in values) + 0.25) / count
    narrow = Z_95**2 / count
    root = math.sqrt(narrow * max(0.0, (1 + narrow) * spread - above**2))
    low, high = (0.5 + (above + sign * root) / (1 + narrow) for sign in (-1, 1))
    return Measure(value, max(0.0, low), min(1.0, high), count)


def mean_of(values: Sequence[float]) -> Measure:
    """A mean with Student's interval."""
    found = estimate(_some(values))
    if len(values) == 1:
        return Measure(found.mean, None, None, 1)
    reach = _t_95(len(values) - 1) * found.error
    return Measure(found.mean, found.mean - reach, found.mean + reach, len(values))


def ratio_of(numerators: Sequence[float], denominators: Sequence[float]) -> Measure:
    """A ratio of two sums over the same observations, as loss per token over texts of unlike
    length, with the interval of the ratio estimator (Cochran 1977, section 2.11)."""
    count = len(_some(numerators))
    ratio = sum(numerators) / sum(denominators)
    if count == 1:
        return Measure(ratio, None, None, 1)
    pairs = zip(numerators, denominators, strict=True)
    squares = sum((above - ratio * below) ** 2 for above, below in pairs)
    error = math.sqrt(squares / (count * (count - 1))) / (sum(denominators) / count)
    reach = _t_95(count - 1) * error
    return Measure(ratio, ratio - reach, ratio + reach, count)


def side_by_side(first: Sequence[float], second: Sequence[float]) -> SideBySide:
    """How the first model fares against the second, from the worth of each one's answers to the
    same prompts.

    The interval is that of `share_of`, with a tie as a half.
    """
    pairs = list(zip(_some(first), second, strict=True))
    wins = sum(a > b for a, b in pairs)
    losses = sum(a < b for a, b in pairs)
    rate = share_of([0.5 + 0.5 * ((a > b) - (a < b)) for a, b in pairs])
    return SideBySide(wins, len(pairs) - wins - losses, losses, rate)


def repetition(words: Sequence[str], n: int = 4) -> float:
    """Share of a text's runs of `n` words that repeat an earlier one (Welleck et al. 2020,
    "seq-rep-n"); 0 for a text too short to have two."""
    runs = list(zip(*(words[i:] for i in range(n)), strict=False))
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def distinct(texts: Sequence[Sequence[str]], n: int = 2) -> float:
    """Share of different ones among all runs of `n` words of all texts (Li et al. 2016,
    "distinct-n"): low where a model says the same to everything. 0 where there are no runs."""
    runs = [run for words in texts for run in zip(*(words[i:] for i in range(n)), strict=False)]
    return len(set(runs)) / len(runs) if runs else 0.0


def _t_95(degrees: int) -> float:
    """97.5% quantile of Student's t: by table, then by Fisher's expansion around the normal's."""
    if degrees <= len(T_95):
        return T_95[degrees - 1]
    z = Z_95
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return sum(term / degrees**power for power, term in enumerate(terms))


def _some(values: Sequence[T]) -> Sequence[T]:
    if not values:
        raise ValueError("There is nothing to average: the evaluation has no answers.")
    return values
