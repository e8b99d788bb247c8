"""The reward workers: one reads helpfulness, another safety."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import ray
import torch

from actors.records import Rollout, Sample, Scores
from llama2 import checkpoint
from llama2.batches import TokenArray
from llama2.records import Prompt
from llama2.scoring import last_scores
from llama2.tokenizer import load_tokenizer
from llama2.transcripts import Transcripts, encode_answered


@dataclass(frozen=True)
class Asked:
    """What the policy is asked, for scorers that read text: its tokenizer, and all its prompts."""

    tokenizer: Path
    prompts: tuple[Prompt, ...]

    def transcripts(self) -> Transcripts:
        """Samples as dialogues."""
        return Transcripts(load_tokenizer(self.tokenizer), self.prompts)


@ray.remote(max_restarts=-1, max_task_retries=3)
class Reward:
    """Stateless: a restarted worker reads the same folder and gives the same scores."""

    def __init__(
        self, folder: Path, dtype: torch.dtype, threads: int, asked: Asked | None = None
    ) -> None:
        """asked: where the reward model has another tokenizer than the policy; its samples' text is
        then encoded again."""
        torch.set_num_threads(threads)
        self._folder = folder
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self._model = checkpoint.load_scalar(folder, dtype=dtype, device=device).eval()
        self._tokenizer = load_tokenizer(folder)
        self._transcripts = None if asked is None else asked.transcripts()

    def score(self, rollout: Rollout) -> Scores:
        """The score read at the last token of each answer, before the sigmoid. Raises `ValueError`
        for one that is not finite."""
        scores = last_scores(self._model, [self._tokens(sample) for sample in rollout.samples])
        return scores_of(rollout, scores, f"The reward model {self._folder}")

    def _tokens(self, sample: Sample) -> TokenArray:
        context = self._model.config.max_position_embeddings
        if self._transcripts is None:
            return sample.tokens[-context:]
        prompt = self._transcripts.prompt(sample.prompt)
        answer = self._transcripts.answer(sample.response)
        return np.array(
            encode_answered(self._tokenizer, prompt, answer, sample.finished, context),
            dtype=np.int64,
        )


def scores_of(rollout: Rollout, scores: Sequence[float], scorer: str) -> Scores:
    """Scores of a rollout's samples, in their order. Raises `ValueError`, naming `scorer`, where
    one is not finite."""
    samples = rollout.samples
    assert len(scores) == len(samples)
    for sample, score in zip(samples, scores, strict=True):
        if not math.isfinite(score):
            raise ValueError(
                f"{scorer} scores the answer {sample.id} as {score}; a score must be a finite "
                "number."
            )
    return Scores(
        ids=tuple(sample.id for sample in samples),
        scores=tuple(scores),
        lengths=tuple(len(sample.tokens) for sample in samples),
        written=tuple(len(sample.response) for sample in samples),
        versions=tuple(sample.version for sample in samples),
        finished=tuple(sample.finished for sample in samples),
        generation_seconds=rollout.seconds,
    )
