"""Advantages and whitening. Shapes: B batch, T tokens."""

from collections.abc import Callable

import torch
from torch import Tensor


def gae(
    rewards_BT: Tensor,
    values_BT: Tensor,
    mask_BT: Tensor,
    gamma: float,
    lam: float,
    bootstrap_B: Tensor | None = None,
) -> Tensor:
    """Generalised advantage estimates [B, T] (Schulman et al. 2016, equation 16), 0 where the mask
    is 0.

    rewards_BT: reward received after each action. values_BT: value of the state before it.
    mask_BT: 1 for actions; tokens with 0 are skipped, as though the sequence had been written
    without them. bootstrap_B: value of the state after the last action, 0 where the episode ended.
    """
    assert rewards_BT.shape == values_BT.shape == mask_BT.shape
    next_value = torch.zeros_like(rewards_BT[:, 0]) if bootstrap_B is None else bootstrap_B
    running = torch.zeros_like(next_value)
    advantages = torch.zeros_like(rewards_BT)
    for t in reversed(range(rewards_BT.shape[1])):
        acts = mask_BT[:, t].bool()
        error = rewards_BT[:, t] + gamma * next_value - values_BT[:, t]
        running = torch.where(acts, error + gamma * lam * running, running)
        next_value = torch.where(acts, values_BT[:, t], next_value)
        advantages[:, t] = torch.where(acts, running, 0)
    return advantages


def whiten(
    x: Tensor,
    mask: Tensor,
    all_reduce: Callable[[Tensor], Tensor] = lambda sums: sums,
    epsilon: float = 1e-8,
) -> Tensor:
    """Shift and scale the entries under `mask` to mean 0 and variance 1; 0 elsewhere.

    `all_reduce` adds a tensor of sums up over the ranks that share the batch. Constant entries
    become 0, not infinity: a variance below `epsilon` is taken for rounding.
    """
    kept = torch.where(mask.bool(), x, 0).double()
    count, total = all_reduce(torch.stack((mask.double().sum(), kept.sum())))
    mean = total / count.clamp(min=1)
    centred = torch.where(mask.bool(), x.double() - mean, 0)
    variance = all_reduce(centred.square().sum()[None])[0] / count.clamp(min=1)
    if variance < epsilon:
        return torch.zeros_like(x)
    return (centred / variance.sqrt()).to(x.dtype)


def group_relative(scores_B: Tensor, group_size: int, epsilon: float = 1e-4) -> Tensor:
    """GRPO's advantages [B]: (score - mean) / (standard deviation + epsilon) over the samples of a
    prompt (Shao et al. 2024, "DeepSeekMath", section 4.1.2).

    scores_B: samples of a prompt one after the other, `group_size` of each. The deviation is the
    sample's, with group_size - 1 below the sum of squares; equal scores give 0.
    """
    centred = _centred(scores_B, group_size)
    deviation = (centred.square().sum(dim=1, keepdim=True) / (group_size - 1)).sqrt()
    return (centred / (deviation + epsilon)).flatten()


def leave_one_out(scores_B: Tensor, group_size: int) -> Tensor:
    """RLOO's advantages [B]: score less the mean of the other samples of its prompt (Ahmadian et
    al. 2024, "Back to Basics", equation 9). As `group_relative` otherwise."""
    return (_centred(scores_B, group_size) * (group_size / (group_size - 1))).flatten()


def _centred(scores_B: Tensor, group_size: int) -> Tensor:
    """Scores less their group's mean, [groups, group_size]; exactly 0 where all are equal."""
    assert group_size > 1 and len(scores_B) % group_size == 0
    groups = scores_B.view(-1, group_size)
    shifted = groups - groups[:, :1]
    return shifted - shifted.mean(dim=1, keepdim=True)
