"""How many generators there are, and what each of them computes with."""

from dataclasses import dataclass
from typing import Literal

from cluster.placement import Workers


@dataclass(frozen=True)
class GeneratorConfig(Workers):
    """Replicas on Ray Serve; `count` is the fewest of them."""

    max_count: int = 0
    """Most replicas: more than `count` start while requests do not fit the batches of those that
    run. 0 keeps to `count`."""
    backend: Literal["own", "vllm"] = "own"
    """Engine of a replica: this project's own, or vLLM, an extra to install."""
    max_batch_size: int = 256
    """Requests that a replica computes at the same time; more of them wait in it."""
    cache_gib: float = 0.0
    """Memory for the keys and values of a replica's requests, in GiB; 0 decides by itself."""
    tensor_parallel: int = 1
    """GPUs that share one replica's model; more than 1 with vLLM only."""
    max_queued_requests: int = 1024
    """Calls that wait, per caller, for a replica with room; more are refused at once."""
    stuck_after: float = 300.0
    """Seconds without a finished step, or change of weights, after which a busy replica is taken
    for stuck and replaced."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_count and self.max_count < self.count:
            raise ValueError(
                f"max_count {self.max_count} is below count {self.count}; raise it, or give 0 to "
                "keep the number of generators fixed."
            )
        for name in ("max_batch_size", "tensor_parallel", "max_queued_requests"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}.")
        if self.cache_gib < 0:
            raise ValueError(f"cache_gib must not be negative, but is {self.cache_gib:g}.")
        if self.stuck_after <= 0:
            raise ValueError(f"stuck_after must be positive, not {self.stuck_after:g}.")
        if self.tensor_parallel > 1 and self.backend == "own":
            raise ValueError(
                f"tensor_parallel {self.tensor_parallel} needs the backend vllm; choose that, or 1."
            )

    @property
    def most(self) -> int:
        """The most replicas that may run."""
        return self.max_count or self.count
