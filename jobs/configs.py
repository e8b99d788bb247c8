"""The jobs' configs: each is its job's command line, its documentation and its `config.yaml`."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from actors.generator_config import GeneratorConfig
from actors.reward_function import ScorerLimits
from cluster.engine import EngineConfig
from cluster.placement import Workers
from cluster.session import ClusterConfig
from llama2.config import ModelConfig
from llama2.lora import LoraConfig
from llama2.ppo import PPOSettings


def default_runs() -> Path:
    """RUNS_DIR, or `runs` in this folder; `~/runs` where a submitted job's folder is a copy that
    Ray throws away."""
    if "RUNS_DIR" in os.environ:
        return Path(os.environ["RUNS_DIR"])
    submitted = "_ray_pkg_" in str(Path.cwd())
    return Path.home() / "runs" if submitted else Path("runs")


@dataclass(frozen=True)
class JobConfig:
    """What every job takes."""

    preset: str = "tiny"
    """Where all defaults come from: tiny, 7b, 13b, 34b or 70b."""
    name: str = ""
    """Name of the run; its folder continues a run of the same name. By default preset and stage."""
    runs: Path = field(default_factory=default_runs)
    """Folder of all runs: on a cluster of several nodes, one that all of them share."""
    seed: int = 0
    """Of weights, data order and sampling."""
    wandb_project: str = "llama2"
    """Project in W&B, which is offline unless WANDB_API_KEY is set."""
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    """The Ray cluster."""

    def run_name(self, stage: str) -> str:
        """The run's name, by default of preset and stage."""
        return self.name or f"{self.preset}-{stage}"


@dataclass(frozen=True)
class TrainConfig(JobConfig):
    """What pretraining, SFT and reward modelling share."""

    data: tuple[Path, ...] = ()
    """A folder that `prepare` made, or files of records, which are prepared first. By default the
    preset's own prepared data."""
    verify_data: bool = False
    """Compare the hashes of prepared data of more than 8 GiB too; of less they always are."""
    start: Path | None = None
    """Hugging Face or Meta folder of the model to start from. By default the stage before."""
    tokenizer: Path | None = None
    """Tokenizer of raw records; by default the one that lies beside the model or the data."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Shape of a model that starts from nothing; else the folder's own shape counts."""
    workers: Workers = field(default_factory=Workers)
    """The Ray Train group."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    """DeepSpeed and the optimizer."""
    peak_lr: float = 3e-4
    """Learning rate after warmup."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """Course of the learning rate after warmup; the cosine ends at 10% of the peak."""
    warmup_steps: int = 0
    """Steps of linear warmup."""
    steps: int = 0
    """Updates to make; 0 takes as many as `epochs` says."""
    epochs: float = 1.0
    """Passes over the data, where `steps` is 0."""
    batch_rows: int = 64
    """Rows (pairs, for a reward model) in a global batch."""
    micro_batch_tokens: int = 4096
    """Tokens, padding included, whose activations a worker holds at a time; a longer row goes by
    itself."""
    sequence_parallel: int = 1
    """Workers that share one row, each computing a part of its tokens: for contexts that one
    worker's memory does not hold. Must divide `workers.count` and the attention heads."""
    activation_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Train small updates of frozen weights instead of the weights, with far less memory."""
    eval_rows: int = 64
    """Held-out rows to evaluate on."""
    eval_every: int = 100
    """Steps between evaluations; 0 evaluates at the end only."""
    patience: int = 0
    """Evaluations without a better loss after which training stops early; 0 never does."""
    keep_best: bool | None = None
    """Whether the resulting model is the one with the lowest evaluation loss instead of the last;
    by default where `patience` is set."""
    save_every: int = 200
    """Steps between checkpoints."""
    keep_checkpoints: int = 2
    """Checkpoints to keep, the newest ones; the best is kept besides."""
    on_bad_loss: Literal["stop", "skip"] = "stop"
    """Where a loss or gradient is infinite or no number: stop, naming step and rows, or leave the
    step out with a warning."""


@dataclass(frozen=True)
class PretrainConfig(TrainConfig):
    """Next-token prediction on all tokens (paper, section 2)."""


@dataclass(frozen=True)
class SftConfig(TrainConfig):
    """Supervised fine-tuning: next-token prediction on answers (paper, section 3.1)."""


@dataclass(frozen=True)
class RewardModelConfig(TrainConfig):
    """A reward model from comparisons of answers (paper, section 3.2)."""

    kind: Literal["helpfulness", "safety"] = "helpfulness"
    """Which of the two reward models; names the part of prepared data that is read."""
    margin: Literal["none", "small", "large"] = "small"
    """Margin by rating inside the ranking loss (paper, table 27)."""
    safety_weight: float = 0.0
    """Weight of the auxiliary loss that teaches whether an answer is safe, where comparisons have
    safety labels (section 3.2.2)."""
    other_share: float = 0.0
    """Share of the training pairs that is drawn uniformly from other data than the model's own: a
    safety model's own is all safety data, a helpfulness model's all helpfulness data but
    `open_data`. In the paper 0.5 for helpfulness and 0.1 for safety."""
    open_data: tuple[str, ...] = ()
    """Helpfulness data sets, by the names that `prepare` shows, that are open data instead of one's
    own."""


@dataclass(frozen=True)
class PPOConfig(JobConfig):
    """Reinforcement learning with the paper's reward (section 3.2.3). Where the default policy or
    reward models are absent, the stages that make them run first."""

    policy: Path | None = None
    """Folder of the policy to start from; by default the preset's SFT model."""
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
    prompts: tuple[Path, ...] = ()
    """A folder that `prepare` made, or files of prompts. By default the preset's prepared data."""
    long_prompts: Literal["error", "drop"] = "error"
    """What to do with prompts that leave no room for an answer in the context."""
    heldout_prompts: int = 512
    """Most held-out prompts to evaluate on."""
    pretraining_data: Path | None = None
    """A folder that `prepare` made, whose pretraining rows are learnt from besides where
    `ppo.ptx_coefficient` is not 0. By default the preset's prepared data."""
    iterations: int = 300
    """Rounds of sampling and updating."""
    batch_size: int = 512
    """Samples per iteration, over all workers."""
    minibatch_size: int = 64
    """Samples per gradient step, over all workers."""
    micro_batch_size: int = 8
    """Samples whose activations a pass of a worker holds at a time. Passes of a lone worker on CPUs
    may run at the same time, each with one of its threads."""
    max_new_tokens: int = 1024
    """Longest answer."""
    temperature: float = 1.0
    """Of sampling. Other values than 1 make the samples off-policy."""
    lr: float = 1e-6
    """Constant learning rate of the policy."""
    value_lr: float = 1e-6
    """Constant learning rate of the value model."""
    ppo: PPOSettings = field(default_factory=PPOSettings)
    """PPO's own numbers."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    """DeepSpeed and the optimizer, for policy and value model alike. Its precision is that of
    generators, reference and reward workers too."""
    learner: Workers = field(default_factory=Workers)
    """The Ray Train group that holds policy and value model."""
    generator: GeneratorConfig = field(default_factory=GeneratorConfig)
    """Replicas on Ray Serve."""
    reference: Workers = field(default_factory=Workers)
    """Workers with the frozen initial policy."""
    rewards: Workers = field(default_factory=Workers)
    """Workers of each of the two reward models."""
    activation_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them."""
    eval_every: int = 20
    """Iterations between held-out evaluations."""
    patience: int = 0
    """Evaluations without a better held-out reward after which PPO stops early; the result is then
    the best policy that was evaluated. 0 never does, and the result is the last policy."""
    save_every: int = 20
    """Iterations between checkpoints."""
    keep_checkpoints: int = 2
    """Checkpoints to keep, the newest ones."""
    timeout: float = 1800.0
    """Seconds to wait for the generation and scoring of a batch, or for weights to be taken."""
