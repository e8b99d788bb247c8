"""Losses as pure functions. Shapes: N tokens or pairs, D model width, V vocabulary.

Sums and means: every loss takes per-token or per-pair terms and a `total` to divide by, which the
caller sets to the count over the whole global batch, so that any split into micro-batches, ranks
and accumulation steps adds up to the same number.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100
CHUNK_LOGITS = 1 << 22  # logits held at a time: 16 MiB in float32


class _SelectedLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
        logprobs, normalizers = [], []
        for rows in _chunks(len(hidden_ND), len(weight_VD)):
            logits = (hidden_ND[rows] @ weight_VD.T).float()
            normalizer = logits.logsumexp(dim=-1)
            logprobs.append(logits.gather(1, targets_N[rows, None])[:, 0] - normalizer)
            normalizers.append(normalizer)
        ctx.save_for_backward(hidden_ND, weight_VD, targets_N, torch.cat(normalizers))
        return torch.cat(logprobs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        hidden_ND, weight_VD, targets_N, normalizers = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden_ND)
        grad_weight = torch.zeros_like(weight_VD, dtype=torch.float32)
        for rows in _chunks(len(hidden_ND), len(weight_VD)):
            logits = (hidden_ND[rows] @ weight_VD.T).float()
            grad_logits = logits.sub_(normalizers[rows, None]).exp_().neg_()
            grad_logits.scatter_add_(1, targets_N[rows, None], torch.ones_like(grad_logits[:, :1]))
            grad_logits.mul_(gradients[0][rows, None])
            cast = grad_logits.to(hidden_ND.dtype)
            grad_hidden[rows] = cast @ weight_VD
            grad_weight += cast.T @ hidden_ND[rows]
        return grad_hidden, grad_weight.to(weight_VD.dtype), None


def _chunks(tokens: int, vocabulary: int) -> list[slice]:
    size = max(1, CHUNK_LOGITS // vocabulary)
    return [slice(start, start + size) for start in range(0, max(tokens, 1), size)]


def selected_log_probs(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
    """Log-probability of each target under softmax(hidden @ weight.T): [N], float32, in nats.

    Logits exist for one chunk of tokens at a time, in the forward pass and, computed again, in the
    backward pass.
    """
    logprobs_N: Tensor = _SelectedLogProbs.apply(hidden_ND, weight_VD, targets_N)
    return logprobs_N


def next_token_loss(logprobs_N: Tensor, total: float) -> Tensor:
    """Cross-entropy: the negative log-probabilities summed and divided by `total` target tokens."""
    return -logprobs_N.sum() / total


def ranking_loss(chosen_N: Tensor, rejected_N: Tensor, margin_N: Tensor, total: float) -> Tensor:
    """-log sigmoid(r_chosen - r_rejected - margin) (paper, equation 2): the sum over `total`."""
    return -F.logsigmoid(chosen_N - rejected_N - margin_N).sum() / total


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
