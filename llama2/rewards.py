"""The paper's reward for PPO (section 3.2.3). Shapes: B samples, T tokens.

    R(g | p) = WHITEN(LOGIT(R_c(g | p))) - beta KL(policy || initial policy)

with R_c the safety score where the prompt is tagged as safety or that score is below 0.15, else the
helpfulness score.
"""

import math

import torch
from torch import Tensor

SAFETY_THRESHOLD = 0.15
EPSILON = 1e-6
LARGEST_SCORE = math.log((1 - EPSILON) / EPSILON)
"""Scores before the sigmoid count up to this size, about 13.8: `logit` holds them there."""


def composite(
    helpfulness_B: Tensor,
    safety_B: Tensor,
    is_safety_prompt_B: Tensor,
    threshold: float = SAFETY_THRESHOLD,
) -> Tensor:
    """R_c: probabilities in, probabilities out (sigmoids of the two reward models' scores)."""
    gated = is_safety_prompt_B.bool() | (safety_B < threshold)
    return torch.where(gated, safety_B, helpfulness_B)


def logit(probability: Tensor, epsilon: float = EPSILON) -> Tensor:
    """Undo the sigmoid. Probabilities are held `epsilon` away from 0 and 1, so the result is
    finite."""
    return torch.logit(probability, eps=epsilon)


def token_rewards(
    scores_B: Tensor, divergence_BT: Tensor, mask_BT: Tensor, kl_coefficient: float
) -> Tensor:
    """Reward of each token [B, T]: -beta times its KL term, and the sample's score on its last
    token.

    scores_B: whitened scores. divergence_BT: estimate of the KL at each token. mask_BT: 1 on the
    tokens that the policy wrote; a row without any receives nothing.
    """
    rewards = -kl_coefficient * divergence_BT * mask_BT
    order = torch.arange(1, mask_BT.shape[1] + 1, device=mask_BT.device)
    last = (mask_BT.long() * order).argmax(dim=1, keepdim=True)
    written = mask_BT.any(dim=1).to(scores_B.dtype)
    return rewards.scatter_add(1, last, (scores_B * written)[:, None].to(rewards.dtype))
