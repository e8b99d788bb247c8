"""Streams whose replica is lost: what came is not given again, nor mixed with another answer."""

import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from actors import retrying
from actors.engine_loop import EngineFailed
from actors.records import Piece, Request
from cluster.weights import Version
from llama2.generation import Sampling

REQUEST = Request("a", np.array([1, 2]), seed=0)


class Replicas:
    """A handle each of whose calls is answered by the next of `answers`: pieces of tokens, then a
    finish reason or the loss of the replica."""

    def __init__(self, *answers: list[Any]) -> None:
        self.answers = list(answers)
        self.stream = SimpleNamespace(remote=self.remote)

    def options(self, stream: bool) -> "Replicas":
        assert stream
        return self

    def remote(self, request: Request, sampling: Sampling) -> Any:
        found = self.answers.pop(0)

        class Pieces:
            def cancel(self) -> None:
                pass

            async def __aiter__(self) -> AsyncIterator[Piece]:
                for tokens in found[:-1]:
                    logprobs = tuple(-float(token) for token in tokens)
                    told = tuple(((token, -1.0),) for token in tokens)
                    yield Piece(tuple(tokens), logprobs, None, Version(3, "x"), told)
                if found[-1] == "lost":
                    raise EngineFailed("gone")
                yield Piece((), (), found[-1], Version(3, "x"))

        return Pieces()


def pieces_of(replicas: Replicas, monkeypatch: pytest.MonkeyPatch) -> list[Piece]:
    async def at_once(seconds: float) -> None:
        del seconds

    async def collect() -> list[Piece]:
        return [piece async for piece in retrying.stream(replicas, REQUEST, Sampling())]

    monkeypatch.setattr(retrying, "asyncio", SimpleNamespace(sleep=at_once))
    return asyncio.run(collect())


def test_what_came_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    replicas = Replicas(
        [[5, 6], [7], "lost"],
        [[5], "lost"],
        [[5], [6, 7, 8], [9], "lost"],
        [[5, 6, 7, 8, 9], "stop"],
    )
    found = pieces_of(replicas, monkeypatch)
    assert [piece.tokens for piece in found] == [(5, 6), (7,), (8,), (9,), ()]
    assert [piece.logprobs for piece in found] == [(-5, -6), (-7,), (-8,), (-9,), ()]
    for piece in found:
        assert [told[0][0] for told in piece.alternatives] == list(piece.tokens)
    assert found[-1].finish_reason == "stop"


@pytest.mark.parametrize("other", [[[5, 7]], [[5, 6], [8, 9]], [[4]], [[5, 6]]])
def test_another_answer_is_refused(other: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    replicas = Replicas([[5, 6], [7], "lost"], [*other, "stop"])
    with pytest.raises(retrying.AnswerChanged, match="answers otherwise"):
        pieces_of(replicas, monkeypatch)
