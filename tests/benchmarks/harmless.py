"""A safety reward for benchmarks with a single reward model."""

from collections.abc import Sequence
from typing import Any


def safe(prompts: Sequence[Any], answers: Sequence[str]) -> list[float]:
    """Every answer is safe, so that its helpfulness counts."""
    return [2.0] * len(answers)
