"""The config of jobs/context_distillation.py."""

from dataclasses import dataclass
from pathlib import Path

from jobs.presets import Preset
from jobs.sampling_config import SamplingConfig, defaults


@dataclass(frozen=True)
class ContextDistillationConfig(SamplingConfig):
    """Safe answers drawn under a safety preprompt, to be learned without it (paper, section
    4.2.4)."""

    prompts: tuple[Path, ...] = ()
    """A folder that `prepare` made, or files of prompts, maybe with a `category`. Those tagged for
    safety are taken. By default the preset's prepared data."""
    num_prompts: int = 2000
    """How many adversarial prompts to answer, drawn by the seed."""
    preprompts: Path | None = None
    """File of preprompts: objects with `text`, and with `category` where it is for the prompts of
    that category alone. By default the synthetic world's with its prompts, else built-in ones."""
    temperature: float = 1.0
    """Of sampling."""
    gate: bool = True
    """Keep an answer only where the safety reward rises above the original answer's; else keep them
    all, which the paper found to make answers vague."""

    def __post_init__(self) -> None:
        self.check((self.temperature,), num_prompts=self.num_prompts)

    @staticmethod
    def of(preset: Preset) -> "ContextDistillationConfig":
        """The defaults of a preset."""
        size = 400 if preset.ppo.preset == "tiny" else 2000
        return ContextDistillationConfig(**defaults(preset), num_prompts=size)
