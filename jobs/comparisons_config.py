"""The config of jobs/comparisons.py."""

from dataclasses import dataclass
from pathlib import Path

from jobs.presets import Preset
from jobs.sampling_config import SamplingConfig, defaults


@dataclass(frozen=True)
class ComparisonsConfig(SamplingConfig):
    """Two answers to each prompt by two variants of a model, compared by an annotator (paper,
    section 3.2.1). The reward models and their scorers, named for other jobs that sample, have no
    part in it."""

    prompts: tuple[Path, ...] = ()
    """A folder that `prepare` made, or files of prompts. By default the preset's prepared data."""
    num_prompts: int = 5000
    """How many of them to answer, drawn by the seed."""
    variant: Path | None = None
    """Folder of the model that gives the second answer; by default the same as the first."""
    temperatures: tuple[float, float] = (1.0, 1.2)
    """Of the first and the second answer."""
    annotations: Path | None = None
    """File of ratings by people; it may be there only later, as the pairs to be rated are written
    first. By default the gold judge of the synthetic world compares."""

    def __post_init__(self) -> None:
        self.check(self.temperatures, num_prompts=self.num_prompts)
        if self.variant in (None, self.policy) and len(set(self.temperatures)) == 1:
            raise ValueError(
                f"Both answers come from one model at temperature {self.temperatures[0]:g} and are "
                "the same; give another temperature, or another model with --variant."
            )

    @staticmethod
    def of(preset: Preset) -> "ComparisonsConfig":
        """The defaults of a preset."""
        size = 3000 if preset.ppo.preset == "tiny" else 5000
        return ComparisonsConfig(**defaults(preset), num_prompts=size)
