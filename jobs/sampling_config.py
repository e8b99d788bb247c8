"""What the jobs share that sample answers and score them."""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from actors.generator_config import GeneratorConfig
from actors.reward_function import ScorerLimits
from cluster.placement import Workers
from jobs.configs import JobConfig
from jobs.presets import Preset
from jobs.serve_config import Precision, default_precision
from llama2.generation import Sampling

MAY_CHANGE = (
    "cluster", "runs", "wandb_project", "rewards", "scorer", "timeout", "chunks_at_once",
    # Another backend draws other answers.
    *(f"generator.{field.name}" for field in fields(GeneratorConfig) if field.name != "backend"),
)  # fmt: skip


@dataclass(frozen=True)
class SamplingConfig(JobConfig):
    """A policy that answers, and the reward models that score its answers."""

    policy: Path | None = None
    """Folder of the model that answers; by default the preset's SFT model."""
    helpfulness_model: Path | None = None
    """Folder of the helpfulness reward model; by default the preset's."""
    safety_model: Path | None = None
    """Folder of the safety reward model; by default the preset's."""
    helpfulness_reward: str = ""
    """What scores in the helpfulness model's place: a Python function, as module:function, or the
    address of an HTTP scorer (actors/reward_function.py says what is asked of them)."""
    safety_reward: str = ""
    """The same in the safety model's place."""
    scorer: ScorerLimits = field(default_factory=ScorerLimits)
    """How long such rewards are waited for."""
    max_new_tokens: int = 1024
    """Longest answer. One that is cut off there is never learned."""
    chunk: int = 32
    """Prompts whose answers are written together, and that a stopped job may do again."""
    chunks_at_once: int = 4
    """Chunks that are under way at a time."""
    timeout: float = 1800.0
    """Seconds to wait for the generation, or the scoring, of a chunk."""
    precision: Precision = field(default_factory=default_precision)
    """Of all models' weights and computation."""
    generator: GeneratorConfig = field(default_factory=GeneratorConfig)
    """Replicas on Ray Serve."""
    rewards: Workers = field(default_factory=Workers)
    """Workers of each of the two reward models."""

    def check(self, temperatures: tuple[float, ...], **counts: int) -> None:
        """Raise `ValueError` for numbers that make no sense; `counts` must be at least 1."""
        for name, value in {
            "max_new_tokens": self.max_new_tokens,
            "chunk": self.chunk,
            "chunks_at_once": self.chunks_at_once,
            **counts,
        }.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}.")
        if self.timeout <= 0:
            raise ValueError(f"timeout must be positive, not {self.timeout:g}.")
        if not temperatures:
            raise ValueError("Give at least one temperature.")
        for temperature in temperatures:
            Sampling(temperature=temperature)


def defaults(preset: Preset) -> dict[str, Any]:
    """The values of the fields above for a preset: those of its PPO job."""
    ppo = preset.ppo
    return {
        "preset": ppo.preset,
        "max_new_tokens": ppo.max_new_tokens,
        "timeout": ppo.timeout,
        "precision": ppo.engine.precision,
        "generator": ppo.generator,
        "rewards": ppo.rewards,
    }
