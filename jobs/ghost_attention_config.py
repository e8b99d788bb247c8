"""The config of jobs/ghost_attention.py."""

from dataclasses import dataclass
from pathlib import Path

from jobs.presets import Preset
from jobs.sampling_config import SamplingConfig, defaults


@dataclass(frozen=True)
class ConversationConfig(SamplingConfig):
    """Conversations in which an instruction holds."""

    prompts: tuple[Path, ...] = ()
    """A folder that `prepare` made, or files of dialogues, of which the user's turns are taken. By
    default the preset's prepared data."""
    constraints: Path | None = None
    """File of constraints to draw instructions from: objects with `kind`, `instructions`, `short`,
    and maybe `pattern`, a regular expression that tells whether an answer keeps to it. By default
    those of the synthetic world with its prompts, and for others a list of hobbies, languages and
    public figures."""
    most_constraints: int = 2
    """Most constraints to combine in one instruction, each of another kind."""
    conversations: int = 1000
    """How many conversations to hold, drawn by the seed."""
    turns: int = 6
    """Most turns, a question with its answer, in a conversation."""
    temperature: float = 1.0
    """Of sampling."""

    def __post_init__(self) -> None:
        self.check(
            (self.temperature,),
            most_constraints=self.most_constraints,
            conversations=self.conversations,
            turns=self.turns,
        )


@dataclass(frozen=True)
class GhostAttentionConfig(ConversationConfig):
    """Dialogues that teach to keep an instruction over many turns (paper, section 3.3)."""

    samples: int = 4
    """Answers to draw at each turn, of which the best by reward is kept; with 1 there is no need of
    reward models."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check((self.temperature,), samples=self.samples)

    @staticmethod
    def of(preset: Preset) -> "GhostAttentionConfig":
        """The defaults of a preset."""
        size = 400 if preset.ppo.preset == "tiny" else 1000
        return GhostAttentionConfig(**defaults(preset), conversations=size)
