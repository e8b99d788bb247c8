"""One request to the engine, from its prompt to its last token."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from llama2.config import ModelConfig
from llama2.generation.pages import prefix_keys
from llama2.generation.sampling import Sampling

FinishReason = Literal["stop", "length"]


Alternatives = tuple[tuple[int, float], ...]
"""The likeliest tokens at one place of an answer, best first, with their log-probabilities."""


@dataclass(frozen=True)
class Token:
    """A token of a request: its log-probability at temperature 1 without truncation, in nats; with
    the last one, why it is the last; and the alternatives that the request asks for."""

    id: str
    token: int
    logprob: float
    finish_reason: FinishReason | None
    alternatives: Alternatives = ()


@dataclass(eq=False)
class Request:
    """A prompt, what was drawn so far, and where its keys and values lie."""

    id: str
    tokens: list[int]
    """Prompt and answer."""
    prompt_length: int
    limit: int
    """Tokens of prompt and longest answer."""
    sampling: Sampling
    uniforms: list[float]
    """One number from 0 to 1 for each token to draw."""
    keys: list[bytes]
    """Of the prompt's pages; the last leaves out the prompt's last token, which every request must
    compute itself to know what follows."""
    pages: list[int] = field(default_factory=list)
    computed: int = 0
    """Tokens whose keys and values lie in the pages."""

    @property
    def prefix(self) -> int:
        """Tokens to compute before those that are computed one at a time: the prompt's last, after
        which comes the first draw, and what was drawn."""
        return self.prompt_length - 1 - self.computed

    @property
    def draws(self) -> bool:
        """Whether the next token is drawn once one more is computed."""
        return self.computed == len(self.tokens) - 1

    @property
    def uniform(self) -> float:
        """The number that decides the next token."""
        return self.uniforms[len(self.tokens) - self.prompt_length]

    def append(self, token: int, logprob: float, alternatives: Alternatives = ()) -> Token:
        """Take the token that was drawn."""
        self.tokens.append(token)
        reason: FinishReason | None = None
        if token in self.sampling.stop_ids:
            reason = "stop"
        elif len(self.tokens) == self.limit:
            reason = "length"
        return Token(self.id, token, logprob, reason, alternatives)


def new_request(
    id: str, prompt: Sequence[int], sampling: Sampling, seed: int, context: int, page_size: int
) -> Request:
    """A request for an answer to `prompt`, whose draws are a function of `seed` alone."""
    limit = min(context, len(prompt) + sampling.max_new_tokens)
    draws = limit - len(prompt)
    uniforms = torch.rand(draws, generator=torch.Generator().manual_seed(seed)).tolist()
    keys = prefix_keys(prompt[:-1], page_size)
    return Request(id, list(prompt), len(prompt), limit, sampling, uniforms, keys)


def check_prompt(prompt: Sequence[int], config: ModelConfig, what: str) -> None:
    """Raise `ValueError`, which calls the prompt `what`, where it is empty, holds ids outside the
    vocabulary, or leaves no room in the context."""
    context, vocabulary = config.max_position_embeddings, config.vocab_size
    if not len(prompt):
        raise ValueError(f"{what} is empty; give at least the beginning-of-text token.")
    if len(prompt) >= context:
        raise ValueError(
            f"{what} has {len(prompt)} tokens, which leaves no room for an answer "
            f"in the context of {context}; shorten it."
        )
    if min(prompt) < 0 or max(prompt) >= vocabulary:
        raise ValueError(
            f"{what} holds a token id outside the vocabulary of {vocabulary}; "
            "use the model's own tokenizer."
        )
