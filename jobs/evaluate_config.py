"""The options of `jobs/evaluate.py`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from actors.generator_config import GeneratorConfig
from actors.reward_function import ScorerLimits
from jobs.configs import JobConfig
from jobs.serve_config import Precision, default_precision, one_generator
from llama2.generation import Sampling


@dataclass(frozen=True)
class EvaluateConfig(JobConfig):
    """Models side by side: their answers, their perplexity, and academic tasks."""

    models: tuple[Path, ...] = ()
    """What to evaluate: folders of models, or files with answers to the same prompts, as
    `jobs/generate.py` writes them."""
    against: Path | None = None
    """Model or answers that all others are compared with; by default the first of `models`. Every
    two are compared besides."""
    prompts: tuple[Path, ...] = ()
    """A folder that `prepare` made, or files of prompts, maybe with `category` and `safety`. By
    default the held-out prompts of the preset's prepared data."""
    most_prompts: int = 512
    """Most prompts to ask, drawn by `seed`; 0 asks none."""
    long_prompts: Literal["error", "drop"] = "error"
    """What to do with prompts that leave one of the models no room for an answer; all models are
    asked the same."""
    world_seed: int | None = None
    """Seed of the synthetic world whose gold judge judges; prepared data says it by itself."""
    helpfulness_model: Path | None = None
    """Folder of the helpfulness reward model; by default the preset's, where it is finished."""
    safety_model: Path | None = None
    """Folder of the safety reward model; by default the preset's, where it is finished."""
    helpfulness_reward: str = ""
    """What scores in the helpfulness model's place: a Python function, as module:function, or the
    address of an HTTP scorer (actors/reward_function.py says what is asked of them)."""
    safety_reward: str = ""
    """The same in the safety model's place."""
    scorer: ScorerLimits = field(default_factory=ScorerLimits)
    """How long such rewards are waited for."""
    texts: tuple[Path, ...] = ()
    """Files of documents or dialogues for perplexity, or folders of prepared rows. By default the
    held-out rows of the preset's prepared data."""
    most_texts: int = 512
    """Most texts of each of them; 0 leaves perplexity out."""
    conversations: int = 100
    """Conversations of several turns for Ghost-Attention adherence, with questions of the world or,
    where `constraints` are given, with the dialogues of `prompts`; 0 holds none."""
    constraints: Path | None = None
    """File of standing instructions with patterns, as `jobs/ghost_attention.py` takes them; by
    default the world's."""
    tasks: tuple[str, ...] = ()
    """Academic tasks of lm-evaluation-harness (mmlu, bbh, gsm8k, humaneval): names of tasks or
    groups, or yaml files. Needs the extra `eval`."""
    tasks_folder: Path | None = None
    """Folder with tasks of one's own, which come before the harness's of the same name."""
    most_documents: int = 0
    """Most questions of each task; 0 asks all."""
    num_fewshot: int | None = None
    """Examples before each question, where the task does not demand none; by default the task's
    own number."""
    chat_tasks: bool = False
    """Ask tasks in the chat format instead of as text to continue."""
    allow_code: bool = False
    """Let tasks such as humaneval run the code that a model writes, on this machine."""
    max_new_tokens: int = 256
    """Longest answer, as far as the model's context leaves room."""
    temperature: float = 1.0
    """Of answers to prompts; 0 takes the likeliest token each time. Tasks bring their own."""
    top_p: float = 1.0
    """Draw from the smallest set of likeliest tokens that has this probability."""
    where: Literal["here", "cluster"] = "here"
    """Compute in this process, or on replicas over a Ray cluster (`generator.count`, `cluster`)."""
    timeout: float = 3600.0
    """Seconds that replicas may take for all prompts, or for all texts of a kind."""
    precision: Precision = field(default_factory=default_precision)
    """Of weights and computation."""
    generator: GeneratorConfig = field(default_factory=one_generator)
    """The engine, in this process or in each replica; `count`, `cpus` and `gpus` are of replicas
    only. With several of them on one machine, lower `threads`."""

    def __post_init__(self) -> None:
        for name in ("most_prompts", "most_texts", "most_documents", "conversations"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, but is {getattr(self, name)}.")
        if self.num_fewshot is not None and self.num_fewshot < 0:
            raise ValueError(f"num_fewshot must not be negative, but is {self.num_fewshot}.")
        if self.timeout <= 0:
            raise ValueError(f"timeout must be positive, not {self.timeout:g}.")
        if self.generator.backend == "vllm" and self.where == "here":
            raise ValueError("vLLM runs in replicas only; add --where cluster.")
        self.sampling(())

    def sampling(self, stop_ids: tuple[int, ...]) -> Sampling:
        """How answers to prompts are drawn. Raises `ValueError` for values that make no sense."""
        return Sampling(
            temperature=self.temperature,
            top_p=self.top_p,
            max_new_tokens=self.max_new_tokens,
            stop_ids=stop_ids,
        )
