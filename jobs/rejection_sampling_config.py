"""The config of jobs/rejection_sampling.py."""

from dataclasses import dataclass
from pathlib import Path

from jobs.presets import Preset
from jobs.sampling_config import SamplingConfig, defaults


@dataclass(frozen=True)
class RejectionSamplingConfig(SamplingConfig):
    """The best of several answers to each prompt, as a data set for SFT (paper, section 3.2.3)."""

    prompts: tuple[Path, ...] = ()
    """A folder that `prepare` made, or files of prompts. By default the preset's prepared data."""
    num_prompts: int = 10_000
    """How many of them to answer, drawn by the seed."""
    samples: int = 10
    """Answers per prompt."""
    temperatures: tuple[float, ...] = (1.2,)
    """Of sampling. Of several, the one whose best of `samples` answers has the highest reward on
    `sweep_prompts` of the prompts is taken."""
    sweep_prompts: int = 256
    """Prompts to compare several temperatures on."""
    keep: int = 1
    """Most answers of a prompt to learn from, each another text."""
    prior: tuple[Path, ...] = ()
    """Folders of earlier runs of this job. What they kept is scored again and joins, with its
    earlier scores; of a prompt that occurs in several rounds, the best of all are kept."""

    def __post_init__(self) -> None:
        self.check(
            self.temperatures,
            num_prompts=self.num_prompts,
            samples=self.samples,
            sweep_prompts=self.sweep_prompts,
            keep=self.keep,
        )

    @staticmethod
    def of(preset: Preset) -> "RejectionSamplingConfig":
        """The defaults of a preset."""
        found = RejectionSamplingConfig(**defaults(preset))
        if preset.ppo.preset != "tiny":
            return found
        return RejectionSamplingConfig(
            **defaults(preset), num_prompts=2000, samples=8, temperatures=(1.0,)
        )
