"""The options of `jobs/generate.py`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from actors.generator_config import GeneratorConfig
from cluster.session import ClusterConfig
from jobs.serve_config import Precision, default_precision, one_generator
from llama2.generation import Sampling


@dataclass(frozen=True)
class GenerateConfig:
    """Answers of a model, to one prompt or to a file of them."""

    model: Path
    """Folder of the model: Hugging Face's layout with a tokenizer, or Meta's."""
    prompt: str = ""
    """One prompt, whose answers are printed."""
    input: Path | None = None
    """File of prompts instead: objects with `prompt` or `messages`, and maybe an `id`."""
    output: Path | None = None
    """File of JSON lines for the answers to `input`. A job that was stopped goes on behind what it
    has."""
    format: Literal["auto", "chat", "text"] = "auto"
    """How a prompt is asked: as a user's message, or as text to be continued. By default as a
    message where the model's folder has a chat template. `messages` are always a chat."""
    num_samples: int = 1
    """Answers per prompt."""
    max_new_tokens: int = 256
    """Longest answer, as far as the model's context leaves room."""
    temperature: float = 1.0
    """Of sampling; 0 takes the likeliest token each time."""
    top_p: float = 1.0
    """Draw from the smallest set of likeliest tokens that has this probability."""
    top_k: int = 0
    """Draw from that many likeliest tokens; 0 from all."""
    seed: int = 0
    """Of sampling: each answer follows from it, its id and its prompt, whatever else is asked."""
    where: Literal["here", "cluster"] = "here"
    """Compute in this process, or on replicas over a Ray cluster (`generator.count`, `cluster`)."""
    timeout: float = 3600.0
    """Seconds that replicas may take for 16 answers."""
    precision: Precision = field(default_factory=default_precision)
    """Of weights and computation."""
    generator: GeneratorConfig = field(default_factory=one_generator)
    """The engine, in this process or in each replica; `count`, `cpus` and `gpus` are of replicas
    only. With several of them on one machine, lower `threads`."""
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    """The Ray cluster."""

    def __post_init__(self) -> None:
        if bool(self.prompt) == (self.input is not None):
            raise ValueError("Give either --prompt TEXT or --input FILE.")
        if (self.input is None) != (self.output is None):
            raise ValueError("--input and --output belong together; give both or neither.")
        if self.input and self.output and self.input.resolve() == self.output.resolve():
            raise ValueError("--output would overwrite --input; name another file.")
        if self.num_samples < 1:
            raise ValueError(f"num_samples must be at least 1, not {self.num_samples}.")
        if self.timeout <= 0:
            raise ValueError(f"timeout must be positive, not {self.timeout:g}.")
        if self.where == "here" and self.generator.backend == "vllm":
            raise ValueError("vLLM runs in replicas only; add --where cluster.")
        self.sampling(())

    def sampling(self, stop_ids: tuple[int, ...]) -> Sampling:
        """What the engine is asked for. Raises `ValueError` for values that make no sense."""
        return Sampling(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            max_new_tokens=self.max_new_tokens,
            stop_ids=stop_ids,
        )
