"""A model while it is evaluated: it answers, and says how likely texts are. In this process, or on
workers of a cluster."""

import asyncio
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import ray
import torch
from ray import serve

from actors.backend import PRECISIONS, cache_tokens
from actors.generator import deploy
from actors.generator_config import GeneratorConfig
from actors.records import Request
from actors.served_model import ServedModel
from llama2 import checkpoint, scoring
from llama2.batches import TokenSequence
from llama2.generation import Engine, Sampling
from llama2.prompting import Prompting
from llama2.scoring import Likelihood
from llama2.text_stream import TextStream

Pair = tuple[Sequence[int], Sequence[int]]


@dataclass(frozen=True)
class Question:
    """Token ids to continue; the seed decides the draws, and the answer ends before any string of
    `stop`."""

    tokens: Sequence[int]
    sampling: Sampling
    seed: int = 0
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Continuation:
    """What a model wrote: its text without stop tokens, and its tokens with them."""

    text: str
    tokens: tuple[int, ...]
    finish_reason: Literal["stop", "length"]


class MeasuredModel(Protocol):
    """What evaluation asks of a model."""

    def answer(self, questions: Sequence[Question]) -> list[Continuation]:
        """An answer to each question, in order."""

    def continuations(self, pairs: Sequence[Pair]) -> list[Likelihood]:
        """As `llama2.scoring.continuations`."""

    def sequence_logprobs(self, sequences: Sequence[TokenSequence]) -> list[float]:
        """As `llama2.scoring.sequence_logprobs`."""

    def close(self) -> None:
        """Let go of what computes."""


class LocalModel:
    """In this process, with all it has: the weights are there once for all kinds of questions."""

    def __init__(self, folder: Path, precision: str, config: GeneratorConfig) -> None:
        torch.set_num_threads(config.threads)
        self._prompting = Prompting.read(folder)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = PRECISIONS[precision]
        self._model = checkpoint.load(folder, dtype=dtype, device=device).eval()
        self._rows = config.max_batch_size
        self._cache = cache_tokens(self._model.config, config.cache_gib, dtype)

    def answer(self, questions: Sequence[Question]) -> list[Continuation]:
        """An answer to each question, in order. Raises `ValueError` as `Engine.submit` does."""
        engine = Engine(self._model, self._rows, self._cache)
        drawn: list[list[int]] = [[] for _ in questions]
        streams: dict[int, TextStream] = {}
        ended: list[Literal["stop", "length"]] = ["length"] * len(questions)
        for number, asked in enumerate(questions):
            engine.submit(str(number), asked.tokens, asked.sampling, asked.seed)
            if asked.stop:
                streams[number] = TextStream(self._prompting.tokenizer, asked.stop)
        while engine.busy:
            for token in engine.step():
                number = int(token.id)
                drawn[number].append(token.token)
                if token.finish_reason is not None:
                    ended[number] = token.finish_reason
                elif number in streams:
                    streams[number].add(token.token)
                    if streams[number].stopped:  # the rest would be cut off
                        engine.cancel(token.id)
                        ended[number] = "stop"
        return [
            continuation(self._prompting, asked, tokens, reason)
            for asked, tokens, reason in zip(questions, drawn, ended, strict=True)
        ]

    def continuations(self, pairs: Sequence[Pair]) -> list[Likelihood]:
        """How likely each continuation is behind its context."""
        return scoring.continuations(self._model, pairs)

    def sequence_logprobs(self, sequences: Sequence[TokenSequence]) -> list[float]:
        """How likely the targets of each sequence are."""
        return scoring.sequence_logprobs(self._model, sequences)

    def close(self) -> None:
        """Nothing is held but memory, which goes with this object."""


class ClusterModel:
    """Generators on Ray Serve while it answers, workers that score while it is asked how likely
    texts are; never both at once, so that each may take the whole cluster."""

    def __init__(
        self, folder: Path, precision: str, config: GeneratorConfig, timeout: float
    ) -> None:
        self._folder, self._precision = folder.absolute(), precision
        self._config, self._timeout = config, timeout
        self._prompting = Prompting.read(folder)
        self._served: tuple[str, ServedModel] | None = None
        self._workers: list[Any] = []

    def answer(self, questions: Sequence[Question]) -> list[Continuation]:
        """An answer to each question, in order. Raises `TimeoutError` where they take longer than
        the time-out, and what the replicas raise."""
        by_sampling: dict[Sampling, list[int]] = {}
        for number, asked in enumerate(questions):
            by_sampling.setdefault(asked.sampling, []).append(number)
        found: dict[int, Continuation] = {}
        for sampling, numbers in by_sampling.items():
            requests = [
                Request(str(i), np.array(questions[i].tokens, dtype=np.int64), questions[i].seed)
                for i in numbers
            ]
            for sample in asyncio.run(self._generate(requests, sampling)):
                i = int(sample.id)
                tokens = sample.response.tolist()
                found[i] = continuation(self._prompting, questions[i], tokens, sample.finish_reason)
        return [found[i] for i in range(len(questions))]

    async def _generate(self, requests: Sequence[Request], sampling: Sampling) -> Any:
        work = self._generators().generate(requests, sampling)
        try:
            return await asyncio.wait_for(work, self._timeout)
        except TimeoutError as error:
            raise TimeoutError(
                f"The generators of {self._folder} did not answer {len(requests)} prompts within "
                f"{self._timeout:g} s; give them more time with --timeout."
            ) from error

    def continuations(self, pairs: Sequence[Pair]) -> list[Likelihood]:
        """How likely each continuation is behind its context."""
        return self._score(pairs, lambda worker, part: worker.continuations.remote(part))

    def sequence_logprobs(self, sequences: Sequence[TokenSequence]) -> list[float]:
        """How likely the targets of each sequence are."""
        return self._score(sequences, lambda worker, part: worker.sequence_logprobs.remote(part))

    def _score(self, items: Sequence[Any], ask: Callable[[Any, Sequence[Any]], Any]) -> list[Any]:
        # Neighbours stay together: they often share their context, and then its computation.
        size = max(1, -(-len(items) // self._config.count))
        parts = [items[start : start + size] for start in range(0, len(items), size)]
        calls = [ask(worker, part) for worker, part in zip(self._scorers(), parts, strict=False)]
        try:
            return list(chain.from_iterable(ray.get(calls, timeout=self._timeout)))
        except ray.exceptions.GetTimeoutError as error:
            raise TimeoutError(
                f"{len(items)} texts were not scored by {self._folder} within {self._timeout:g} s; "
                "give them more time with --timeout."
            ) from error

    def _generators(self) -> ServedModel:
        if self._served is None:
            self.close()
            name = f"evaluate-{uuid.uuid4().hex[:8]}"
            handle = deploy(name, self._folder, None, self._precision, self._config)
            self._served = name, ServedModel(handle)
        return self._served[1]

    def _scorers(self) -> list[Any]:
        if not self._workers:
            self.close()
            role: Any = ray.remote(LocalModel)
            options = self._config.actor_options() | {"max_restarts": 3, "max_task_retries": 3}
            self._workers = [
                role.options(**options).remote(self._folder, self._precision, self._config)
                for _ in range(self._config.count)
            ]
        return self._workers

    def close(self) -> None:
        """End generators and workers."""
        if self._served is not None:
            serve.delete(self._served[0])
            self._served = None
        for worker in self._workers:
            ray.kill(worker)
        self._workers = []


def continuation(
    prompting: Prompting,
    asked: Question,
    tokens: Sequence[int],
    finish_reason: Literal["stop", "length"],
) -> Continuation:
    """An answer's text as it reads behind its prompt, up to the first string of `asked.stop`."""
    stream = TextStream(prompting.tokenizer, asked.stop)
    kept = [token for token in tokens if token not in prompting.stop_ids]
    text = "".join(map(stream.add, kept)) + stream.close()
    return Continuation(text, tuple(tokens), "stop" if stream.stopped else finish_reason)
