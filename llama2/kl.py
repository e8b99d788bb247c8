"""Estimators of KL(policy || reference) from samples of the policy (Schulman, "Approximating KL"),
and the weight of a penalty on it.

All take log-probabilities of the sampled tokens, in nats, of any one shape.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

Estimator = Literal["k1", "k2", "k3"]


def k1(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """The log-ratio: unbiased, of high variance, may be negative."""
    return logprobs - reference_logprobs


def k2(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """Half the squared log-ratio: biased, of low variance."""
    return 0.5 * (logprobs - reference_logprobs).square()


def k3(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """r - 1 - log r with r = reference/policy: unbiased, never negative."""
    log_ratio = reference_logprobs - logprobs
    return torch.expm1(log_ratio) - log_ratio


ESTIMATORS: dict[Estimator, Callable[[Tensor, Tensor], Tensor]] = {"k1": k1, "k2": k2, "k3": k3}


def adapted(
    coefficient: float, divergence: float, target: float, horizon: float, samples: int
) -> float:
    """The next coefficient, after `samples` answers whose mean KL was `divergence`.

    The proportional controller of Ziegler et al. 2019 (section 2.2): with the error
    e = clip(divergence / target - 1, -0.2, 0.2), coefficient (1 + e samples / horizon).
    """
    error = min(max(divergence / target - 1, -0.2), 0.2)
    assert samples < 5 * horizon, "the coefficient could become 0, and would stay there"
    return coefficient * (1 + error * samples / horizon)
