"""What the roles hand each other. Large parts travel as object references, inside lists so that Ray
passes them on without fetching them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import ray

from cluster.weights import Version
from llama2.batches import FloatArray, TokenSequence
from llama2.generation.request import Alternatives

IntArray = np.ndarray[tuple[int], np.dtype[np.int64]]


@dataclass(frozen=True)
class Request:
    """A prompt to answer. The id names the sample for good; the seed decides its draws."""

    id: str
    prompt: IntArray
    seed: int


@dataclass(frozen=True)
class Sample:
    """An answer: its tokens, the log-probability of each, and the weights that drew them."""

    id: str
    prompt: IntArray
    response: IntArray
    logprobs: FloatArray
    version: Version
    finish_reason: Literal["stop", "length"]
    """Whether the answer ended by itself or at the length limit."""
    alternatives: tuple[Alternatives, ...] = ()
    """To each token, where they were asked for."""

    @property
    def finished(self) -> bool:
        """Whether the answer ended by itself."""
        return self.finish_reason == "stop"

    @property
    def tokens(self) -> IntArray:
        """Prompt and answer."""
        return np.concatenate((self.prompt, self.response))

    @property
    def sequence(self) -> TokenSequence:
        """Prompt and answer, with the answer as what is to be predicted."""
        tokens = self.tokens
        return TokenSequence(tokens, np.arange(len(tokens)) >= len(self.prompt))


@dataclass(frozen=True)
class Piece:
    """The next part of an answer that is streamed; the last one says how it ended."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: Literal["stop", "length"] | None
    version: Version
    alternatives: tuple[Alternatives, ...] = ()
    """To each token, where they were asked for."""


@dataclass(frozen=True)
class Rollout:
    """Samples drawn together by one generator."""

    samples: tuple[Sample, ...]
    seconds: float


@dataclass(frozen=True)
class ReferenceLogprobs:
    """Log-probability of each response token under the frozen initial policy, a row per sample."""

    ids: tuple[str, ...]
    logprobs: tuple[FloatArray, ...]


@dataclass(frozen=True)
class Scores:
    """A reward model's score per sample (before the sigmoid), with what balancing needs to know."""

    ids: tuple[str, ...]
    scores: tuple[float, ...]
    lengths: tuple[int, ...]
    """Tokens of prompt and answer."""
    written: tuple[int, ...]
    """Tokens of the answer."""
    versions: tuple[Version, ...]
    finished: tuple[bool, ...]
    generation_seconds: float


@dataclass(frozen=True)
class Place:
    """Where a sample lies: chunk and row within it, and its whitened score."""

    chunk: int
    row: int
    score: float
    slot: int
    """Its number in the iteration's batch, in which the samples of a prompt follow each other."""


@dataclass(frozen=True)
class MiniBatch:
    """A worker's part of one global minibatch."""

    places: tuple[Place, ...]
    total_tokens: int
    """Answer tokens in the whole global minibatch: what its losses are divided by."""


@dataclass(frozen=True)
class Share:
    """A worker's part of one iteration: references to chunks, and the places of its samples."""

    iteration: int
    samples: int
    """Samples of the iteration, over all workers."""
    rollouts: list["ray.ObjectRef[Rollout]"]
    references: list["ray.ObjectRef[ReferenceLogprobs]"]
    minibatches: tuple[MiniBatch, ...]
    metrics: dict[str, float]


@dataclass(frozen=True)
class Experience:
    """A sample as the learner sees it."""

    sample: Sample
    reference_logprobs: Callable[[], FloatArray]
    """Asked for late, since the reference may still be at work on them."""
    score: float
    slot: int = 0
    """Its number in the iteration's batch."""
