"""Advantages and whitening. Shapes: B batch, T tokens."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
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
    acts_BT = mask_BT.bool()
    last_B = torch.zeros_like(values_BT[:, 0]) if bootstrap_B is None else bootstrap_B
    # The value at each token, or of the next action where it is none; behind all, the last one.
    known = F.pad(acts_BT, (0, 1), value=True)
    reached = torch.where(known, torch.cat((values_BT, last_B[:, None]), dim=1), 0)
    next_BT = _recurrence(reached, (~known).to(reached))[:, 1:]
    error_BT = torch.where(acts_BT, rewards_BT + gamma * next_BT - values_BT, 0)
    decay_BT = torch.where(acts_BT, gamma * lam, torch.ones_like(error_BT))
    return torch.where(acts_BT, _recurrence(error_BT, decay_BT), 0)


def _recurrence(x_BT: Tensor, factor_BT: Tensor) -> Tensor:
    """y[t] = x[t] + factor[t] y[t + 1], 0 behind the end, in log2(T) steps: after each, a token has
    summed up twice as many (Hillis and Steele 1986)."""
    reach = 1
    while reach < x_BT.shape[1]:
        near, far = slice(None, -reach), slice(reach, None)
        more_BT = factor_BT[:, near] * x_BT[:, far]
        x_BT = torch.cat((x_BT[:, near] + more_BT, x_BT[:, -reach:]), dim=1)
        factor_BT = F.pad(factor_BT[:, near] * factor_BT[:, far], (0, reach))
        reach *= 2
    return x_BT


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
