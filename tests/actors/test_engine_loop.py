"""Calls of an asyncio loop on an engine thread, over a backend that steps when a test lets it."""

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import numpy as np
import pytest

from actors.engine_loop import EngineFailed, EngineLoop
from actors.records import Piece, Request
from cluster.weights import Snapshot, Version
from llama2.generation import Sampling, Token

FIRST = Version(0, "first")


class Counting:
    """Answers a request of seed s with s, s + 1, ...; 1000 more with each load of weights."""

    def __init__(self, gated: bool = False) -> None:
        self.gate = threading.Semaphore(0 if gated else 10**9)
        self.running: dict[str, tuple[int, int, int]] = {}
        self.submitted: list[str] = []
        self.cancelled: list[str] = []
        self.loads = 0
        self.breaks_at: int | None = None
        self.slow_load = 0.0

    @property
    def busy(self) -> bool:
        return bool(self.running)

    def submit(self, id: str, prompt: Sequence[int], sampling: Sampling, seed: int) -> None:
        assert id not in self.running
        if not prompt:
            raise ValueError("The prompt is empty; give a token.")
        self.submitted.append(id)
        self.running[id] = (seed + 1000 * self.loads, 0, sampling.max_new_tokens)

    def step(self) -> list[Token]:
        self.gate.acquire()
        found = []
        for id, (seed, written, limit) in list(self.running.items()):
            if written == self.breaks_at:
                raise ArithmeticError("No numbers.\nMore of it.")
            self.running[id] = (seed, written + 1, limit)
            ended = "length" if written + 1 == limit else None
            found.append(Token(id, seed + written, -0.5 * written, ended))  # type: ignore[arg-type]
            if ended:
                del self.running[id]
        return found

    def cancel(self, id: str) -> None:
        self.cancelled.append(id)
        self.running.pop(id, None)

    def load(self, snapshot: Snapshot) -> Version:
        assert not self.busy
        time.sleep(self.slow_load)
        self.loads += 1
        return snapshot.version

    def allow(self, steps: int) -> None:
        for _ in range(steps):
            self.gate.release()


def request(id: str, seed: int = 0, prompt: Sequence[int] = (1, 2)) -> Request:
    return Request(id, np.array(prompt, dtype=np.int64), seed)


def snapshot(number: int) -> Snapshot:
    return Snapshot(Version(number, str(number)), ())


def run(body: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(body(), 20))


async def until(holds: Callable[[], object]) -> None:
    while not holds():
        await asyncio.sleep(0.001)


THREE = Sampling(max_new_tokens=3)


def test_answers_come_in_the_order_of_their_requests() -> None:
    async def body() -> None:
        engine = EngineLoop(Counting(), FIRST, 60)
        both = await asyncio.gather(
            engine.answer([request("a", 10), request("b", 20)], THREE),
            engine.answer([request("c", 30)], Sampling(max_new_tokens=1)),
        )
        assert [[s.response.tolist() for s in samples] for samples in both] == [
            [[10, 11, 12], [20, 21, 22]],
            [[30]],
        ]
        assert both[0][1].id == "b"
        assert both[0][1].logprobs.tolist() == [0, -0.5, -1.0]
        assert both[0][1].version == FIRST
        assert engine.unfinished == 0

    run(body)


def test_a_stream_yields_every_step_and_a_slow_reader_gets_what_gathered() -> None:
    async def body() -> None:
        backend = Counting(gated=True)
        engine = EngineLoop(backend, FIRST, 60)
        stream = engine.stream(request("a", 5), Sampling(max_new_tokens=6))
        first = asyncio.ensure_future(anext(stream))
        backend.allow(1)
        assert await first == Piece((5,), (0.0,), None, FIRST)
        backend.allow(5)
        await until(lambda: not backend.busy)
        await asyncio.sleep(0.05)
        assert await anext(stream) == Piece(
            (6, 7, 8, 9, 10), (-0.5, -1.0, -1.5, -2.0, -2.5), "length", FIRST
        )
        with pytest.raises(StopAsyncIteration):
            await anext(stream)

    run(body)


def test_an_id_that_is_being_computed_is_joined_and_computed_once() -> None:
    async def body() -> None:
        backend, five = Counting(gated=True), Sampling(max_new_tokens=5)
        engine = EngineLoop(backend, FIRST, 60)
        early = asyncio.ensure_future(engine.answer([request("a", 1), request("b", 2)], five))
        backend.allow(2)
        await until(lambda: backend.running.get("b", (0, 0, 0))[1] == 2)
        late = asyncio.ensure_future(engine.answer([request("b", 2), request("c", 3)], five))
        stream = engine.stream(request("a", 1), five)
        piece = asyncio.ensure_future(anext(stream))
        await until(lambda: engine.unfinished == 5)
        backend.allow(10)
        one, two, three = ([n, n + 1, n + 2, n + 3, n + 4] for n in (1, 2, 3))
        assert [s.response.tolist() for s in await early] == [one, two]
        assert [s.response.tolist() for s in await late] == [two, three]
        # What was written before the stream began is part of it.
        assert [*(await piece).tokens, *[t async for p in stream for t in p.tokens]] == one
        assert sorted(backend.submitted) == ["a", "b", "c"]

    run(body)


def test_an_id_cannot_stand_for_two_things() -> None:
    async def body() -> None:
        backend, long = Counting(gated=True), Sampling(max_new_tokens=1000)
        engine = EngineLoop(backend, FIRST, 60)
        first = asyncio.ensure_future(engine.answer([request("a", 1)], long))
        await until(lambda: backend.submitted)
        for other, sampling in (
            (request("a", 2), long),
            (request("a", 1, prompt=[9]), long),
            (request("a", 1), THREE),
        ):
            refused = asyncio.ensure_future(engine.answer([request("n"), other], sampling))
            await until(lambda: engine.unfinished == 3)
            backend.allow(1)
            with pytest.raises(ValueError, match="request a is being computed with another"):
                await refused
        with pytest.raises(ValueError, match="the same id"):
            await engine.answer([request("a"), request("a")], THREE)
        # What was asked for beside it is given up; the first caller does not notice.
        assert backend.cancelled == ["n"] * 3
        backend.allow(1000)
        assert (await first)[0].response.tolist() == list(range(1, 1001))

    run(body)


def test_a_refused_prompt_fails_its_own_call_only() -> None:
    async def body() -> None:
        backend = Counting(gated=True)
        engine = EngineLoop(backend, FIRST, 60)
        good = asyncio.ensure_future(engine.answer([request("a", 1)], THREE))
        bad = asyncio.ensure_future(engine.answer([request("b"), request("c", prompt=[])], THREE))
        backend.allow(10)
        with pytest.raises(ValueError, match=r"^The prompt is empty; give a token.$"):
            await bad
        assert (await good)[0].response.tolist() == [1, 2, 3]
        assert backend.cancelled == ["b"]

    run(body)


def test_leaving_cancels_what_nobody_else_waits_for() -> None:
    async def body() -> None:
        backend = Counting(gated=True)
        engine = EngineLoop(backend, FIRST, 60)
        long = Sampling(max_new_tokens=1000)
        mine = asyncio.ensure_future(engine.answer([request("a"), request("b")], long))
        other = asyncio.ensure_future(engine.answer([request("b")], long))
        stream = engine.stream(request("c"), long)
        piece = asyncio.ensure_future(anext(stream))
        backend.allow(1)
        await piece
        mine.cancel()
        await stream.aclose()
        await until(lambda: engine.unfinished == 1)
        backend.allow(2)
        await until(lambda: set(backend.cancelled) == {"a", "c"})
        assert list(backend.running) == ["b"]
        backend.allow(1000)
        assert len((await other)[0].response) == 1000
        with pytest.raises(asyncio.CancelledError):
            await mine

    run(body)


def test_weights_change_between_answers() -> None:
    """What runs ends with the weights it began with, what waits behind a load begins after it."""

    async def body() -> None:
        backend = Counting(gated=True)
        engine = EngineLoop(backend, FIRST, 60)
        old = asyncio.ensure_future(engine.answer([request("a", 1)], THREE))
        backend.allow(1)
        await until(lambda: backend.running.get("a", (0, 0, 0))[1] == 1)
        load = asyncio.ensure_future(engine.load(lambda: snapshot(7)))
        await asyncio.sleep(0)
        new = asyncio.ensure_future(engine.answer([request("b", 1)], THREE))
        again = asyncio.ensure_future(engine.answer([request("a", 1)], THREE))
        gone = asyncio.ensure_future(engine.answer([request("g", 1)], THREE))
        await asyncio.sleep(0.05)
        gone.cancel()
        await until(lambda: engine.unfinished == 3)
        assert backend.submitted == ["a"]
        backend.allow(100)
        (before,), (after,), (retried,) = await asyncio.gather(old, new, again)
        assert await load == Version(7, "7")
        assert before.response.tolist() == [1, 2, 3]
        assert before.version == FIRST
        assert after.response.tolist() == retried.response.tolist() == [1001, 1002, 1003]
        assert after.version == retried.version == engine.version == Version(7, "7")
        assert backend.submitted == ["a", "b", "a"]
        assert await engine.load(lambda: None) == Version(7, "7")
        assert backend.loads == 1

    run(body)


def test_weights_that_cannot_be_fetched_leave_the_engine_as_it_is() -> None:
    async def body() -> None:
        engine = EngineLoop(Counting(), FIRST, 60)

        def fetch() -> Snapshot:
            raise ConnectionError("The store is gone.")

        with pytest.raises(ConnectionError, match="The store is gone"):
            await engine.load(fetch)
        (sample,) = await engine.answer([request("a", 1)], THREE)
        assert sample.version == FIRST

    run(body)


def test_an_error_of_the_engine_is_told_in_one_sentence_to_all() -> None:
    async def body() -> None:
        backend = Counting(gated=True)
        backend.breaks_at = 1
        engine = EngineLoop(backend, FIRST, 60)
        waiting = [
            asyncio.ensure_future(engine.answer([request(name)], THREE)) for name in ("a", "b")
        ]
        stream = engine.stream(request("c"), THREE)
        piece = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0.02)
        engine.check()
        backend.allow(5)
        assert (await piece).tokens[0] == 0
        said = r"^The engine failed with ArithmeticError: No numbers.$"
        for call in waiting:
            with pytest.raises(EngineFailed, match=said):
                await call
        with pytest.raises(EngineFailed, match=said):
            await anext(stream)
        with pytest.raises(EngineFailed, match=said):
            await engine.answer([request("d")], THREE)
        with pytest.raises(EngineFailed, match=said):
            engine.check()

    run(body)


def test_a_stuck_step_is_noticed_and_waiting_is_not() -> None:
    async def body() -> None:
        backend = Counting(gated=True)
        engine = EngineLoop(backend, FIRST, stuck_after=0.2)
        await asyncio.sleep(0.4)
        engine.check()  # idle is not stuck
        call = asyncio.ensure_future(engine.answer([request("a")], THREE))
        await asyncio.sleep(0.1)
        engine.check()
        backend.allow(1)
        await asyncio.sleep(0.15)
        engine.check()  # this step began a moment ago
        await asyncio.sleep(0.2)
        with pytest.raises(
            EngineFailed, match="The engine is stuck: its step, or change of weights, has taken 0 s"
        ):
            engine.check()
        with pytest.raises(EngineFailed, match="stuck"):
            await call

    run(body)


def test_a_stuck_change_of_weights_is_noticed() -> None:
    async def body() -> None:
        backend = Counting()
        backend.slow_load = 1.0
        engine = EngineLoop(backend, FIRST, stuck_after=0.2)
        load = asyncio.ensure_future(engine.load(lambda: snapshot(7)))
        await asyncio.sleep(0.1)
        engine.check()
        await asyncio.sleep(0.3)
        with pytest.raises(EngineFailed, match="stuck"):
            engine.check()
        with pytest.raises(EngineFailed, match="stuck"):
            await load

    run(body)


def test_many_calls_at_once_lose_and_mix_nothing() -> None:
    async def body() -> None:
        engine = EngineLoop(Counting(), FIRST, 60)
        random = np.random.default_rng(0)

        async def one(name: int) -> None:
            sampling = Sampling(max_new_tokens=int(random.integers(1, 40)))
            await asyncio.sleep(float(random.random()) / 20)
            asked = request(str(name), 10_000 * name)
            if name % 3 == 0:
                pieces = [piece async for piece in engine.stream(asked, sampling)]
                tokens = [token for piece in pieces for token in piece.tokens]
                assert [piece.finish_reason for piece in pieces][:-1] == [None] * (len(pieces) - 1)
            elif name % 7 == 1:
                call = asyncio.ensure_future(engine.answer([asked], sampling))
                await asyncio.sleep(float(random.random()) / 100)
                call.cancel()
                return
            else:
                (sample,) = await engine.answer([asked], sampling)
                tokens = sample.response.tolist()
            assert tokens == list(range(10_000 * name, 10_000 * name + sampling.max_new_tokens))

        started = time.monotonic()
        await asyncio.gather(*(one(name) for name in range(300)))
        assert time.monotonic() - started < 15
        assert engine.unfinished == 0

    run(body)
