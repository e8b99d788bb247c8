"""The generators on a real Serve: two replicas of a small model, which tests kill and break."""

import asyncio
import os
import signal
import tempfile
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from ray import serve
from ray.serve.exceptions import BackPressureError

from actors import retrying
from actors.engine_loop import EngineFailed
from actors.generator import FROM_FOLDER, deploy
from actors.generator_config import GeneratorConfig
from actors.records import Piece, Request, Sample
from cluster import publishing
from cluster.session import WORKER_ENVIRONMENT
from cluster.weights import Version, WeightStore
from llama2 import checkpoint
from llama2.generation import Completion, Engine, Sampling
from tests.llama2.model_folders import causal

CONTEXT = 32768
"""So long that an answer takes a second or more, in which a test can do harm."""
LONG = Sampling(max_new_tokens=1500, stop_ids=())
SHORT = Sampling(max_new_tokens=12, stop_ids=(3,))


@ray.remote(num_cpus=0, max_concurrency=2)
class Publisher:
    """In the learner's place: publishes the folder's weights, changed by a number."""

    def __init__(self, folder: Path, store: Any) -> None:
        self._folder, self._store = folder, store
        self._attempt = publishing.enter(store, 30)

    def publish(self, number: int) -> Version:
        state = changed(self._folder, number).state_dict()
        return publishing.put([list(state.items())], number, self._attempt, self._store, 30)


def changed(folder: Path, number: int) -> Any:
    """The folder's model with other weights; without any numbers where `number` is odd."""
    model = checkpoint.load(folder).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(1 + number / 10)
        if number % 2:
            model.lm_head.weight.fill_(float("nan"))
    return model


@dataclass
class Serving:
    """What the tests share."""

    folder: Path
    store: Any
    publisher: Any
    handle: Any
    version: Version

    def publish(self, number: int) -> None:
        self.version = ray.get(self.publisher.publish.remote(number))

    def expected(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        """What a bare engine answers with the weights that were published."""
        model = changed(self.folder, max(0, self.version.number))
        prompts = [request.prompt.tolist() for request in requests]
        return Engine(model).generate(prompts, sampling, [request.seed for request in requests])

    def check(self, samples: Sequence[Sample], sampling: Sampling) -> None:
        requests = [Request(s.id, s.prompt, int(s.id.split("-")[-1])) for s in samples]
        for sample, wanted in zip(samples, self.expected(requests, sampling), strict=True):
            assert sample.response.tolist() == wanted.tokens
            assert sample.logprobs.tolist() == pytest.approx(wanted.logprobs, abs=1e-5)
            assert sample.finish_reason == wanted.finish_reason
            assert sample.version == self.version


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    folder = tmp_path_factory.mktemp("generator") / "model"
    causal(max_position_embeddings=CONTEXT).save_pretrained(folder)
    root = str(Path(__file__).resolve().parents[2])
    ray.init(
        num_cpus=2, include_dashboard=False, _temp_dir=tempfile.mkdtemp(prefix="r-", dir="/tmp"),
        runtime_env={"env_vars": WORKER_ENVIRONMENT | {"PYTHONPATH": root}},
    )  # fmt: skip
    store = WeightStore.remote()  # type: ignore[attr-defined]
    publisher = Publisher.remote(folder, store)  # type: ignore[attr-defined]
    handle = deploy("pair", folder, store, "float32", GeneratorConfig(count=2, cpus=0.1))
    yield Serving(folder, store, publisher, handle, FROM_FOLDER)
    serve.shutdown()
    ray.shutdown()


@pytest.fixture(scope="module")
def narrow(serving: Serving) -> Any:
    """One replica that computes one request at a time."""
    config = GeneratorConfig(cpus=0.1, max_batch_size=1, max_queued_requests=1, stuck_after=1)
    return deploy("narrow", serving.folder, serving.store, "float32", config)


def requests(count: int, name: str) -> list[Request]:
    """The seed is the id's last part."""
    prompts = [np.array([1, 5 + i % 40, 7, 9][: 2 + i % 3], dtype=np.int64) for i in range(count)]
    return [Request(f"{name}-{i}", prompt, i) for i, prompt in enumerate(prompts)]


def replicas(application: str) -> list[str]:
    """Actor names of the application's replicas."""
    mark = f"SERVE_REPLICA::{application}#"
    names = (actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True))
    return sorted(name for name in names if name.startswith(mark))


def inside(replica: str, look: Callable[[Any], Any]) -> Any:
    """What `look` finds in the replica's `Generator`."""

    def run(actor: Any) -> Any:
        return look(actor._replica_impl._user_callable_wrapper._callable)

    return ray.get(ray.get_actor(replica, namespace="serve").__ray_call__.remote(run))


def charged(replica: str) -> int:
    """Tokens at most that a replica is asked for at the moment."""
    return inside(
        replica,
        lambda generator: sum(
            len(call.requests) * call.sampling.max_new_tokens for call in generator._engine._waits
        ),
    )


def busy(replica: str) -> bool:
    return inside(replica, lambda generator: generator._engine._thread._backend.busy)


def until(holds: Callable[[], object], seconds: float = 40) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def run(work: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(work, 90))


def test_replicas_answer_what_the_bare_engine_does(serving: Serving) -> None:
    rollout = serving.handle.generate.remote(requests(9, "first"), SHORT).result(timeout_s=60)
    assert {sample.finish_reason for sample in rollout.samples} == {"stop", "length"}
    assert serving.version.number == -1
    serving.check(rollout.samples, SHORT)


def test_a_stream_brings_the_same_tokens_in_pieces(serving: Serving) -> None:
    (request,) = requests(1, "stream")
    pieces = list(serving.handle.options(stream=True).stream.remote(request, LONG))
    (wanted,) = serving.expected([request], LONG)
    assert [token for piece in pieces for token in piece.tokens] == wanted.tokens
    logprobs = [logprob for piece in pieces for logprob in piece.logprobs]
    assert logprobs == pytest.approx(wanted.logprobs, abs=1e-5)
    assert len(pieces) > 10
    assert [piece.finish_reason for piece in pieces] == [None] * (len(pieces) - 1) + ["length"]


def test_a_refused_prompt_is_the_callers_error_alone(serving: Serving) -> None:
    empty = Request("empty", np.array([], dtype=np.int64), 0)
    good = serving.handle.generate.remote(requests(1, "good"), SHORT)
    with pytest.raises(ValueError, match="The prompt is empty"):
        serving.handle.generate.remote([empty], SHORT).result(timeout_s=60)
    with pytest.raises(ValueError, match="The prompt is empty"):
        next(iter(serving.handle.options(stream=True).stream.remote(empty, SHORT)))
    serving.check(good.result(timeout_s=60).samples, SHORT)


def test_calls_are_spread_by_the_tokens_that_they_may_take(serving: Serving) -> None:
    """One long call weighs as much as many short ones, and the second goes to the other replica."""
    tenth = Sampling(max_new_tokens=LONG.max_new_tokens // 10, stop_ids=())
    kinds = [LONG, tenth, tenth, tenth, LONG, tenth, tenth, tenth]
    asked = requests(len(kinds), "spread")
    seen: list[list[int]] = []
    first, second = replicas("pair")

    def calls(replica: str) -> list[int]:
        return inside(
            replica,
            lambda generator: [c.sampling.max_new_tokens for c in generator._engine._waits],
        )

    pending = [
        serving.handle.generate.remote([one], kind) for one, kind in zip(asked, kinds, strict=True)
    ]
    until(lambda: calls(first) and calls(second))
    seen = [calls(first), calls(second)]
    assert [found.count(LONG.max_new_tokens) for found in seen] == [1, 1], seen
    for call, kind in zip(pending, kinds, strict=True):
        serving.check(call.result(timeout_s=60).samples, kind)


def test_cancelled_calls_and_closed_streams_leave_the_engines_idle(serving: Serving) -> None:
    far = Sampling(max_new_tokens=CONTEXT - 10, stop_ids=())

    async def leave() -> None:
        call = asyncio.ensure_future(retrying.generate(serving.handle, requests(3, "left"), far))
        stream = retrying.stream(serving.handle, requests(4, "leaving")[3], far)
        piece = await anext(stream)
        assert isinstance(piece, Piece)
        assert any(busy(replica) for replica in replicas("pair"))
        call.cancel()
        await stream.aclose()
        with pytest.raises(asyncio.CancelledError):
            await call

    started = time.monotonic()
    run(leave())
    until(lambda: not any(busy(replica) for replica in replicas("pair")), 10)
    assert time.monotonic() - started < 15
    rollout = serving.handle.generate.remote(requests(2, "after"), SHORT).result(timeout_s=60)
    serving.check(rollout.samples, SHORT)


def test_a_killed_replica_costs_no_answer_and_its_successor_has_the_newest_weights(
    serving: Serving,
) -> None:
    serving.publish(2)
    receipts = serving.handle.broadcast("refresh").results(timeout_s=60)
    assert [receipt.version for receipt in receipts] == [serving.version] * 2
    before = replicas("pair")

    async def kill() -> list[Any]:
        calls = [
            asyncio.ensure_future(retrying.generate(serving.handle, [request], LONG))
            for request in requests(6, "killed")
        ]
        stream = retrying.stream(serving.handle, requests(7, "watched")[6], LONG)
        calls.append(asyncio.ensure_future(collected(stream)))
        await asyncio.to_thread(until, lambda: all(map(busy, before)))
        await asyncio.sleep(0.2)
        # Of the two, the one that writes the stream.
        watched = [name for name in before if await asyncio.to_thread(streams, name)]
        os.kill(inside(watched[0], lambda _: os.getpid()), signal.SIGKILL)
        return await asyncio.gather(*calls)

    *rollouts, tokens = run(kill())
    samples = [sample for rollout in rollouts for sample in rollout.samples]
    assert [sample.id for sample in samples] == [f"killed-{i}" for i in range(6)]
    serving.check(samples, LONG)
    (wanted,) = serving.expected(requests(7, "watched")[6:], LONG)
    assert tokens == wanted.tokens
    until(lambda: len(replicas("pair")) == 2 and set(replicas("pair")) != set(before))
    new = (set(replicas("pair")) - set(before)).pop()
    until(lambda: inside(new, version_held) == serving.version)
    # Both answer, and nothing but the newest weights.
    until(lambda: len(serving.handle.broadcast("refresh").results(timeout_s=60)) == 2)


def version_held(generator: Any) -> Version | None:
    """None until the constructor has ended: Serve shows what it constructs before that."""
    engine = getattr(generator, "_engine", None)
    return None if engine is None else engine.version


async def collected(stream: Any) -> list[int]:
    return [token async for piece in stream for token in piece.tokens]


def streams(replica: str) -> bool:
    return inside(replica, lambda generator: any(c.streams for c in generator._engine._waits))


def test_a_replica_that_missed_a_publication_catches_up_when_asked(serving: Serving) -> None:
    serving.publish(4)  # nobody is told
    rollouts = [
        serving.handle.generate.remote([request], SHORT, serving.version)
        for request in requests(4, "missed")
    ]
    for rollout in rollouts:
        serving.check(rollout.result(timeout_s=60).samples, SHORT)


def test_too_many_calls_are_refused_at_once(serving: Serving, narrow: Any) -> None:
    asked = requests(5, "narrow")
    calls = []
    for request in asked:
        calls.append(narrow.generate.remote([request], LONG))
        time.sleep(0.1)  # the router counts what it has sent
    outcomes = []
    for call in calls:
        try:
            outcomes.append(call.result(timeout_s=60).samples[0].id)
        except BackPressureError:
            outcomes.append("refused")
    # One runs and one is taken along, by the limit of two at a time; one more may wait.
    assert outcomes == ["narrow-0", "narrow-1", "narrow-2", "refused", "refused"]


@pytest.mark.slow
def test_an_engine_that_fails_or_is_stuck_is_told_of_and_replaced(
    serving: Serving, narrow: Any
) -> None:
    (broken,) = replicas("narrow")
    serving.publish(5)  # not a number among them
    narrow.broadcast("refresh").results(timeout_s=60)
    with pytest.raises(EngineFailed, match=r"The engine failed with \w+Error: ") as told:
        narrow.generate.remote(requests(1, "broken"), SHORT).result(timeout_s=60)
    assert "\n" not in str(told.value.cause)
    serving.publish(6)
    rollout = run(retrying.generate(narrow, requests(3, "mended"), SHORT))
    serving.check(rollout.samples, SHORT)
    (stuck,) = replicas("narrow")
    assert stuck != broken

    def hang(generator: Any) -> None:
        generator._engine._thread._backend.step = lambda: time.sleep(10_000)

    inside(stuck, hang)
    with pytest.raises(EngineFailed, match="The engine is stuck: its step has taken"):
        narrow.generate.remote(requests(1, "stuck"), SHORT).result(timeout_s=60)
    rollout = run(retrying.generate(narrow, requests(3, "again"), SHORT))
    serving.check(rollout.samples, SHORT)


def test_a_stopped_replica_answers_what_it_has(serving: Serving, narrow: Any) -> None:
    call = narrow.generate.remote(requests(1, "drained"), LONG)
    (replica,) = replicas("narrow")
    until(lambda: busy(replica))
    serve.delete("narrow")
    serving.check(call.result(timeout_s=60).samples, LONG)


@pytest.mark.slow
def test_replicas_are_added_where_requests_do_not_fit_a_batch(serving: Serving) -> None:
    config = GeneratorConfig(cpus=0.1, max_count=2, max_batch_size=4)
    handle = deploy("growing", serving.folder, serving.store, "float32", config)
    far = Sampling(max_new_tokens=CONTEXT - 10, stop_ids=())
    call = handle.generate.remote(requests(6, "growing"), far)  # one call, six requests
    until(lambda: len(replicas("growing")) == 2, 120)
    call.cancel()
    serve.delete("growing")
