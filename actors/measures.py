"""What is recorded of an iteration: of the samples before the update, and of the update."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from actors.experience import MiniBatches
from cluster import training


def measure(minibatches: MiniBatches, has_critic: bool = True) -> dict[str, float]:
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


LOSSES = ("policy_loss", "ptx_loss", "value_loss")
SUMS = (*LOSSES, "clipped", "approximate_kl", "entropy")


class UpdateSums:
    """What the minibatches of an update of one model add up to, and how long it took."""

    def __init__(self, who: str) -> None:
        """who: the model's name in what is recorded."""
        self.who = who
        self._norms: dict[str, float] = {}
        self._mine = torch.zeros(len(SUMS), dtype=torch.float64)
        self._total = torch.zeros(len(SUMS), dtype=torch.float64)
        self._seen: set[str] = set()
        self._seconds = 0.0

    def add(self, **values: float | None) -> None:
        """Add this worker's parts, by the names of `SUMS`; None is not known."""
        for name, value in values.items():
            if value is not None:
                self._mine[SUMS.index(name)] += value
                self._seen.add(name)

    def stepped(self, **found: float) -> None:
        """Keep what a step told; of the last minibatch it is recorded."""
        self._norms = {f"{self.who}/{name}": value for name, value in found.items()}

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Count the time of a `with` block."""
        started = time.perf_counter()
        yield
        self._seconds += time.perf_counter() - started

    def reduce(self) -> float:
        """End a minibatch's passes: the sum of its losses over all workers (collective)."""
        found = training.all_reduce(self._mine)
        self._total += found
        losses = float(found[: len(LOSSES)].sum())
        self._mine = torch.zeros_like(self._total)
        return losses

    def metrics(self, minibatches: int, tokens: int) -> dict[str, float]:
        """Means over minibatches and their answer tokens, of what was computed."""
        loss, ptx_loss, value_loss, clipped, divergence, entropy = self._total.tolist()
        found = {
            "loss": ("policy_loss", loss / minibatches),
            "value/loss": ("value_loss", value_loss / minibatches),
            "ptx/loss": ("ptx_loss", ptx_loss / minibatches),
            "ppo/clip_fraction": ("clipped", clipped / tokens),
            "ppo/approximate_kl": ("approximate_kl", divergence / tokens),
            "ppo/exact_entropy": ("entropy", entropy / tokens),
        }
        means = {shown: mean for shown, (name, mean) in found.items() if name in self._seen}
        return means | {f"time/update_{self.who}": self._seconds} | self._norms
