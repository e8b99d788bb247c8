"""Mixing sources by weight: how often each is passed (paper, section 2.1; Touvron et al. 2023,
"LLaMA: Open and efficient foundation language models", table 1); and comparisons by share (section
3.2.2)."""

import math
from collections.abc import Collection, Mapping, Sequence

import numpy as np
import xxhash

from llama2.batches import TokenSequence


def check_mix(weights: Mapping[str, float], names: Collection[str]) -> None:
    """Raise `ValueError` unless `weights` gives every source of `names`, and none beside, a share
    above 0."""
    listed = ", ".join(names) or "none"
    for name, weight in weights.items():
        if name not in names:
            raise ValueError(f"The mix names {name!r}, but the sources of text are: {listed}.")
        if not (weight > 0 and math.isfinite(weight)):
            raise ValueError(f"The mix gives {name} the weight {weight}; give a number above 0.")
    for name in names:
        if weights and name not in weights:
            raise ValueError(
                f"The mix gives {name} no weight; name all sources ({listed}), or leave out its "
                "text."
            )


def passes(
    weights: Mapping[str, float], tokens: Mapping[str, int], most: float
) -> dict[str, float]:
    """How often each source is passed, so that tokens come in the proportion of `weights`.

    Passes are proportional to weight / tokens, and the least-used source is passed once. Without
    weights all are. Raises `ValueError` where a source has no tokens, or would be passed more than
    `most` times.
    """
    if not weights:
        return dict.fromkeys(tokens, 1.0)
    for name in weights:
        if not tokens.get(name):
            raise ValueError(
                f"The mix asks for {name}, but none of its texts could be used; look at the "
                "reasons above, or leave it out."
            )
    ratios = {name: weight / tokens[name] for name, weight in weights.items()}
    least = min(ratios.values())
    found = {name: round(ratio / least, 6) for name, ratio in ratios.items()}
    for name, count in found.items():
        if count > most:
            raise ValueError(
                f"The mix would pass {name} {count:.2f} times ({tokens[name]} tokens for a weight "
                f"of {weights[name]:g}), more than max_passes {most:g} allows; lower its weight, "
                "give more of it, or raise --max-passes."
            )
    return found


def is_taken(row: list[TokenSequence], share: float) -> bool:
    """Whether a document is in a pass over `share` of its source: decided by a hash of its
    tokens."""
    if share >= 1.0:
        return True
    digest = xxhash.xxh3_64()
    for sequence in row:
        digest.update(np.asarray(sequence.tokens).astype("<u4").tobytes())
    return digest.intdigest() < share * 2.0**64


def needed_rows(own: int, share: float) -> int:
    """How many other rows beside `own` ones make up `share` of all."""
    return round(own * share / (1 - share))


def drawn(sizes: Sequence[int], wanted: int, seed: int) -> list[list[int]]:
    """`wanted` rows drawn uniformly, without repetition, from sources of these sizes; all rows
    where there are fewer. For each source its row numbers, in order."""
    total = sum(sizes)
    picked = np.random.default_rng(seed).choice(total, min(wanted, total), replace=False)
    found, start = [], 0
    for size in sizes:
        inside = picked[(picked >= start) & (picked < start + size)]
        found.append(sorted((inside - start).tolist()))
        start += size
    return found
