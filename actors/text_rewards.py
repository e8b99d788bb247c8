"""A reward model that reads text, whoever wrote it: it has its own tokenizer and chat format."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from actors.backend import PRECISIONS
from llama2 import checkpoint, scoring
from llama2.chat import Message
from llama2.tokenizer import load_tokenizer
from llama2.transcripts import encode_answered


@dataclass(frozen=True)
class Reply:
    """A prompt with its answer; `finished` says whether it ended by itself."""

    prompt: tuple[Message, ...]
    answer: str
    finished: bool = True


class TextRewards:
    """The reward model of a folder, in this process."""

    def __init__(self, folder: Path, precision: str, threads: int) -> None:
        torch.set_num_threads(threads)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = PRECISIONS[precision]
        self._folder = folder
        self._model = checkpoint.load_scalar(folder, dtype=dtype, device=device).eval()
        self._tokenizer = load_tokenizer(folder)

    def scores(self, replies: Sequence[Reply]) -> list[float]:
        """The score of each answer to its prompt, before the sigmoid. Raises `ValueError` for one
        that is not finite."""
        context = self._model.config.max_position_embeddings
        tokens = [
            encode_answered(self._tokenizer, reply.prompt, reply.answer, reply.finished, context)
            for reply in replies
        ]
        found = scoring.last_scores(self._model, tokens)
        for reply, score in zip(replies, found, strict=True):
            if not math.isfinite(score):
                raise ValueError(
                    f"The reward model {self._folder} scores {reply.answer[:60]!r} as {score}; its "
                    "weights are damaged."
                )
        return found
