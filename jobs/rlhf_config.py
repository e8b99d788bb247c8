"""The config of jobs/rlhf.py."""

from dataclasses import dataclass, field, replace
from pathlib import Path

from jobs import evaluate, ppo, training
from jobs.comparisons_config import ComparisonsConfig
from jobs.configs import JobConfig, PPOConfig, RewardModelConfig, SftConfig
from jobs.context_distillation_config import ContextDistillationConfig
from jobs.evaluate_config import EvaluateConfig
from jobs.ghost_attention_config import GhostAttentionConfig
from jobs.presets import Preset
from jobs.rejection_sampling_config import RejectionSamplingConfig
from jobs.sampling_config import MAY_CHANGE as SAMPLING_MAY_CHANGE

PLACES = ("cluster", "runs", "wandb_project")
MAY_CHANGE = (
    *PLACES,
    "annotations",
    *(
        f"{job}.{name}"
        for job, names in {
            "comparisons": SAMPLING_MAY_CHANGE,
            "helpfulness": training.MAY_CHANGE,
            "safety": training.MAY_CHANGE,
            "rejection_sampling": SAMPLING_MAY_CHANGE,
            "ghost_attention": SAMPLING_MAY_CHANGE,
            "context_distillation": SAMPLING_MAY_CHANGE,
            "sft": training.MAY_CHANGE,
            "ppo": ppo.MAY_CHANGE,
            "evaluate": evaluate.MAY_CHANGE,
        }.items()
        for name in names
    ),
)


@dataclass(frozen=True)
class RlhfConfig(JobConfig):
    """Rounds V1, V2, ... of human feedback (paper, section 3.2): new comparisons, new reward
    models, rejection sampling, and PPO in the last round. Of the stages' own options those that
    name runs, models, data and prompts are set by the loop, `seed` by this job's."""

    rounds: int = 5
    """Versions to make; the last one is trained by PPO, all others by rejection sampling."""
    data: Path | None = None
    """Folder that `prepare` made: its prompts are asked, and its dialogues and comparisons join. By
    default the preset's."""
    base: Path | None = None
    """Folder of the pretrained model; by default the preset's."""
    policy: Path | None = None
    """Folder of the SFT model, with which the first round begins; by default the preset's."""
    annotations: Path | None = None
    """Folder of people's ratings, v1.jsonl for the first round and so on; a round stops with a
    sentence that says which pairs wait for theirs. By default the gold judge of the synthetic world
    compares."""
    ghost_attention_after: int = 3
    """Version after which fine-tuning gets Ghost Attention's dialogues too; 0 for never."""
    distill: bool = False
    """Whether fine-tuning gets answers by context distillation."""
    safety_demonstrations: int = 0
    """Demonstrations of safe conduct, of the synthetic world, that join fine-tuning."""
    comparisons: ComparisonsConfig = field(default_factory=ComparisonsConfig)
    """How answers to compare are drawn."""
    helpfulness: RewardModelConfig = field(default_factory=RewardModelConfig)
    """How helpfulness reward models are trained."""
    safety: RewardModelConfig = field(default_factory=lambda: RewardModelConfig(kind="safety"))
    """How safety reward models are trained."""
    rejection_sampling: RejectionSamplingConfig = field(default_factory=RejectionSamplingConfig)
    """How answers to learn from are drawn."""
    ghost_attention: GhostAttentionConfig = field(default_factory=GhostAttentionConfig)
    """How dialogues under a standing instruction are held."""
    context_distillation: ContextDistillationConfig = field(
        default_factory=ContextDistillationConfig
    )
    """How safe answers are drawn, with `distill`."""
    sft: SftConfig = field(default_factory=SftConfig)
    """How each version is fine-tuned from the base model."""
    ppo: PPOConfig = field(default_factory=PPOConfig)
    """The last round."""
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    """How all versions are compared in the end."""

    def __post_init__(self) -> None:
        for name in ("ghost_attention_after", "safety_demonstrations"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, but is {getattr(self, name)}.")
        if not 1 <= self.rounds <= 99:
            raise ValueError(f"rounds must be from 1 to 99, not {self.rounds}.")
        for name, wanted in (("helpfulness", self.helpfulness), ("safety", self.safety)):
            if wanted.kind != name:
                raise ValueError(f"{name}.kind is {wanted.kind}; leave it out.")

    @staticmethod
    def of(preset: Preset) -> "RlhfConfig":
        """The defaults of a preset."""
        name = preset.ppo.preset
        small = name == "tiny"
        sampling = RejectionSamplingConfig.of(preset)
        compared = EvaluateConfig(
            preset=name,
            max_new_tokens=preset.ppo.max_new_tokens,
            most_prompts=1024 if small else 2000,
            conversations=60 if small else 100,
            where="here" if small else "cluster",
        )
        if small:
            # A million parameters err more at 1.2 than the best of many makes up for, and reward
            # models as small are fooled by the best of more than 4 (docs/rlhf.md).
            sampling = replace(sampling, num_prompts=5000, samples=4, temperatures=(0.7,))
        else:
            compared = replace(compared, generator=preset.ppo.generator)
        return RlhfConfig(
            preset=name,
            comparisons=ComparisonsConfig.of(preset),
            helpfulness=preset.helpfulness,
            safety=preset.safety,
            rejection_sampling=sampling,
            ghost_attention=GhostAttentionConfig.of(preset),
            context_distillation=ContextDistillationConfig.of(preset),
            sft=preset.sft,
            ppo=preset.ppo,
            evaluate=compared,
        )
