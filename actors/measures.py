"""What is recorded of an iteration: of the samples before the update, and of the update."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from actors.experience import ExperienceBatch
from cluster import training


def measure(minibatches: list[list[ExperienceBatch]], has_critic: bool = True) -> dict[str, float]:
    """Means over the global batch of what was sampled, before any update (collective)."""
    sums = torch.zeros(8, dtype=torch.float64)
    for batch in (batch for minibatch in minibatches for batch in minibatch):
        mask = batch.mask_BT
        residual, returns = (batch.returns_BT - batch.values_BT)[mask], batch.returns_BT[mask]
        divergence = (batch.old_logprobs_BT - batch.reference_logprobs_BT)[mask].sum()
        disagreement = (batch.old_logprobs_BT - batch.sampled_logprobs_BT)[mask].abs().sum()
        sums += torch.stack(
            (
                mask.sum(), torch.tensor(len(mask)).to(divergence), divergence, disagreement,
                residual.square().sum(), returns.sum(), returns.square().sum(),
                -batch.old_logprobs_BT[mask].sum(),
            )
        ).double().cpu()  # fmt: skip
    totals = training.all_reduce(sums).tolist()
    tokens, samples, kl, difference, residuals, total, squares, surprise = totals
    variance = squares - total**2 / tokens
    found = {
        "ppo/kl_from_initial": kl / samples,
        "ppo/entropy": surprise / tokens,  # estimated: the mean surprise at one's own samples
        "rollout/logprob_difference": difference / tokens,
    }
    if not has_critic:
        return found
    return found | {
        "value/explained_variance": 1 - residuals / variance if variance > 0 else 0.0,
        "value/mean_return": total / tokens,
    }


SUMS = ("loss", "value_loss", "ptx_loss", "clipped", "approximate_kl", "entropy")
LOSSES = 3
"""The first of them."""


class UpdateSums:
    """What the minibatches of an update add up to, and how long policy and value model took."""

    def __init__(self) -> None:
        self.norms: dict[str, float] = {}
        """Of the last minibatch: rates and gradient norms."""
        self._mine = torch.zeros(len(SUMS), dtype=torch.float64)
        self._total = torch.zeros(len(SUMS), dtype=torch.float64)
        self._seen: set[str] = set()
        self._seconds: defaultdict[str, float] = defaultdict(float)

    def add(self, **values: float | None) -> None:
        """Add this worker's parts, by the names of `SUMS`; None is not known."""
        for name, value in values.items():
            if value is not None:
                self._mine[SUMS.index(name)] += value
                self._seen.add(name)

    @contextmanager
    def timed(self, who: str) -> Iterator[None]:
        """Count the time of a `with` block as that of the policy or of the value model."""
        started = time.perf_counter()
        yield
        self._seconds[who] += time.perf_counter() - started

    def reduce(self) -> float:
        """End a minibatch's passes: the sum of its losses over all workers (collective)."""
        found = training.all_reduce(self._mine)
        self._total += found
        losses = float(found[:LOSSES].sum())
        self._mine = torch.zeros_like(self._total)
        return losses

    def metrics(self, minibatches: int, tokens: int) -> dict[str, float]:
        """Means over minibatches and their answer tokens, of what was computed."""
        loss, value_loss, ptx_loss, clipped, divergence, entropy = self._total.tolist()
        found = {
            "loss": ("loss", loss / minibatches),
            "value/loss": ("value_loss", value_loss / minibatches),
            "ptx/loss": ("ptx_loss", ptx_loss / minibatches),
            "ppo/clip_fraction": ("clipped", clipped / tokens),
            "ppo/approximate_kl": ("approximate_kl", divergence / tokens),
            "ppo/exact_entropy": ("entropy", entropy / tokens),
        }
        means = {shown: mean for shown, (name, mean) in found.items() if name in self._seen}
        times = {f"time/update_{who}": seconds for who, seconds in self._seconds.items()}
        return means | times | self.norms
