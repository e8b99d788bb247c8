"""The generators as those see them who ask for answers alone, in whatever process they run."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from itertools import chain
from typing import Any

from actors import retrying
from actors.records import Piece, Request, Sample
from llama2.generation import Sampling

CHUNK = 16
"""Requests that go to a replica in one call."""


class ServedModel:
    """A handle as `deploy` returns it. Replicas that are lost are asked again."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    def stream(self, request: Request, sampling: Sampling) -> AsyncGenerator[Piece, None]:
        """The answer to a request in pieces; closing the generator cancels the request. Raises as
        `retrying.stream` does."""
        return retrying.stream(self._handle, request, sampling)

    async def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Sample]:
        """All answers, in the order of the requests, spread over the replicas in chunks. Cancelling
        the call cancels the requests. Raises what the replicas do, for the first chunk that
        fails."""
        chunks = [requests[i : i + CHUNK] for i in range(0, len(requests), CHUNK)]
        tasks = [
            asyncio.create_task(retrying.generate(self._handle, chunk, sampling))
            for chunk in chunks
        ]
        try:
            rollouts = await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
        return list(chain.from_iterable(rollout.samples for rollout in rollouts))
