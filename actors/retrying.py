"""Calls of the generators that survive the loss of a replica.

A request's answer follows from its prompt, seed and sampling and from the weights, so asking again
by the same id is harmless: another replica writes the same answer, and one that is still at it
writes it once.
"""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from ray.exceptions import NodeDiedError, ObjectLostError, RayActorError, WorkerCrashedError

from actors.engine_loop import EngineFailed
from actors.records import Piece, Request, Rollout
from cluster.weights import Version
from llama2.generation import Sampling

T = TypeVar("T")
LOST = (EngineFailed, NodeDiedError, ObjectLostError, RayActorError, WorkerCrashedError)
"""What a call raises whose replica died, or can compute no more."""
ATTEMPTS = 6


class WeightsChanged(RuntimeError):
    """An answer cannot be completed with the weights that it was begun with."""


class AnswerChanged(RuntimeError):
    """Another replica writes another answer, as it may on GPUs and with vLLM, whose rounding
    depends on what else is computed."""


async def until_answered(ask: Callable[[], Awaitable[T]]) -> T:
    """What `ask` brings; where its replica is lost, asked again after 1, 2, 4, ... seconds, in
    which Serve replaces the replica. Raises the last error after `ATTEMPTS` of them."""
    for attempt in range(ATTEMPTS - 1):
        try:
            return await ask()
        except LOST:
            await asyncio.sleep(2.0**attempt)
    return await ask()


async def generate(
    generators: Any,
    requests: Sequence[Request],
    sampling: Sampling,
    wanted: Version | None = None,
) -> Rollout:
    """All answers, from a handle as `deploy` returns it; see `Generator.generate`. Cancelling this
    cancels the requests."""

    async def ask() -> Rollout:
        call = generators.generate.remote(requests, sampling, wanted)
        with cancelled_with_caller(call):
            rollout: Rollout = await call
        return rollout

    return await until_answered(ask)


@contextmanager
def cancelled_with_caller(call: Any) -> Iterator[None]:
    """Tell a replica where its caller no longer waits, which Serve does for its own replicas
    alone."""
    try:
        yield
    except asyncio.CancelledError:
        call.cancel()
        raise


async def stream(
    generators: Any, request: Request, sampling: Sampling
) -> AsyncGenerator[Piece, None]:
    """The answer in pieces, from a handle as `deploy` returns it. Where its replica is lost,
    another one writes it again and what came already is left out. Closing the generator cancels
    the request.

    Raises the replica's error after `ATTEMPTS` of them, `WeightsChanged` where the weights that the
    answer began with are gone, and `AnswerChanged` where what came already is written otherwise.
    """
    version: Version | None = None
    given: list[int] = []
    for attempt in range(ATTEMPTS):
        pieces = generators.options(stream=True).stream.remote(request, sampling)
        seen = 0
        try:
            async for piece in pieces:
                if version not in (None, piece.version):
                    raise WeightsChanged(
                        f"The answer to {request.id} was lost with its replica, and the weights "
                        "have changed since; ask again."
                    )
                version = piece.version
                known = max(0, len(given) - seen)
                again = list(piece.tokens[:known])
                ended = piece.finish_reason is not None
                if again != given[seen : seen + (known if ended else len(piece.tokens))]:
                    raise AnswerChanged(
                        f"The answer to {request.id} was lost with its replica, and another one "
                        "answers otherwise; ask again."
                    )
                seen += len(piece.tokens)
                given += piece.tokens[known:]
                if len(piece.tokens) > known or piece.finish_reason is not None:
                    yield Piece(
                        piece.tokens[known:],
                        piece.logprobs[known:],
                        piece.finish_reason,
                        version,
                        piece.alternatives[known:],
                    )
            return
        except LOST:
            if attempt == ATTEMPTS - 1:
                raise
        finally:
            pieces.cancel()  # of no effect where it has ended
        await asyncio.sleep(2.0**attempt)
