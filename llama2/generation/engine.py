"""Generation with continuous batching: requests join and leave between steps."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from llama2.generation.pages import Pages
from llama2.generation.request import (
    Alternatives,
    FinishReason,
    Request,
    Token,
    check_prompt,
    new_request,
)
from llama2.generation.runner import Runner
from llama2.generation.sampling import Sampling
from llama2.generation.scheduler import Counters, Scheduler
from llama2.model import Transformer


@dataclass(frozen=True)
class Completion:
    """An answer: token ids, and the log-probability of each at temperature 1 without truncation."""

    tokens: list[int]
    logprobs: list[float]
    finish_reason: FinishReason


class Engine:
    """Answers requests, up to `max_batch_size` at a time.

    cache_tokens: tokens whose keys and values are held at a time, in memory that is taken at once;
    by default what all rows need, or as much as a part of the free memory holds, which a CPU takes
    page by page. Requests that find no room wait, and the newest give
    way. chunk: most tokens of one prompt in a step, rounded up to whole pages. share_prefixes: take
    over keys and values of prompts that begin alike.
    """

    def __init__(
        self,
        model: Transformer,
        max_batch_size: int = 256,
        cache_tokens: int | None = None,
        chunk: int = 512,
        share_prefixes: bool = True,
    ) -> None:
        self.model = model
        self._runner = Runner(model, max_batch_size, cache_tokens)
        cache = self._runner.cache
        self._pages = Pages(self._runner.pages, cache.page_size)
        self._scheduler = Scheduler(self._pages, max_batch_size, chunk, 2 * chunk, cache.copy)
        self._requests: dict[str, Request] = {}
        self._damaged = False
        self._share_prefixes = share_prefixes

    @property
    def busy(self) -> bool:
        """Whether a request is unfinished."""
        return bool(self._requests)

    @property
    def counters(self) -> Counters:
        """What was done so far."""
        return self._scheduler.counters

    def submit(self, id: str, prompt: Sequence[int], sampling: Sampling, seed: int) -> None:
        """Take a request, whose id no unfinished one has. Its draws are a function of `seed`,
        whatever else is computed beside it.

        Raises `ValueError` for a prompt that is empty, holds ids outside the vocabulary, leaves no
        room in the context, or needs more keys and values than the cache holds.
        """
        assert id not in self._requests, f"request {id} is not finished"
        self._check(prompt, sampling, "The prompt")
        context = self.model.config.max_position_embeddings
        made = new_request(id, prompt, sampling, seed, context, self._pages.size)
        if not self._share_prefixes:
            made.keys = []
        self._requests[id] = made
        self._scheduler.waiting.append(made)

    def step(self) -> list[Token]:
        """One pass through the model: the next token of every request whose prompt is computed.

        Raises `FloatingPointError` where the model gives no numbers.
        """
        plan = self._scheduler.plan()
        if not plan:
            return []
        drawing = [request for request, _ in plan if request.draws]
        drawn = self._runner.run(plan)
        for request, count in plan:
            self._scheduler.computed(request, count)
        self.counters.steps += 1
        self.counters.drawn += len(drawing)
        return [self._take(*row) for row in zip(drawing, *drawn, strict=True)]

    def cancel(self, id: str) -> None:
        """Give up a request; one that is unknown or has ended is left as it is."""
        if id in self._requests:
            self._scheduler.remove(self._requests.pop(id))

    def weights_changed(self) -> None:
        """Compute with what the model's weights now are, and forget keys and values of those
        before. Not while a request is unfinished."""
        assert not self.busy, "requests are unfinished"
        self._runner.weights_changed()
        self._pages.forget()
        if self._damaged:  # what is no number in a page spreads to rows that are given it later
            self._runner.cache.clear()
            self._damaged = False

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling | None = None,
        seeds: Sequence[int] | None = None,
    ) -> list[Completion]:
        """One completion per prompt of token ids, in order.

        seeds: one per prompt; by default they are counted up from `sampling.seed`.
        Raises `ValueError` as `submit` does, before anything is computed.
        """
        assert not self.busy, "requests are unfinished"
        sampling = sampling or Sampling()
        seeds = range(sampling.seed, sampling.seed + len(prompts)) if seeds is None else seeds
        for i, prompt in enumerate(prompts):
            self._check(prompt, sampling, f"Prompt {i}")
        drawn: dict[str, list[Token]] = {str(i): [] for i in range(len(prompts))}
        try:
            for id, prompt, seed in zip(drawn, prompts, seeds, strict=True):
                self.submit(id, prompt, sampling, seed)
            while self.busy:
                for token in self.step():
                    drawn[token.id].append(token)
        finally:  # nothing is left behind by an interrupt
            for id in drawn:
                self.cancel(id)
        return [_completion(tokens) for tokens in drawn.values()]

    def _take(
        self, request: Request, token: int, logprob: float, alternatives: Alternatives
    ) -> Token:
        if math.isnan(logprob):
            self._damaged = True
            raise FloatingPointError(
                f"The model gives no number behind token {len(request.tokens)} of request "
                f"{request.id}; its weights are damaged."
            )
        drawn = request.append(token, logprob, alternatives)
        if drawn.finish_reason:
            del self._requests[request.id]
            self._scheduler.remove(request)
        return drawn

    def _check(self, prompt: Sequence[int], sampling: Sampling, what: str) -> None:
        check_prompt(prompt, self.model.config, what)
        context = self.model.config.max_position_embeddings
        longest = min(context, len(prompt) + sampling.max_new_tokens) - 1
        room = self._pages.count * self._pages.size
        if longest > room:
            raise ValueError(
                f"{what} and its answer may have {longest + 1} tokens and the cache holds {room}; "
                "ask for fewer tokens, or make the cache larger."
            )


def _completion(tokens: list[Token]) -> Completion:
    reason = tokens[-1].finish_reason
    assert reason is not None
    return Completion([t.token for t in tokens], [t.logprob for t in tokens], reason)
