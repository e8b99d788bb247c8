"""A worker's share of an iteration as tensors. Shapes: B samples, T tokens, N answer tokens.

Position t stands for the prediction of token t + 1: there lie its log-probability, its reward, the
value of the state before it, and a true mask if the policy wrote it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from actors.records import Experience, FloatArray
from llama2 import kl
from llama2.advantages import gae
from llama2.batches import pack
from llama2.losses import IGNORE
from llama2.rewards import token_rewards


@dataclass(frozen=True)
class ExperienceBatch:
    """A micro-batch. The last four tensors are filled in by `with_advantages`."""

    tokens_BT: Tensor
    segments_BT: Tensor
    targets_BT: Tensor
    sampled_logprobs_BT: Tensor
    reference_logprobs_BT: Tensor
    scores_B: Tensor
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

    def spread(parts: Sequence[FloatArray]) -> Tensor:
        return empty.masked_scatter(mask_BT, torch.from_numpy(np.concatenate(parts)).to(device))

    return ExperienceBatch(
        batch.tokens_BT,
        batch.segments_BT,
        batch.targets_BT,
        sampled_logprobs_BT=spread([e.sample.logprobs for e in experiences]),
        reference_logprobs_BT=spread([e.reference_logprobs for e in experiences]),
        scores_B=torch.tensor([e.score for e in experiences], device=device),
        old_logprobs_BT=empty,
        values_BT=empty,
        advantages_BT=empty,
        returns_BT=empty,
    )


def with_advantages(
    batch: ExperienceBatch,
    old_logprobs_BT: Tensor,
    values_BT: Tensor,
    kl_coefficient: float,
    gamma: float,
    lam: float,
) -> ExperienceBatch:
    """Rewards from scores and KL, then advantages (not yet whitened) and returns."""
    divergence_BT = kl.k1(old_logprobs_BT, batch.reference_logprobs_BT)
    rewards_BT = token_rewards(batch.scores_B, divergence_BT, batch.mask_BT, kl_coefficient)
    advantages_BT = gae(rewards_BT, values_BT, batch.mask_BT, gamma, lam)
    return replace(
        batch,
        old_logprobs_BT=old_logprobs_BT,
        values_BT=values_BT,
        advantages_BT=advantages_BT,
        returns_BT=advantages_BT + values_BT,
    )
