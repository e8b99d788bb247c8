"""The rollout coordinator: asks the generators for answers and the scorers for their worth, and
deals the samples out to the learner's workers. It handles references and scalars, not tokens."""

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import ray
import torch

from actors.judge import Judge
from actors.records import MiniBatch, Place, ReferenceLogprobs, Request, Rollout, Scores, Share
from actors.replica_load import expected_tokens
from actors.retrying import cancelled_with_caller, until_answered
from cluster.run_directory import RunDirectory, write_atomically
from cluster.weights import Version
from llama2.advantages import whiten
from llama2.chat import encode_prompt
from llama2.evaluation import Judged, summary
from llama2.generation import Sampling
from llama2.packing import balance, sample_order, shuffled
from llama2.ppo import PPOSettings
from llama2.records import Prompt
from llama2.rewards import composite, logit
from llama2.tokenizer import load_tokenizer

T = TypeVar("T")
ATTEMPTS = 5


class StaleSamples(RuntimeError):
    """The generators keep answering with other weights than the learner's."""


@dataclass(frozen=True)
class RolloutTask:
    """What the coordinator must know of a run."""

    run: RunDirectory
    tokenizer: Path
    prompts: tuple[Prompt, ...]
    heldout: tuple[Prompt, ...]
    batch_size: int
    minibatch_size: int
    sampling: Sampling
    seed: int
    world_seed: int | None
    """Seed of the synthetic world whose gold judge evaluates; None for users' own prompts."""
    timeout: float
    """Seconds to wait for generation and scoring of a batch."""
    ppo: PPOSettings
    in_turn: bool = False
    """Whether the reference begins when the rewards are there, since it computes on the same
    processors."""


@dataclass(frozen=True)
class Chunk:
    """Samples of one generator call, by reference, with their scores."""

    rollout: "ray.ObjectRef[Rollout]"
    reference: "ray.ObjectRef[ReferenceLogprobs]"
    helpfulness: Scores
    safety: Scores


@dataclass(frozen=True)
class Answers:
    """Samples for a list of requests, dealt over chunks."""

    chunks: list[Chunk]
    places: list[tuple[int, int]]
    """Chunk and row of each request's sample, in the order of the requests."""
    refused: int
    """Samples that were drawn with other weights and asked for again."""

    def of(self, values: Callable[[Chunk], Sequence[T]]) -> list[T]:
        """A value per sample, in the order of the requests, from each chunk's values."""
        found = [values(chunk) for chunk in self.chunks]
        return [found[chunk][row] for chunk, row in self.places]


@dataclass(frozen=True)
class Batch:
    """All samples of an iteration."""

    iteration: int
    version: Version
    answers: Answers
    tags: list[bool]
    """Which prompts are tagged for safety."""
    metrics: dict[str, float]


@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=3)
class Coordinator:
    """Answers are a function of (seed, iteration, weights), so a restart or a repeated call is
    harmless."""

    def __init__(
        self,
        task: RolloutTask,
        generators: Any,
        replicas: int,
        references: Sequence[Any],
        helpfulness: Sequence[Any],
        safety: Sequence[Any],
    ) -> None:
        self._task, self._generators, self._replicas = task, generators, replicas
        self._references, self._helpfulness, self._safety = references, helpfulness, safety
        self._tokenizer = load_tokenizer(task.tokenizer)
        self._judge = Judge(task.world_seed)
        self._lock = asyncio.Lock()
        self._latest: Batch | None = None

    async def share(self, iteration: int, version: Version, rank: int, world: int) -> Share:
        """The part of iteration `iteration`, sampled with weights `version`, of one of `world`
        workers."""
        async with self._lock:
            batch = self._latest
            if batch is None or (batch.iteration, batch.version) != (iteration, version):
                batch = self._latest = await self._collect(iteration, version)
        return self._deal(batch, rank, world)

    async def _collect(self, iteration: int, version: Version) -> Batch:
        task, started = self._task, time.perf_counter()
        group = task.ppo.group_size
        asked = sample_order(iteration, task.batch_size // group, len(task.prompts), task.seed)
        picked = [i for i in asked for _ in range(group)]
        requests = [
            self._request(
                f"{iteration}-{slot}", task.prompts[i], iteration * task.batch_size + slot
            )
            for slot, i in enumerate(picked)
        ]
        answers = await self._roll_out(requests, version, task.sampling)
        seconds = time.perf_counter() - started
        if task.in_turn:
            references = asyncio.gather(*(chunk.reference for chunk in answers.chunks))
            await self._wait(references, "the reference")
        generation = max(chunk.helpfulness.generation_seconds for chunk in answers.chunks)
        finished = _mean(answers.of(lambda chunk: chunk.helpfulness.finished))
        metrics = {
            "rollout/refused_as_stale": answers.refused,
            "rollout/finished": finished,
            "rollout/cut_off": 1 - finished,
            "rollout/answer_tokens": _mean(answers.of(lambda chunk: chunk.helpfulness.written)),
            "time/generate": generation,
            "time/score": max(0.0, seconds - generation),
            "time/reference": time.perf_counter() - started - seconds,
        }
        tags = [task.prompts[i].safety for i in picked]
        return Batch(iteration, version, answers, tags, metrics)

    def _request(self, name: str, prompt: Prompt, seed: int) -> Request:
        tokens = np.array(encode_prompt(self._tokenizer, prompt.messages), dtype=np.int64)
        return Request(name, tokens, self._task.seed * 1_000_003 + seed)

    async def _roll_out(
        self, requests: Sequence[Request], version: Version, sampling: Sampling
    ) -> Answers:
        """Answers by `version`, dealt over as many chunks as there may be replicas so that each
        takes as long."""
        costs = [expected_tokens([request, sampling]) for request in requests]
        parts = [sorted(part) for part in balance(costs, self._replicas) if part]
        results = await asyncio.gather(
            *(
                self._chunk(number, [requests[i] for i in part], version, sampling)
                for number, part in enumerate(parts)
            )
        )
        places = [(0, 0)] * len(requests)
        for number, part in enumerate(parts):
            for row, i in enumerate(part):
                places[i] = (number, row)
        return Answers(
            [chunk for chunk, _ in results], places, sum(refused for _, refused in results)
        )

    async def _chunk(
        self, number: int, requests: Sequence[Request], version: Version, sampling: Sampling
    ) -> tuple[Chunk, int]:
        refused = 0
        for _ in range(ATTEMPTS):
            chunk = await self._wait(
                until_answered(lambda: self._sample_and_score(number, requests, sampling, version)),
                "generation and scoring",
            )
            # A sample counts once, for the request whose id it has.
            assert list(chunk.helpfulness.ids) == [request.id for request in requests]
            stale = sum(found != version for found in chunk.helpfulness.versions)
            if not stale:
                return chunk, refused
            refused += stale
        raise StaleSamples(
            f"No generator answered {len(requests)} requests with weights {version.number} in "
            f"{ATTEMPTS} attempts; {refused} samples of other weights were refused."
        )

    async def _sample_and_score(
        self, number: int, requests: Sequence[Request], sampling: Sampling, version: Version
    ) -> Chunk:
        call = self._generators.generate.remote(requests, sampling, version)
        with cancelled_with_caller(call):
            rollout = await call._to_object_ref()

            def scored_by(workers: Sequence[Any]) -> Any:
                return workers[number % len(workers)].score.remote(rollout)

            rewards = scored_by(self._helpfulness), scored_by(self._safety)
            reference = None if self._task.in_turn else scored_by(self._references)
            helpfulness, safety = await asyncio.gather(*rewards)
            return Chunk(rollout, reference or scored_by(self._references), helpfulness, safety)

    async def _wait(self, work: Awaitable[T], what: str) -> T:
        try:
            return await asyncio.wait_for(work, self._task.timeout)
        except TimeoutError as error:
            raise TimeoutError(f"{what} took more than {self._task.timeout:g} s.") from error

    def _deal(self, batch: Batch, rank: int, world: int) -> Share:
        """Minibatches hold the same samples whatever the number of workers."""
        task, answers = self._task, batch.answers
        rewards_B = _composite(answers, batch.tags)
        finished_B = torch.tensor(answers.of(lambda chunk: chunk.helpfulness.finished))
        raw_B = rewards_B - task.ppo.eos_penalty * ~finished_B
        scores_B = whiten(raw_B, torch.ones_like(raw_B)) if task.ppo.whiten_scores else raw_B
        places = answers.places
        lengths = answers.of(lambda chunk: chunk.helpfulness.lengths)
        written = answers.of(lambda chunk: chunk.helpfulness.written)
        order = [shuffled(i, len(places), task.seed + batch.iteration) for i in range(len(places))]
        minibatches = []
        for start in range(0, len(order), task.minibatch_size):
            members = order[start : start + task.minibatch_size]
            dealt = balance([lengths[slot] for slot in members], world)[rank]
            mine = [members[i] for i in dealt]
            minibatches.append(
                MiniBatch(
                    tuple(Place(*places[slot], float(scores_B[slot]), slot) for slot in mine),
                    sum(written[slot] for slot in members),
                )
            )
        means = {"reward/composite": float(rewards_B.mean())}
        if task.ppo.group_size > 1:
            groups = raw_B.view(-1, task.ppo.group_size)
            means["reward/group_std"] = float(groups.std(dim=1).mean())
        return Share(
            iteration=batch.iteration,
            samples=len(places),
            rollouts=[chunk.rollout for chunk in answers.chunks],
            references=[chunk.reference for chunk in answers.chunks],
            minibatches=tuple(minibatches),
            metrics=batch.metrics | means,
        )

    async def evaluate(self, step: int, version: Version) -> dict[str, float]:
        """Answer the held-out prompts, judge the answers, write them to the run, return the
        means."""
        task = self._task
        requests = [
            self._request(f"heldout-{i}", prompt, -1 - i) for i, prompt in enumerate(task.heldout)
        ]
        answers = await self._roll_out(requests, version, task.sampling)
        rollouts = await asyncio.gather(*(chunk.rollout for chunk in answers.chunks))
        references = await asyncio.gather(*(chunk.reference for chunk in answers.chunks))
        rewards_B = _composite(answers, [prompt.safety for prompt in task.heldout])
        judged = [
            self._judge.look(prompt, Judged(
                id=sample.id,
                prompt=prompt.messages[-1].content,
                answer=self._tokenizer.decode(sample.response.tolist()).strip(),
                kind="prompt",
                reward=reward,
                helpfulness=helpfulness,
                safety=safety,
                kl=float((sample.logprobs - reference).sum()),
                tokens=len(sample.response),
            ))
            for prompt, sample, reference, reward, helpfulness, safety in zip(
                task.heldout,
                [rollouts[chunk].samples[row] for chunk, row in answers.places],
                [references[chunk].logprobs[row] for chunk, row in answers.places],
                rewards_B.tolist(),
                answers.of(lambda chunk: chunk.helpfulness.scores),
                answers.of(lambda chunk: chunk.safety.scores),
                strict=True,
            )
        ]  # fmt: skip
        write_evaluation(task.run, step, judged)
        return {f"eval/{name}": value for name, value in summary(judged).items()}


def _composite(answers: Answers, tags: Sequence[bool]) -> torch.Tensor:
    helpfulness, safety = (
        torch.tensor(answers.of(scores), dtype=torch.float64).sigmoid()
        for scores in (lambda chunk: chunk.helpfulness.scores, lambda chunk: chunk.safety.scores)
    )
    return logit(composite(helpfulness, safety, torch.tensor(tags)))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / max(1, len(values))


def evaluation_file(run: RunDirectory, step: int) -> Path:
    """Where the held-out answers of an evaluation lie, one JSON object a line."""
    return run.path / "evaluations" / f"step_{step:06d}.jsonl"


def evaluated_steps(run: RunDirectory) -> list[int]:
    """The steps that have evaluations, in order."""
    found = evaluation_file(run, 0).parent.glob("step_*.jsonl")
    return sorted(int(path.stem.removeprefix("step_")) for path in found)


def write_evaluation(run: RunDirectory, step: int, judged: Sequence[Judged]) -> None:
    """Write held-out answers in one atomic step."""
    path = evaluation_file(run, step)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, "".join(json.dumps(asdict(answer)) + "\n" for answer in judged))


def read_evaluation(run: RunDirectory, step: int) -> list[Judged]:
    """What `write_evaluation` wrote."""
    return [Judged(**json.loads(line)) for line in evaluation_file(run, step).open()]
