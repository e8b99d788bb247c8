"""The config of jobs/prepare.py: its command line, its documentation and its `config.yaml`."""

from dataclasses import dataclass, field
from pathlib import Path

from jobs.configs import JobConfig
from llama2.cleaning import CleaningSettings


@dataclass(frozen=True)
class PrepareConfig(JobConfig):
    """Turn records into tokenized, packed, memory-mapped rows. Without input files the records come
    from the synthetic world."""

    text: tuple[Path, ...] = ()
    """Files or folders of texts to pretrain on. Each is a source, named as the file or folder is,
    without extensions; paths of one name are one source."""
    dialogues: tuple[Path, ...] = ()
    """Files or folders of demonstrations for SFT."""
    helpfulness: tuple[Path, ...] = ()
    """Files or folders of comparisons for the helpfulness reward model."""
    safety: tuple[Path, ...] = ()
    """Files or folders of comparisons for the safety reward model."""
    prompts: tuple[Path, ...] = ()
    """Files or folders of prompts for PPO; any of the other forms will do."""
    mix: dict[str, float] = field(default_factory=dict)
    """Weights of the sources of text, as `--mix wiki 2 web 1`: shares of the final tokens. The
    least-used source is passed once, the others more often. By default each is passed once."""
    max_passes: float = 4.0
    """Most passes over a source that the mix may ask for. Up to 4 are nearly as good as new text
    (Muennighoff et al. 2023, "Scaling data-constrained language models")."""
    benchmarks: tuple[Path, ...] = ()
    """Files or folders of evaluation sets. Texts, and dialogues and comparisons by their prompts,
    are dropped where they hold a part of one."""
    cleaning: CleaningSettings = field(default_factory=CleaningSettings)
    """What is dropped of users' texts. Of dialogues and comparisons only repetitions and benchmarks
    are, and the world's records are taken as they are."""
    tokenizer: Path | None = None
    """Tokenizer to use: a `tokenizer.model` or a Hugging Face folder. By default a small one is
    trained on the input."""
    vocab_size: int = 1024
    """Size of the tokenizer that is trained."""
    context: int = 256
    """Longest row, in tokens."""
    heldout_share: float = 0.02
    """Share of the records that is kept for evaluation, chosen by a hash of their prompt or
    text."""
    world_seed: int = 0
    """Which synthetic world."""
    world_documents: int = 30_000
    """Pretraining documents from the world."""
    world_dialogues: int = 8_000
    """Demonstrations from the world."""
    world_comparisons: int = 10_000
    """Comparisons from the world, for each of the two reward models."""
    world_prompts: int = 20_000
    """Training prompts from the world."""
    world_heldout_prompts: int = 1024
    """Held-out prompts from the world."""
    part_bytes: int = 1 << 25
    """Bytes of input that a task takes at a time, and that a killed preparation may do again."""
    shard_tokens: int = 1 << 26
    """Most tokens in a shard, give or take a record."""
    cpus: float = 1.0
    """CPUs that each task reserves."""

    def __post_init__(self) -> None:
        if self.part_bytes < 1 or self.shard_tokens < 1:
            raise ValueError("part_bytes and shard_tokens must be at least 1.")
        if not 0 <= self.heldout_share < 1:
            raise ValueError(f"heldout_share is {self.heldout_share}; give a share from 0 to 1.")
