"""A worker's share of an iteration as tensors. Shapes: B samples, T tokens, N answer tokens.

Position t stands for the prediction of token t + 1: there lie its log-probability, its reward, the
value of the state before it, and a true mask if the policy wrote it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from actors.records import Experience
from cluster import training
from llama2.advantages import gae, group_relative, leave_one_out, whiten
from llama2.batches import FloatArray, pack
from llama2.kl import ESTIMATORS, Estimator
from llama2.losses import IGNORE
from llama2.rewards import token_rewards


@dataclass(frozen=True)
class ExperienceBatch:
    """A micro-batch. The last five tensors are filled in later."""

    tokens_BT: Tensor
    segments_BT: Tensor
    targets_BT: Tensor
    sampled_logprobs_BT: Tensor
    scores_B: Tensor
    slots_B: Tensor
    """Numbers of the samples in the iteration's batch."""
    reference_logprobs_BT: Tensor
    old_logprobs_BT: Tensor
    values_BT: Tensor
    advantages_BT: Tensor
    returns_BT: Tensor

    @property
    def mask_BT(self) -> Tensor:
        """True on answer tokens."""
        return self.targets_BT != IGNORE

    def spread(self, values_N: Tensor) -> Tensor:
        """Values of the answer tokens laid out as [B, T], 0 elsewhere."""
        return torch.zeros_like(self.sampled_logprobs_BT).masked_scatter(self.mask_BT, values_N)


def collate(experiences: Sequence[Experience], device: torch.device) -> ExperienceBatch:
    """One sample a row, padded right."""
    batch = pack([[e.sample.sequence] for e in experiences]).to(device)
    mask_BT = batch.targets_BT != IGNORE
    empty = torch.zeros(mask_BT.shape, device=device)
    collated = ExperienceBatch(
        batch.tokens_BT,
        batch.segments_BT,
        batch.targets_BT,
        sampled_logprobs_BT=empty,
        scores_B=torch.tensor([e.score for e in experiences], device=device),
        slots_B=torch.tensor([e.slot for e in experiences], device=device),
        reference_logprobs_BT=empty,
        old_logprobs_BT=empty,
        values_BT=empty,
        advantages_BT=empty,
        returns_BT=empty,
    )
    sampled_BT = _spread(collated, [e.sample.logprobs for e in experiences])
    return replace(collated, sampled_logprobs_BT=sampled_BT)


def with_reference(batch: ExperienceBatch, experiences: Sequence[Experience]) -> ExperienceBatch:
    """Of a batch of these samples: with the reference's log-probabilities, once they are there."""
    reference_BT = _spread(batch, [e.reference_logprobs() for e in experiences])
    return replace(batch, reference_logprobs_BT=reference_BT)


def _spread(batch: ExperienceBatch, parts: Sequence[FloatArray]) -> Tensor:
    return batch.spread(torch.from_numpy(np.concatenate(parts)).to(batch.tokens_BT.device))


def with_advantages(
    batch: ExperienceBatch,
    kl_coefficient: float,
    gamma: float,
    lam: float,
    estimator: Estimator = "k1",
) -> ExperienceBatch:
    """Of a batch with all log-probabilities and values: rewards from scores and KL, then advantages
    (not yet whitened) and returns."""
    divergence_BT = ESTIMATORS[estimator](batch.old_logprobs_BT, batch.reference_logprobs_BT)
    rewards_BT = token_rewards(batch.scores_B, divergence_BT, batch.mask_BT, kl_coefficient)
    advantages_BT = gae(rewards_BT, batch.values_BT, batch.mask_BT, gamma, lam)
    return replace(batch, advantages_BT=advantages_BT, returns_BT=advantages_BT + batch.values_BT)


MiniBatches = list[list[ExperienceBatch]]
"""Micro-batches by minibatch."""

COMPARISONS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "grpo": group_relative,
    "rloo": leave_one_out,
}


def with_group_advantages(
    minibatches: MiniBatches,
    algorithm: str,
    group_size: int,
    kl_coefficient: float,
    estimator: Estimator,
) -> MiniBatches:
    """Of batches with all log-probabilities: each answer's score less its KL penalty, compared with
    the other answers to its prompt, as the advantage of all its tokens (collective).

    A group's answers may lie in any minibatches and on any workers.
    """
    batches = [batch for minibatch in minibatches for batch in minibatch]
    samples = torch.tensor([sum(len(batch.scores_B) for batch in batches)])
    rewards_B = torch.zeros(int(training.all_reduce(samples)), dtype=torch.float64)
    for batch in batches:
        divergence_BT = ESTIMATORS[estimator](batch.old_logprobs_BT, batch.reference_logprobs_BT)
        penalty_B = kl_coefficient * (divergence_BT * batch.mask_BT).sum(dim=1)
        rewards_B[batch.slots_B.cpu()] = (batch.scores_B - penalty_B).double().cpu()
    advantages_B = COMPARISONS[algorithm](training.all_reduce(rewards_B), group_size)

    def compared(batch: ExperienceBatch) -> ExperienceBatch:
        mine_B = advantages_B[batch.slots_B.cpu()].to(batch.values_BT)
        return replace(batch, advantages_BT=mine_B[:, None] * batch.mask_BT)

    return [[compared(batch) for batch in minibatch] for minibatch in minibatches]


def whiten_advantages(minibatches: MiniBatches) -> MiniBatches:
    """Mean 0 and variance 1 over all answer tokens of the global batch (collective)."""
    batches = [batch for minibatch in minibatches for batch in minibatch]
    advantages_N = torch.cat([batch.advantages_BT[batch.mask_BT] for batch in batches])
    white_N = whiten(advantages_N, torch.ones_like(advantages_N), training.all_reduce)
    parts = iter(white_N.split([int(batch.mask_BT.sum()) for batch in batches]))
    return [
        [replace(batch, advantages_BT=batch.spread(next(parts))) for batch in minibatch]
        for minibatch in minibatches
    ]
