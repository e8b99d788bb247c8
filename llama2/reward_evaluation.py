"""How good a reward model is, on held-out comparisons (paper, sections 3.2.2 and 3.4.2, tables 7
and 8).

Everything follows from the two scores of each pair. A table is a list of rows, each a mapping of
columns to texts and numbers, as JSON and `report.html` take them.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from llama2.evaluation import estimate
from llama2.records import SAFE_ANSWERS, Rating, SafetyLabel

Table = list[dict[str, Any]]
BINS = 10
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True)
class ScoredPair:
    """A held-out comparison and its scores, before the sigmoid."""

    data: str
    """Name of the data set."""
    chosen: float
    rejected: float
    rating: Rating | None
    safety: SafetyLabel | None
    chosen_tokens: int
    """Tokens of the answer alone."""
    rejected_tokens: int

    @property
    def gap(self) -> float:
        """How much higher the chosen answer scores."""
        return self.chosen - self.rejected

    @property
    def right(self) -> float:
        """1 where the chosen answer scores higher, 0 where the other does, and 0.5 for a tie."""
        return (self.gap > 0) + 0.5 * (self.gap == 0)


@dataclass(frozen=True)
class _Answer:
    score: float
    tokens: int
    chosen: bool
    is_safe: bool | None


def report(pairs: Sequence[ScoredPair]) -> dict[str, Table]:
    """All tables on a reward model by their headings. Those on safety are empty where no pair has a
    label, and so on.

    Raises `ValueError` where there is no pair or a score is not finite.
    """
    if not pairs:
        raise ValueError("There is no held-out comparison to evaluate the reward model on.")
    for number, pair in enumerate(pairs):
        if not math.isfinite(pair.chosen) or not math.isfinite(pair.rejected):
            raise ValueError(
                f"The reward model scores held-out pair {number} of {pair.data} as {pair.chosen} "
                f"and {pair.rejected}; train it again with a lower learning rate."
            )
    answers = [answer for pair in pairs for answer in _answers(pair)]
    return {
        "accuracy": [_accuracy("all", pairs)],
        "accuracy_by_rating": _grouped(pairs, get_args(Rating), lambda pair: pair.rating),
        "accuracy_by_data_set": _grouped(pairs, _data_sets(pairs), lambda pair: pair.data),
        "accuracy_by_data_set_and_rating": [
            {"data set": name, **row}
            for name in _data_sets(pairs)
            for row in _grouped(
                [pair for pair in pairs if pair.data == name],
                get_args(Rating),
                lambda pair: pair.rating,
            )
        ],
        "accuracy_by_safety": _grouped(pairs, get_args(SafetyLabel), lambda pair: pair.safety),
        "unsafe_answers_at_0.5": unsafe_answers(pairs),
        "calibration_of_preferences": calibration(
            [(sigmoid(abs(pair.gap)), pair.right) for pair in pairs]
        ),
        "calibration_of_safety": calibration(
            [(sigmoid(a.score), float(a.is_safe)) for a in answers if a.is_safe is not None]
        ),
        "score_distributions": _distributions(answers),
        "length_bias": length_bias(pairs),
    }


def headline(tables: dict[str, Table]) -> dict[str, float]:
    """The single numbers of a report that runs are compared by."""
    found = {"accuracy": tables["accuracy"][0]["accuracy"]}
    for table in ("accuracy_by_rating", "accuracy_by_data_set", "accuracy_by_safety"):
        for row in tables[table]:
            found[f"accuracy/{row['pairs of']}"] = row["accuracy"]
    for row in tables["unsafe_answers_at_0.5"]:
        found |= {
            name: row[name] for name in ("unsafe recall", "safe recall") if row[name] is not None
        }
    found["calibration_error"] = calibration_error(tables["calibration_of_preferences"])
    return {f"heldout/{name.replace(' ', '_')}": value for name, value in found.items()}


def unsafe_answers(pairs: Iterable[ScoredPair]) -> Table:
    """How well sigmoid(score) < 0.5 finds unsafe answers, over all answers with a label: recall and
    precision of the unsafe ones, and recall of the safe ones. Empty where none has a label; a
    figure without a denominator is None."""
    labelled = [a for pair in pairs for a in _answers(pair) if a.is_safe is not None]
    if not labelled:
        return []
    unsafe = [answer for answer in labelled if not answer.is_safe]
    called = [answer for answer in labelled if answer.score < 0]
    found = sum(not answer.is_safe for answer in called)
    safe = len(labelled) - len(unsafe)
    return [
        {
            "unsafe recall": _ratio(found, len(unsafe)),
            "unsafe precision": _ratio(found, len(called)),
            "safe recall": _ratio(safe - (len(called) - found), safe),
            "unsafe": len(unsafe),
            "safe": safe,
        }
    ]


def calibration(claims: Sequence[tuple[float, float]], bins: int = BINS) -> Table:
    """What is claimed against what is so: mean probability and outcome in bins of equal width over
    [0, 1]; empty bins are left out.

    claims: of each a probability and its outcome in [0, 1]. For preferences the probability is that
    of the higher-scored answer to be the preferred one, sigmoid(|gap|), at least 0.5.
    """
    binned: list[list[tuple[float, float]]] = [[] for _ in range(bins)]
    for claim in claims:
        binned[min(int(claim[0] * bins), bins - 1)].append(claim)
    return [
        {
            "from": number / bins,
            "to": (number + 1) / bins,
            "predicted": estimate([probability for probability, _ in held]).mean,
            "observed": estimate([outcome for _, outcome in held]).mean,
            "count": len(held),
        }
        for number, held in enumerate(binned)
        if held
    ]


def calibration_error(curve: Table) -> float:
    """The expected calibration error of a `calibration` table: the mean distance of predicted and
    observed, weighted by count (Guo et al. 2017, equation 3)."""
    total = sum(row["count"] for row in curve)
    off = sum(row["count"] * abs(row["predicted"] - row["observed"]) for row in curve)
    return float(off / total)


def length_bias(pairs: Sequence[ScoredPair]) -> Table:
    """Whether the model takes length for quality: correlations, and how often it prefers the longer
    answer, beside how often people do. Pairs of equal lengths count in the correlations alone."""
    answers = [answer for pair in pairs for answer in _answers(pair)]
    longer = [pair for pair in pairs if pair.chosen_tokens > pair.rejected_tokens]
    shorter = [pair for pair in pairs if pair.chosen_tokens < pair.rejected_tokens]
    uneven = len(longer) + len(shorter)
    preferred = sum(pair.right for pair in longer) + sum(1 - pair.right for pair in shorter)
    values = {
        "correlation of score and tokens": correlation(
            [answer.score for answer in answers], [answer.tokens for answer in answers]
        ),
        "correlation of score gap and difference in tokens": correlation(
            [pair.gap for pair in pairs],
            [pair.chosen_tokens - pair.rejected_tokens for pair in pairs],
        ),
        "the longer answer scores higher": _ratio(preferred, uneven),
        "the longer answer is the chosen one": _ratio(len(longer), uneven),
        "accuracy where the chosen answer is longer": _mean_right(longer),
        "accuracy where the chosen answer is shorter": _mean_right(shorter),
        "accuracy of the better of longer and shorter": _ratio(
            max(len(longer), len(shorter)), uneven
        ),
    }
    return [{"measure": name, "value": value} for name, value in values.items()]


def correlation(xs: Sequence[float], ys: Sequence[float]) -> float | None:
    """Pearson's correlation coefficient; None where either does not vary."""
    x_mean, y_mean = sum(xs) / len(xs), sum(ys) / len(ys)
    xx = sum((x - x_mean) ** 2 for x in xs)
    yy = sum((y - y_mean) ** 2 for y in ys)
    xy = sum((x - x_mean) * (y - y_mean) for x, y in zip(xs, ys, strict=True))
    return xy / math.sqrt(xx * yy) if xx > 0 and yy > 0 else None


def sigmoid(score: float) -> float:
    """1 / (1 + exp(-score)), for any finite score."""
    if score >= 0:
        return 1 / (1 + math.exp(-score))
    return math.exp(score) / (1 + math.exp(score))


def quantile(values: Sequence[float], share: float) -> float:
    """The value below which `share` of the values lie, interpolated between neighbours."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def _answers(pair: ScoredPair) -> tuple[_Answer, _Answer]:
    safe = (None, None) if pair.safety is None else SAFE_ANSWERS[pair.safety]
    return (
        _Answer(pair.chosen, pair.chosen_tokens, True, safe[0]),
        _Answer(pair.rejected, pair.rejected_tokens, False, safe[1]),
    )


def _data_sets(pairs: Iterable[ScoredPair]) -> list[str]:
    return list(dict.fromkeys(pair.data for pair in pairs))


def _grouped(
    pairs: Sequence[ScoredPair], groups: Sequence[str], of: Callable[[ScoredPair], str | None]
) -> Table:
    return [
        _accuracy(group, held)
        for group in groups
        if (held := [pair for pair in pairs if of(pair) == group])
    ]


def _accuracy(name: str, pairs: Sequence[ScoredPair]) -> dict[str, Any]:
    """Mean and standard error of `right`, and the mean gap."""
    accuracy = estimate([pair.right for pair in pairs])
    return {
        "pairs of": name,
        "accuracy": accuracy.mean,
        "error": accuracy.error if len(pairs) > 1 else None,
        "score gap": estimate([pair.gap for pair in pairs]).mean,
        "pairs": len(pairs),
    }


def _distributions(answers: Sequence[_Answer]) -> Table:
    groups = {
        "chosen": [a.score for a in answers if a.chosen],
        "rejected": [a.score for a in answers if not a.chosen],
        "safe": [a.score for a in answers if a.is_safe],
        "unsafe": [a.score for a in answers if a.is_safe is False],
    }
    return [
        {
            "answers": name,
            "mean": estimate(scores).mean,
            **{f"{share:.0%}": quantile(scores, share) for share in QUANTILES},
            "count": len(scores),
        }
        for name, scores in groups.items()
        if scores
    ]


def _mean_right(pairs: Sequence[ScoredPair]) -> float | None:
    return _ratio(sum(pair.right for pair in pairs), len(pairs))


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None
