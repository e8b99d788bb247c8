"""Losses as pure functions. Shapes: N tokens or pairs.

Sums and means: every loss takes per-token or per-pair terms and a `total` to divide by, which the
caller sets to the count over the whole global batch, so that any split into micro-batches, ranks
and accumulation steps adds up to the same number.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100


def next_token_loss(logprobs_N: Tensor, total: float) -> Tensor:
    """Cross-entropy: the negative log-probabilities summed and divided by `total` target tokens."""
    return -logprobs_N.sum() / total


def ranking_loss(chosen_N: Tensor, rejected_N: Tensor, margin_N: Tensor, total: float) -> Tensor:
    """-log sigmoid(r_chosen - r_rejected - margin) (paper, equation 2): the sum over `total`."""
    return -F.logsigmoid(chosen_N - rejected_N - margin_N).sum() / total


def safety_loss(scores_N: Tensor, is_safe_N: Tensor, total: float) -> Tensor:
    """Binary cross-entropy of sigmoid(score) against whether each answer is safe: the sum over
    `total`.

    The auxiliary loss of the safety reward model. The ranking loss sees differences only and leaves
    open where scores lie; this one makes 0.5 the boundary between unsafe and safe. The paper
    (section 3.2.2) has such a loss and does not give its formula; this one is the project's choice.
    """
    labels_N = is_safe_N.to(scores_N)
    return F.binary_cross_entropy_with_logits(scores_N, labels_N, reduction="sum") / total


def policy_loss(
    logprobs_N: Tensor,
    old_logprobs_N: Tensor,
    advantages_N: Tensor,
    clip_range: float,
    total: float,
) -> Tensor:
    """PPO's clipped surrogate, negated (Schulman et al. 2017, equation 7): the sum over `total`."""
    ratio = torch.exp(logprobs_N - old_logprobs_N)
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    return -torch.minimum(ratio * advantages_N, clipped * advantages_N).sum() / total


def value_loss(
    values_N: Tensor,
    old_values_N: Tensor,
    returns_N: Tensor,
    clip_range: float | None,
    total: float,
) -> Tensor:
    """Half the squared error to the returns: the sum over tokens over `total`.

    With `clip_range` the larger of that and the error of the value held within `clip_range` of the
    old one (the value clipping of PPO's published code).
    """
    error = (values_N - returns_N).square()
    if clip_range is not None:
        held = old_values_N + (values_N - old_values_N).clamp(-clip_range, clip_range)
        error = torch.maximum(error, (held - returns_N).square())
    return 0.5 * error.sum() / total
