"""Early stopping on held-out prompts (paper, section 3.4.3)."""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class HeldOut:
    """How the evaluations of a run went."""

    best: float | None = None
    """Highest mean reward on held-out prompts; None before the first evaluation."""
    best_step: int = 0
    stale: int = 0
    """Evaluations since then."""

    def evaluated(self, step: int, reward: float) -> "HeldOut":
        """After the evaluation of `step`. Of equal ones the first is best."""
        if self.best is None or reward > self.best:
            return HeldOut(reward, step)
        return replace(self, stale=self.stale + 1)
