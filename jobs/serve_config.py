"""The options of `jobs/serve.py`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from actors.generator_config import GeneratorConfig
from cluster.placement import fast_bfloat16
from cluster.session import ClusterConfig

Precision = Literal["float32", "bfloat16"]


def default_precision() -> Precision:
    """bfloat16 where this machine multiplies it in hardware."""
    return "bfloat16" if fast_bfloat16() else "float32"


def one_generator() -> GeneratorConfig:
    """A single replica with all cores of this machine, and a GPU where it has one."""
    return GeneratorConfig(gpus=float(torch.cuda.is_available()), threads=torch.get_num_threads())


@dataclass(frozen=True)
class ServeConfig:
    """A model as an HTTP endpoint."""

    model: Path
    """Folder of the model: Hugging Face's layout with a tokenizer, or Meta's."""
    model_name: str = ""
    """What callers name the model; by default its folder, or the run that made it."""
    host: str = "127.0.0.1"
    """Address to listen on: by default this machine alone can reach it."""
    port: int = 8000
    """Port to listen on; 0 takes a free one."""
    api_key_file: Path | None = None
    """File with the key that callers must send. By default that of the environment variable
    LLAMA2_API_KEY, if it is set."""
    without_key: bool = False
    """Listen beyond this machine even though no key is set."""
    drain_seconds: float = 60.0
    """How long answers under way may take to finish once the job is told to end."""
    precision: Precision = field(default_factory=default_precision)
    """Of weights and computation."""
    generator: GeneratorConfig = field(default_factory=one_generator)
    """Replicas on Ray Serve. With several of them on one machine, lower `threads`."""
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    """The Ray cluster."""

    def __post_init__(self) -> None:
        if not 0 <= self.port < 65536:
            raise ValueError(f"port must be between 0 and 65535, not {self.port}.")
        if self.drain_seconds < 0:
            raise ValueError(f"drain_seconds must not be negative, but is {self.drain_seconds:g}.")

    @property
    def name(self) -> str:
        """The model's name for callers: runs keep theirs in a folder called model."""
        folder = self.model.resolve()
        return self.model_name or (folder.parent if folder.name == "model" else folder).name
