"""The coordinator's rollouts, over generators and scorers that answer as the tests want them to."""

import asyncio
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import pytest
import torch
from ray.exceptions import ActorDiedError

from actors import retrying
from actors.coordinator import Answers, Coordinator, StaleSamples
from actors.engine_loop import EngineFailed
from actors.records import ReferenceLogprobs, Request, Rollout, Sample, Scores, Share
from cluster.weights import Version
from llama2.generation import Sampling
from llama2.ppo import PPOSettings
from llama2.records import Prompt
from llama2.rewards import LARGEST_SCORE

NOW, OLD = Version(3, "now"), Version(2, "old")
SAMPLING = Sampling(max_new_tokens=10)
Answer = Callable[[Sequence[Request], int], Version]


def method(function: Callable[..., Any]) -> Any:
    return SimpleNamespace(remote=function)


class Generators:
    """Answers a request of seed s with the token s, by the weights that `version` says for a
    call's requests and number; keeps the calls."""

    def __init__(self, version: Answer) -> None:
        self.calls: list[list[str]] = []
        self.wanted: set[Version] = set()
        self.version = version
        self.generate = method(self._generate)

    def _generate(self, requests: Sequence[Request], sampling: Sampling, wanted: Version) -> Any:
        self.calls.append([request.id for request in requests])
        self.wanted.add(wanted)
        number = len(self.calls)

        async def reference() -> Rollout:
            version = self.version(requests, number)
            return Rollout(tuple(sample(request, version) for request in requests), 0.5)

        return SimpleNamespace(_to_object_ref=reference, cancel=lambda: None)


def sample(request: Request, version: Version) -> Sample:
    response = np.array([request.seed])
    logprobs = np.array([-0.5], dtype=np.float32)
    # Answers to odd seeds are cut off.
    reason: Literal["stop", "length"] = "length" if request.seed % 2 else "stop"
    return Sample(request.id, request.prompt, response, logprobs, version, reason)


async def helpfulness(rollout: Rollout) -> Scores:
    samples = rollout.samples
    return Scores(
        ids=tuple(s.id for s in samples),
        scores=tuple(float(s.response[0]) for s in samples),
        lengths=tuple(len(s.tokens) for s in samples),
        written=tuple(len(s.response) for s in samples),
        versions=tuple(s.version for s in samples),
        finished=tuple(s.finished for s in samples),
        generation_seconds=rollout.seconds,
    )


def roll_out(generators: Any, requests: Sequence[Request], replicas: int) -> Answers:
    coordinator = made(generators, replicas)
    coordinator._task = SimpleNamespace(timeout=5.0, in_turn=False)
    found: Answers = asyncio.run(coordinator._roll_out(requests, NOW, SAMPLING))
    return found


def made(generators: Any, replicas: int) -> Any:
    """A coordinator in this process."""
    coordinator = object.__new__(Coordinator.__ray_metadata__.modified_class)  # type: ignore[attr-defined]
    scorer = SimpleNamespace(score=method(helpfulness))
    reference = SimpleNamespace(score=method(lambda rollout: ReferenceLogprobs((), ())))
    coordinator._generators, coordinator._replicas = generators, replicas
    coordinator._helpfulness, coordinator._safety = [scorer], [scorer]
    coordinator._references = [reference]
    coordinator._lock, coordinator._latest = asyncio.Lock(), None
    return coordinator


def shares(
    ppo: PPOSettings,
    iteration: int,
    world: int,
    in_turn: bool = False,
    reference: Callable[[Rollout], Any] | None = None,
    timeout: float = 5.0,
) -> tuple[list[Share], list[int]]:
    """All workers' shares of an iteration with eight samples, and the prompts asked, by slot."""
    coordinator = made(Generators(lambda _, __: NOW), 2)
    if reference is not None:
        coordinator._references = [SimpleNamespace(score=method(reference))]
    prompts = tuple(Prompt((), safety=False, source=str(i)) for i in range(5))
    task = SimpleNamespace(
        prompts=prompts, batch_size=8, minibatch_size=4, sampling=SAMPLING, seed=0,
        timeout=timeout, ppo=ppo, in_turn=in_turn,
    )  # fmt: skip
    asked: list[int] = []

    def request(name: str, prompt: Prompt, seed: int) -> Request:
        asked.append(int(prompt.source))
        return Request(name, np.ones(3, dtype=np.int64), seed)

    coordinator._task, coordinator._request = task, request

    async def collect() -> list[Share]:
        return [await coordinator.share(iteration, NOW, rank, world) for rank in range(world)]

    return asyncio.run(collect()), asked


def requests(lengths: Sequence[int]) -> list[Request]:
    return [Request(str(i), np.ones(n, dtype=np.int64), i) for i, n in enumerate(lengths)]


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long would have been waited between attempts."""
    waited: list[float] = []

    async def sleep(seconds: float) -> None:
        waited.append(seconds)

    monkeypatch.setattr(retrying, "asyncio", SimpleNamespace(**vars(asyncio) | {"sleep": sleep}))
    return waited


def test_requests_are_dealt_by_their_tokens_and_answers_come_in_order() -> None:
    lengths = [90, 80, 20, 10, 10, 30]
    for replicas in (1, 2, 4, 9):
        generators = Generators(lambda _, __: NOW)
        answers = roll_out(generators, requests(lengths), replicas)
        assert answers.of(lambda chunk: chunk.helpfulness.ids) == list("012345")
        assert answers.of(lambda chunk: chunk.safety.scores) == [0, 1, 2, 3, 4, 5]
        assert answers.of(lambda chunk: chunk.helpfulness.lengths) == [n + 1 for n in lengths]
        assert sorted(id for call in generators.calls for id in call) == list("012345")
        assert len(generators.calls) == min(replicas, 6)
        assert generators.wanted == {NOW}
        if replicas == 2:
            # Each answer may take ten more: 100 + 30 + 20 against 90 + 40 + 20.
            assert sorted(generators.calls) == [["0", "2", "3"], ["1", "4", "5"]]


def test_groups_follow_each_other_and_scores_are_what_was_asked_for() -> None:
    """Slot s of iteration 1 is scored 8 + s."""
    grouped = PPOSettings(
        algorithm="rloo", group_size=4, whiten_scores=False, eos_penalty=2.0, kl_in="reward"
    )
    found, asked = shares(grouped, 1, world=2)
    assert len(asked) == 8
    assert asked == [asked[0]] * 4 + [asked[4]] * 4
    assert asked[0] != asked[4]
    places = [p for share in found for part in share.minibatches for p in part.places]
    scores = {place.slot: place.score for place in places}
    expected = {slot: min(8 + slot, LARGEST_SCORE) - 2 * (slot % 2) for slot in range(8)}
    assert scores == pytest.approx(expected, abs=1e-3)
    assert len(places) == found[0].samples == 8
    metrics = found[0].metrics
    assert metrics["rollout/cut_off"] == 0.5
    groups = torch.tensor([expected[slot] for slot in range(8)]).view(2, 4)
    assert metrics["reward/group_std"] == pytest.approx(float(groups.std(dim=1).mean()), abs=1e-3)

    (alone,), asked = shares(PPOSettings(), 0, world=1)
    scores = {p.slot: p.score for part in alone.minibatches for p in part.places}
    assert sum(scores.values()) == pytest.approx(0.0, abs=1e-6)
    assert sum(score**2 for score in scores.values()) == pytest.approx(8.0)
    assert "reward/group_std" not in alone.metrics


def test_a_lost_chunk_is_asked_for_again_by_the_same_ids(no_waiting: list[float]) -> None:
    errors: list[Exception] = [ActorDiedError(), EngineFailed("The engine is stuck.")]

    def version(asked: Sequence[Request], number: int) -> Version:
        if asked[0].id == "0" and errors:
            raise errors.pop()
        return NOW

    generators = Generators(version)
    answers = roll_out(generators, requests([4, 4, 4, 4]), 2)
    assert answers.of(lambda chunk: chunk.helpfulness.ids) == list("0123")
    first = next(call for call in generators.calls if "0" in call)
    assert generators.calls.count(first) == 3
    assert len(generators.calls) == 4
    assert no_waiting == [1.0, 2.0]
    assert answers.refused == 0


def test_samples_of_other_weights_are_refused_and_counted() -> None:
    generators = Generators(lambda asked, number: OLD if number <= 2 else NOW)
    answers = roll_out(generators, requests([4, 4, 4]), 1)
    assert answers.refused == 6
    assert set(answers.of(lambda chunk: chunk.helpfulness.versions)) == {NOW}
    with pytest.raises(StaleSamples, match="No generator answered 3 requests with weights 3 in 5"):
        roll_out(Generators(lambda _, __: OLD), requests([4, 4, 4]), 1)


def test_a_replica_that_is_lost_for_good_ends_the_attempts(no_waiting: list[float]) -> None:
    def version(asked: Sequence[Request], number: int) -> Version:
        raise EngineFailed("The engine failed with ArithmeticError: no numbers.")

    with pytest.raises(EngineFailed, match="no numbers"):
        roll_out(Generators(version), requests([4]), 1)
    assert no_waiting == [1.0, 2.0, 4.0, 8.0, 16.0]


@pytest.mark.parametrize("in_turn", [False, True])
def test_the_reference_begins_at_once_or_when_the_rewards_are_there(in_turn: bool) -> None:
    order: list[str] = []

    async def score(rollout: Rollout) -> Scores:
        await asyncio.sleep(0.01)
        order.append("reward")
        return await helpfulness(rollout)

    def refer(rollout: Rollout) -> ReferenceLogprobs:
        order.append("reference")
        return ReferenceLogprobs((), ())

    coordinator = made(Generators(lambda _, __: NOW), 1)
    coordinator._helpfulness = coordinator._safety = [SimpleNamespace(score=method(score))]
    coordinator._references = [SimpleNamespace(score=method(refer))]
    coordinator._task = SimpleNamespace(timeout=5.0, in_turn=in_turn)
    asyncio.run(coordinator._roll_out(requests([3]), NOW, SAMPLING))
    rewards = ["reward", "reward"]
    assert order == ([*rewards, "reference"] if in_turn else ["reference", *rewards])


def test_in_turn_a_share_comes_when_the_reference_has_ended() -> None:
    async def never(rollout: Rollout) -> ReferenceLogprobs:
        await asyncio.sleep(60)
        raise AssertionError

    async def soon(rollout: Rollout) -> ReferenceLogprobs:
        await asyncio.sleep(0.05)
        return ReferenceLogprobs((), ())

    found, _ = shares(PPOSettings(), 0, 2, in_turn=True, reference=soon)
    assert all(share.metrics["time/reference"] >= 0.05 for share in found)
    with pytest.raises(TimeoutError, match=r"^the reference took more than 0.1 s"):
        shares(PPOSettings(), 0, 2, in_turn=True, reference=never, timeout=0.1)
