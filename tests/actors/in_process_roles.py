"""Generators and reward workers without Ray: an engine of this process, and scores by rule."""

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from actors.generator import FROM_FOLDER
from actors.records import Request, Rollout, Sample, Scores
from actors.reward import scores_of
from actors.sampling import Origin, Roles, Sampler
from llama2 import checkpoint
from llama2.generation import Engine, Sampling
from llama2.prompting import Prompting
from llama2.tokenizer import load_tokenizer

Score = Callable[[Sample], float]


class Generators:
    """Answers as the engine does, and keeps the ids that it was asked."""

    def __init__(self, folder: Path) -> None:
        self.engine = Engine(checkpoint.load(folder).eval())
        self.asked: list[str] = []
        self.generate = SimpleNamespace(remote=self._generate)

    def _generate(self, requests: Sequence[Request], sampling: Sampling, wanted: Any) -> Any:
        self.asked += [request.id for request in requests]
        answer: asyncio.Future[Rollout] = asyncio.get_running_loop().create_future()
        done = self.engine.generate(
            [r.prompt.tolist() for r in requests], sampling, [r.seed for r in requests]
        )
        samples = tuple(
            Sample(
                request.id, request.prompt, np.array(found.tokens),
                np.array(found.logprobs, dtype=np.float32), FROM_FOLDER,
                "stop" if found.tokens[-1] in sampling.stop_ids else "length",
            )
            for request, found in zip(requests, done, strict=True)
        )  # fmt: skip
        answer.set_result(Rollout(samples, 0.0))
        return answer


class Scripted:
    """Says what `answer` says to the text of a prompt, by temperature and seed, and ends its
    turn."""

    def __init__(self, folder: Path, answer: Callable[[str, float, int], str]) -> None:
        self.tokenizer, self.answer = load_tokenizer(folder), answer
        self.calls = 0
        self.generate = SimpleNamespace(remote=self._generate)

    def _generate(self, requests: Sequence[Request], sampling: Sampling, wanted: Any) -> Any:
        self.calls += 1
        answered: asyncio.Future[Rollout] = asyncio.get_running_loop().create_future()
        samples = []
        for request in requests:
            prompt = self.tokenizer.decode(request.prompt.tolist())
            said = self.answer(prompt, sampling.temperature, request.seed)
            tokens = np.array([*self.tokenizer.encode(said), self.tokenizer.eos_id])
            logprobs = np.zeros(len(tokens), dtype=np.float32)
            made = (request.id, request.prompt, tokens, logprobs, FROM_FOLDER, "stop")
            samples.append(Sample(*made))  # type: ignore[arg-type]
        answered.set_result(Rollout(tuple(samples), 0.0))
        return answered


def worker(score: Score) -> Any:
    """A reward worker that scores by rule."""

    async def remote(rollout: Rollout) -> Scores:
        return scores_of(rollout, [score(sample) for sample in rollout.samples], "The scorer")

    return SimpleNamespace(score=SimpleNamespace(remote=remote))


def sampler_of(
    folder: Path,
    helpfulness: Score,
    safety: Score,
    seed: int = 0,
    max_new_tokens: int = 12,
    round: str = "here",
) -> tuple[Sampler, Generators]:
    """A sampler over a model's folder."""
    generators = Generators(folder)
    roles = Roles(generators, [worker(helpfulness)], [worker(safety)])
    prompting = Prompting.read(folder)
    made = Sampler(roles, prompting, Origin(round, "weights"), seed, max_new_tokens, 60.0)
    return made, generators
