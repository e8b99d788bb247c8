"""How the calls of an asyncio loop are answered by an engine in a thread of its own.

Work crosses over in batches: a call is one order to the thread; its answers come back together, or,
where they are streamed, the new tokens of all streams at once after each step.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import contextmanager

from actors.backend import Backend
from actors.engine_thread import Call, EngineThread, Event, Events, Load, Order
from actors.records import Piece, Request, Sample
from cluster.weights import Snapshot, Version
from llama2.generation import Sampling

PIECES_PER_SECOND = 250
"""Of all streams together. A piece costs a part of a millisecond of this process, however long it
is, so that the pieces of many streams have to be longer ones."""


class EngineFailed(RuntimeError):
    """The engine computes no more: what it had is to be asked for again, of another replica."""


class EngineLoop:
    """A backend at work, for the asyncio loop that it is made in.

    Every method raises `EngineFailed` once the backend has raised an error, or a step takes more
    than `stuck_after` seconds.
    """

    def __init__(self, backend: Backend, version: Version, stuck_after: float) -> None:
        loop = asyncio.get_running_loop()
        self._stuck_after = stuck_after
        self._failure: EngineFailed | None = None
        self._waits: dict[Order, asyncio.Queue[Event]] = {}
        self._thread = EngineThread(
            backend,
            version,
            deliver=lambda events: loop.call_soon_threadsafe(self._deliver, events),
            fail=lambda error: loop.call_soon_threadsafe(self._fail, _sentence(error)),
        )

    @property
    def version(self) -> Version:
        """The weights that are in use."""
        return self._thread.version

    @property
    def unfinished(self) -> int:
        """Requests that are being computed or wait."""
        return sum(len(order.requests) for order in self._waits if isinstance(order, Call))

    async def answer(self, requests: Sequence[Request], sampling: Sampling) -> list[Sample]:
        """All answers, in the order of the requests. An id that is being computed already is waited
        for, not computed again. Cancelling the call cancels its requests.

        Raises `ValueError` for a prompt that the backend refuses, an id that occurs twice, or one
        that is being computed for something else.
        """
        if not requests:
            return []
        if len({request.id for request in requests}) < len(requests):
            raise ValueError("Two requests of a call have the same id; give each its own.")
        with self._order(Call(requests, sampling, streams=False)) as events:
            answers = _checked(await events.get())
        assert isinstance(answers, list)
        return [answer.sample() for answer in answers]

    async def stream(self, request: Request, sampling: Sampling) -> AsyncGenerator[Piece, None]:
        """The answer in pieces: each is what was written since the one before. Closing the
        generator cancels the request. Raises as `answer` does."""
        with self._order(Call([request], sampling, streams=True)) as events:
            ended = False
            while not ended:
                found = [await events.get()]
                while not events.empty():
                    found.append(events.get_nowait())
                pieces = [event for event in found if isinstance(event, Piece)]
                if pieces:
                    yield _joined(pieces)
                    ended = pieces[-1].finish_reason is not None
                _checked(found[-1])
                if not ended:
                    await asyncio.sleep(self._streams / PIECES_PER_SECOND)

    @property
    def _streams(self) -> int:
        return sum(isinstance(order, Call) and order.streams for order in self._waits)

    async def load(self, fetch: Callable[[], Snapshot | None]) -> Version:
        """Load what `fetch` brings: after all that was asked for before this call is answered, and
        before what is asked for later begins. Returns the version then in use, which stays the same
        where `fetch` brings None."""
        with self._order(Load(fetch)) as events:
            version = _checked(await events.get())
        assert isinstance(version, Version)
        return version

    def check(self) -> None:
        """Raise `EngineFailed` where the engine has failed or is stuck; all callers are told."""
        began = self._thread.step_began
        if self._failure is None and began is not None:
            seconds = time.monotonic() - began
            if seconds > self._stuck_after:
                self._fail(
                    "The engine is stuck: its step, or change of weights, has taken "
                    f"{seconds:.0f} s so far."
                )
        if self._failure is not None:
            raise EngineFailed(*self._failure.args)

    @contextmanager
    def _order(self, order: Order) -> Iterator["asyncio.Queue[Event]"]:
        self.check()
        events = self._waits[order] = asyncio.Queue()
        self._thread.put(order)
        try:
            yield events
        except BaseException:
            self._thread.leave(order)
            raise
        finally:
            del self._waits[order]

    def _deliver(self, events: Events) -> None:
        for order, event in events:
            if order in self._waits:
                self._waits[order].put_nowait(event)

    def _fail(self, what: str) -> None:
        self._failure = EngineFailed(what)
        for events in self._waits.values():
            events.put_nowait(self._failure)


def _checked(event: Event) -> Event:
    if isinstance(event, EngineFailed):
        raise EngineFailed(*event.args)  # each caller's own, with its own traceback
    if isinstance(event, Exception):
        raise event
    return event


def _joined(pieces: Sequence[Piece]) -> Piece:
    return Piece(
        tuple(token for piece in pieces for token in piece.tokens),
        tuple(logprob for piece in pieces for logprob in piece.logprobs),
        pieces[-1].finish_reason,
        pieces[-1].version,
        tuple(found for piece in pieces for found in piece.alternatives),
    )


def _sentence(error: BaseException) -> str:
    said = str(error).strip().split("\n")[0].rstrip(".")
    return f"The engine failed with {type(error).__name__}{': ' if said else ''}{said}."
