"""The thread that steps a replica's engine while it has something to compute."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from actors.backend import Backend
from actors.records import Piece, Request, Sample
from cluster.weights import Snapshot, Version
from llama2.generation import Sampling
from llama2.generation.request import Alternatives

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class Answer:
    """What is written so far of a request's answer, and for whom."""

    request: Request
    sampling: Sampling
    version: Version
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    alternatives: list[Alternatives] = field(default_factory=list)
    """To each token, where they are asked for."""
    finish_reason: Literal["stop", "length"] | None = None
    calls: "list[Call]" = field(default_factory=list)

    def is_to(self, request: Request, sampling: Sampling) -> bool:
        """Whether it answers just this."""
        same = self.request.seed == request.seed and self.sampling == sampling
        return same and np.array_equal(self.request.prompt, request.prompt)

    def piece(self, start: int) -> Piece:
        """All from token `start` on."""
        return Piece(
            tuple(self.tokens[start:]),
            tuple(self.logprobs[start:]),
            self.finish_reason,
            self.version,
            tuple(self.alternatives[start:]),
        )

    def sample(self) -> Sample:
        """The whole answer, once it has ended."""
        assert self.finish_reason is not None
        return Sample(
            id=self.request.id,
            prompt=self.request.prompt,
            response=np.array(self.tokens, dtype=np.int64),
            logprobs=np.array(self.logprobs, dtype=np.float32),
            version=self.version,
            finish_reason=self.finish_reason,
            alternatives=tuple(self.alternatives),
        )


@dataclass(eq=False)
class Call:
    """A caller's wait for answers: for all of them together, or for the tokens of each step."""

    requests: Sequence[Request]
    sampling: Sampling
    streams: bool
    answers: list[Answer] = field(default_factory=list)
    unfinished: int = 0


@dataclass(eq=False)
class Load:
    """An order to load what `fetch` brings, or to go on with what is there if it brings None."""

    fetch: Callable[[], Snapshot | None]


Order = Call | Load
Event = Piece | list[Answer] | Version | Exception
Events = list[tuple[Order, Event]]


class EngineThread:
    """Takes orders in turn; a `Load` waits until all before it is answered, what comes later waits
    for the load. So one version of the weights writes a whole answer.

    `deliver` and `fail` are called in this thread: with what there is to tell, and with the error
    that ended it.
    """

    def __init__(
        self,
        backend: Backend,
        version: Version,
        deliver: Callable[[Events], object],
        fail: Callable[[BaseException], object],
    ) -> None:
        self.version = version
        self.step_began: float | None = None
        """Time of the monotonic clock at which the running step, or change of weights, began."""
        self._backend, self._deliver, self._fail = backend, deliver, fail
        self._changed = threading.Condition()  # guards the next two
        self._orders: deque[Order] = deque()
        self._left: list[Call] = []
        self._answers: dict[str, Answer] = {}
        threading.Thread(target=self._run, name="engine", daemon=True).start()

    def put(self, order: Order) -> None:
        """Queue an order."""
        with self._changed:
            self._orders.append(order)
            self._changed.notify()

    def leave(self, order: Order) -> None:
        """Nobody waits for this order any more: forget it where it can still be forgotten."""
        with self._changed:
            if order in self._orders:
                self._orders.remove(order)
            elif isinstance(order, Call):
                self._left.append(order)
                self._changed.notify()

    def _run(self) -> None:
        try:
            while True:
                for order in self._take():
                    if isinstance(order, Load):
                        self._load(order)
                    else:
                        self._begin(order)
                if self._answers:
                    self._step()
        except BaseException as error:
            logger.exception("The engine's thread ended.")
            self._fail(error)

    def _take(self) -> list[Order]:
        """Orders whose turn it is; waits for one while there is nothing to compute."""
        taken: list[Order] = []
        with self._changed:
            self._changed.wait_for(lambda: self._orders or self._left or self._answers)
            left, self._left = self._left, []
            while self._orders:
                if isinstance(self._orders[0], Load) and (taken or self._answers):
                    break
                taken.append(self._orders.popleft())
        for call in left:
            self._drop(call)
        return taken

    def _load(self, order: Load) -> None:
        try:
            snapshot = order.fetch()
        except Exception as error:
            self._deliver([(order, error)])
            return
        if snapshot is not None:
            # An error from here on leaves weights of no version: it ends the thread.
            self.step_began = time.monotonic()
            self.version = self._backend.load(snapshot)
            self.step_began = None
        self._deliver([(order, self.version)])

    def _begin(self, call: Call) -> None:
        try:
            for request in call.requests:
                answer = self._join(request, call.sampling)
                answer.calls.append(call)
                call.answers.append(answer)
        except ValueError as error:
            self._drop(call)
            self._deliver([(call, error)])
            return
        call.unfinished = len(call.answers)
        if call.streams and call.answers[0].tokens:
            self._deliver([(call, call.answers[0].piece(0))])

    def _join(self, request: Request, sampling: Sampling) -> Answer:
        """The answer to this request that is being written, be it for another call."""
        answer = self._answers.get(request.id)
        if answer is None:
            self._backend.submit(request.id, request.prompt.tolist(), sampling, request.seed)
            answer = self._answers[request.id] = Answer(request, sampling, self.version)
        elif not answer.is_to(request, sampling):
            raise ValueError(
                f"The request {request.id} is being computed with another prompt, seed or "
                "sampling; give each request an id of its own."
            )
        return answer

    def _drop(self, call: Call) -> None:
        for answer in call.answers:
            if call in answer.calls:
                answer.calls.remove(call)
            if not answer.calls and self._answers.get(answer.request.id) is answer:
                self._backend.cancel(answer.request.id)
                del self._answers[answer.request.id]

    def _step(self) -> None:
        assert self._backend.busy, "the engine has lost requests"
        self.step_began = time.monotonic()
        tokens = self._backend.step()
        self.step_began = None
        events: Events = []
        for token in tokens:
            answer = self._answers[token.id]
            answer.tokens.append(token.token)
            answer.logprobs.append(token.logprob)
            if answer.sampling.alternatives:
                answer.alternatives.append(token.alternatives)
            answer.finish_reason = token.finish_reason
            if token.finish_reason is not None:
                del self._answers[token.id]
            events += self._told(answer)
        if events:
            self._deliver(events)

    def _told(self, answer: Answer) -> Events:
        """What the callers learn of an answer's newest token."""
        events: Events = []
        for call in answer.calls:
            if call.streams:
                events.append((call, answer.piece(len(answer.tokens) - 1)))
            elif answer.finish_reason is not None:
                call.unfinished -= 1
                if not call.unfinished:
                    events.append((call, call.answers))
        return events
