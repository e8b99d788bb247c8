"""Learning rates as pure functions of the step."""

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Schedule:
    """Linear warmup to `peak`, then constant, or a cosine down to `final` times the peak at
    `steps`.

    Called with the number of updates made so far, it gives the rate of the next one (paper, 2.2).
    """

    peak: float
    steps: int
    warmup: int = 0
    kind: Literal["cosine", "constant"] = "cosine"
    final: float = 0.1

    def __call__(self, step: int) -> float:
        if step < self.warmup:
            return self.peak * (step + 1) / self.warmup
        if self.kind == "constant":
            return self.peak
        progress = min(1.0, (step - self.warmup) / max(1, self.steps - self.warmup))
        return self.peak * (
            self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * progress))
        )
