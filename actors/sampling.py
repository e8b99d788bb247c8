"""Many answers a prompt from the generators, scored by the reward workers, without a learner.

What is drawn follows from the seed, the prompts' ids and the weights. Work is done in chunks, each
of which leaves one file of JSON lines, whole or not at all, and is not done again.
"""

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from ray.exceptions import RayTaskError

from actors.records import Request, Rollout, Sample, Scores
from actors.served_model import ServedModel
from cluster.run_directory import write_atomically
from cluster.weights import Version
from llama2.chat import Message, encode_dialogue, encode_prompt
from llama2.generation import Sampling
from llama2.prompting import Prompting, sample_seed
from llama2.rejection_sampling import Candidate
from llama2.rewards import composite, logit
from llama2.whole_files import whole_file

T = TypeVar("T")
Json = dict[str, Any]
FROM_ELSEWHERE = Version(-2, "")
"""The version of answers that these generators did not write."""


@dataclass(frozen=True)
class Question:
    """A prompt to answer. `id` names it for good, as its samples' draws follow from it; `scored_as`
    is the prompt that reward models see, where it is another than the policy's."""

    id: str
    messages: tuple[Message, ...]
    safety: bool
    scored_as: tuple[Message, ...] | None = None


@dataclass(frozen=True)
class Origin:
    """Whose answers they are: the run's name and a checksum of the policy's weights."""

    round: str
    model: str


@dataclass(frozen=True)
class Roles:
    """The Serve handle of the generators, and the workers of both reward models; none of these
    where answers need no scores."""

    generators: Any
    helpfulness: Sequence[Any]
    safety: Sequence[Any]


class Sampler:
    """Asks and scores. One of them may serve any number of callers at a time."""

    def __init__(
        self,
        roles: Roles,
        prompting: Prompting,
        origin: Origin,
        seed: int,
        max_new_tokens: int,
        timeout: float,
    ) -> None:
        self._roles, self._model = roles, ServedModel(roles.generators)
        self._prompting, self._origin = prompting, origin
        self._seed, self._max_new_tokens, self._timeout = seed, max_new_tokens, timeout
        self._turn = 0

    async def sample(
        self, questions: Sequence[Question], temperature: float, count: int = 1
    ) -> list[list[Candidate]]:
        """`count` answers to each question, with their scores; rewards are 0 where there are no
        reward workers.

        Raises `ValueError` for a prompt that leaves no room for an answer or a score that is no
        number, `TimeoutError` where generation or scoring takes too long.
        """
        if not questions:
            return []
        sampling = Sampling(
            temperature=temperature,
            max_new_tokens=self._max_new_tokens,
            stop_ids=self._prompting.stop_ids,
        )
        asked = [question for question in questions for _ in range(count)]
        requests = [
            request
            for question in questions
            for request in self._requests(question, sampling, count)
        ]
        samples = await self._wait(self._model.generate(requests, sampling), "generation")
        assert [sample.id for sample in samples] == [request.id for request in requests]
        scored = [
            sample
            if question.scored_as is None
            else replace(sample, prompt=self._tokens(question.scored_as))
            for question, sample in zip(asked, samples, strict=True)
        ]
        rewards = await self.rewards(scored, [question.safety for question in asked])
        found = [
            self._candidate(sample, temperature, scores)
            for sample, scores in zip(samples, rewards, strict=True)
        ]
        return [found[i : i + count] for i in range(0, len(found), count)]

    async def score_again(
        self, questions: Sequence[Question], candidates: Sequence[Candidate]
    ) -> list[Candidate]:
        """Candidates of an earlier round, one to each question, with the scores of these reward
        workers; `reward_then` keeps what they had."""
        samples = []
        for question, candidate in zip(questions, candidates, strict=True):
            answer = Message("assistant", candidate.response)
            dialogue = (*question.messages, answer)
            tokens = encode_dialogue(self._prompting.tokenizer, dialogue, "last").scored().tokens
            prompt = self._tokens(question.messages)
            samples.append(
                Sample(
                    id=candidate.id,
                    prompt=prompt,
                    response=np.array(tokens[len(prompt) :], dtype=np.int64),
                    logprobs=np.zeros(len(tokens) - len(prompt), dtype=np.float32),
                    version=FROM_ELSEWHERE,
                    finish_reason="stop",
                )
            )
        rewards = await self.rewards(samples, [question.safety for question in questions])
        return [
            replace(
                candidate,
                reward=reward,
                helpfulness=helpfulness,
                safety=safety,
                reward_then=candidate.reward
                if candidate.reward_then is None
                else candidate.reward_then,
            )
            for candidate, (reward, helpfulness, safety) in zip(candidates, rewards, strict=True)
        ]

    def room(self, messages: Sequence[Message]) -> int:
        """Tokens that a prompt leaves for an answer; none or fewer where it cannot be asked."""
        return self._prompting.context - len(self._tokens(messages))

    def _tokens(self, messages: Sequence[Message]) -> Any:
        tokens = encode_prompt(self._prompting.tokenizer, messages)
        return np.array(tokens, dtype=np.int64)

    def _requests(self, question: Question, sampling: Sampling, count: int) -> list[Request]:
        prompt = np.array(self._prompting.encode_chat(question.messages), dtype=np.int64)
        drawn = f"{question.id}/{sampling.temperature:g}"
        return [
            Request(f"{drawn}/{number}", prompt, sample_seed(self._seed, drawn, number))
            for number in range(count)
        ]

    async def rewards(
        self, samples: Sequence[Sample], tags: Sequence[bool]
    ) -> list[tuple[float, float, float]]:
        """Composite reward, helpfulness and safety of each sample, the latter two before the
        sigmoid. Raises the workers' `ValueError`, as for a score that is not finite."""
        roles = self._roles
        if not roles.helpfulness:
            return [(0.0, 0.0, 0.0)] * len(samples)
        rollout = Rollout(tuple(samples), 0.0)
        self._turn += 1
        calls = (
            workers[self._turn % len(workers)].score.remote(rollout)
            for workers in (roles.helpfulness, roles.safety)
        )
        try:
            several: list[Scores] = await self._wait(asyncio.gather(*calls), "scoring")
        except RayTaskError as error:  # what a user can mend is said without the worker's trace
            raise (error.cause if isinstance(error.cause, ValueError) else error) from None
        helpfulness, safety = (torch.tensor(s.scores, dtype=torch.float64) for s in several)
        combined = logit(composite(helpfulness.sigmoid(), safety.sigmoid(), torch.tensor(tags)))
        rows = zip(combined.tolist(), helpfulness.tolist(), safety.tolist(), strict=True)
        return list(rows)

    def _candidate(
        self, sample: Sample, temperature: float, scores: tuple[float, float, float]
    ) -> Candidate:
        stops = self._prompting.stop_ids
        answer = [token for token in sample.response.tolist() if token not in stops]
        reward, helpfulness, safety = scores
        return Candidate(
            id=sample.id,
            response=self._prompting.tokenizer.decode(answer).strip(),
            temperature=temperature,
            reward=reward,
            helpfulness=helpfulness,
            safety=safety,
            finished=sample.finished,
            tokens=len(sample.response),
            logprob=float(sample.logprobs.sum(dtype="float64")),
            round=self._origin.round,
            model=self._origin.model,
        )

    async def _wait(self, work: Awaitable[T], what: str) -> T:
        try:
            return await asyncio.wait_for(work, self._timeout)
        except TimeoutError as error:
            raise TimeoutError(
                f"The {what} of a chunk took more than {self._timeout:g} s; give it more time with "
                "--timeout, or make chunks smaller with --chunk."
            ) from error


async def run_chunks(
    folder: Path,
    identity: Json,
    chunks: Sequence[Sequence[T]],
    work: Callable[[Sequence[T]], Awaitable[list[Json]]],
    at_once: int,
) -> None:
    """Have `work` make the JSON lines of every chunk, `at_once` of them at a time, in
    `folder/000000.jsonl` and so on. Files that are there are left as they are.

    identity: all that the lines follow from. Raises `ValueError` where the folder holds lines of
    another identity, and what `work` raises, after the other chunks have been cancelled.
    """
    _claim(folder, identity)
    waiting = [i for i in range(len(chunks)) if not chunk_file(folder, i).exists()]
    places = iter(waiting)

    async def worker() -> None:
        for i in places:
            lines = await work(chunks[i])
            text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            with whole_file(chunk_file(folder, i)) as file:
                file.write(text.encode("utf-8", "backslashreplace"))

    workers = [asyncio.create_task(worker()) for _ in range(min(at_once, len(waiting)))]
    try:
        await asyncio.gather(*workers)
    finally:
        for task in workers:
            task.cancel()
        await asyncio.gather(*workers, return_exceptions=True)


def chunk_file(folder: Path, number: int) -> Path:
    """Where the lines of a chunk lie."""
    return folder / f"{number:06d}.jsonl"


def read_chunks(folder: Path) -> list[Json]:
    """The lines of all chunks, in order."""
    files = sorted(folder.glob("[0-9]*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_bytes().splitlines()]


def _claim(folder: Path, identity: Json) -> None:
    path = folder / "identity.json"
    plain = json.loads(json.dumps(identity))
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(plain, indent=2) + "\n")
        return
    before = json.loads(path.read_text("utf-8"))
    for name in {**before, **plain}:
        if before.get(name) != plain.get(name):
            raise ValueError(
                f"{folder} was begun with another {name} ({before.get(name)!r}, now "
                f"{plain.get(name)!r}); set it back to continue, or give another run name."
            )
