"""The numbers of PPO."""

from dataclasses import dataclass


@dataclass(frozen=True)
class PPOSettings:
    """PPO's own numbers (paper, section 3.4.3; what it leaves open takes the usual choice)."""

    kl_coefficient: float = 0.01
    """Beta, the weight of the KL penalty: 0.01 for 7B and 13B, 0.005 for 34B and 70B."""
    clip_range: float = 0.2
    """How far the probability ratio may leave 1 before its gradient stops."""
    value_clip_range: float | None = 0.2
    """The same for values; None leaves them free."""
    gamma: float = 1.0
    """Discount per token."""
    lam: float = 0.95
    """Generalised advantage estimation's lambda."""
