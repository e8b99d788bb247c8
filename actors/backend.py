"""What a generator's replica computes with, and this project's own engine in that place."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch

from actors.generator_config import GeneratorConfig
from cluster.loading import Loader
from cluster.weights import Snapshot, Version
from llama2 import checkpoint
from llama2.config import ModelConfig
from llama2.generation import Engine, Sampling, Token
from llama2.generation.runner import bytes_per_token

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Backend(Protocol):
    """An engine with continuous batching. All calls come from one thread."""

    @property
    def busy(self) -> bool:
        """Whether a request is unfinished."""

    def submit(self, id: str, prompt: Sequence[int], sampling: Sampling, seed: int) -> None:
        """Take a request; draws depend on its seed alone.

        Raises `ValueError` for a prompt that is empty, too long, or not of the vocabulary. No other
        unfinished request has this id.
        """

    def step(self) -> list[Token]:
        """One forward pass over what runs: the next tokens, at most one per request."""

    def cancel(self, id: str) -> None:
        """Forget a request, of which no token comes after; one that is not there is ignored."""

    def load(self, snapshot: Snapshot) -> Version:
        """Take these weights, while not busy. Returns what is held now, summed up afresh."""


class OwnBackend:
    """`llama2.generation.Engine` on the model of a folder."""

    def __init__(self, folder: Path, config: GeneratorConfig, precision: str) -> None:
        torch.set_num_threads(config.threads)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self._model = checkpoint.load(folder, dtype=PRECISIONS[precision], device=device).eval()
        self._loader = Loader(self._model)
        self._engine = Engine(
            self._model,
            config.max_batch_size,
            cache_tokens(self._model.config, config.cache_gib, PRECISIONS[precision]),
        )

    @property
    def busy(self) -> bool:
        """Whether a request is unfinished."""
        return self._engine.busy

    def submit(self, id: str, prompt: Sequence[int], sampling: Sampling, seed: int) -> None:
        """Take a request."""
        self._engine.submit(id, prompt, sampling, seed)

    def step(self) -> list[Token]:
        """The next tokens of what runs."""
        return self._engine.step()

    def cancel(self, id: str) -> None:
        """Forget a request."""
        self._engine.cancel(id)

    def load(self, snapshot: Snapshot) -> Version:
        """Compute with these weights, and forget what the cache holds of the old ones."""
        version = self._loader.load(snapshot)
        self._engine.weights_changed()
        return version


def cache_tokens(config: ModelConfig, gib: float, dtype: torch.dtype) -> int | None:
    """Tokens whose keys and values fit into `gib` GiB; None, the engine's own choice, for 0.

    Raises `ValueError` where not even one context fits.
    """
    if not gib:
        return None
    entry = bytes_per_token(config, dtype)
    found = int(gib * 2**30 / entry)
    if found < config.max_position_embeddings:
        needed = config.max_position_embeddings * entry / 2**30
        raise ValueError(
            f"cache_gib {gib:g} is less than one context of {config.max_position_embeddings} "
            f"tokens takes ({needed:.3g} GiB); give more."
        )
    return found
