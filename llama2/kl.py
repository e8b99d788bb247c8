"""Estimators of KL(policy || reference) from samples of the policy (Schulman, "Approximating KL").

All take log-probabilities of the sampled tokens, in nats, of any one shape.
"""

import torch
from torch import Tensor


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
