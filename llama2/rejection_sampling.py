"""Rejection sampling (paper, section 3.2.3): of several answers to a prompt the best is learned.

The best and the median of S samples are averaged over all ways to take S of the N samples that were
drawn, not over one of them, so that a curve over S is as smooth as the samples allow.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from itertools import groupby, islice
from math import comb
from statistics import fmean
from typing import Any

from llama2.chat import Message, dialogue_fault
from llama2.evaluation import Estimate, estimate

Json = dict[str, Any]


@dataclass(frozen=True)
class Candidate:
    """A sampled answer, where it comes from, and its scores by the reward models (before the
    sigmoid)."""

    id: str
    response: str
    temperature: float
    reward: float
    """The composite of both scores (`llama2.rewards`), as PPO sees it before whitening."""
    helpfulness: float
    safety: float
    finished: bool
    """Whether the answer ended by itself; one that was cut off must not be learned."""
    tokens: int
    logprob: float
    """Of the answer under the policy at temperature 1, in nats."""
    round: str
    """The run that drew it."""
    model: str
    """Checksum of the policy's weights."""
    reward_then: float | None = None
    """The reward it had in its own round, where this round's reward models have scored it again."""


@dataclass(frozen=True)
class Candidates:
    """All samples for one prompt."""

    id: str
    messages: tuple[Message, ...]
    safety: bool
    samples: tuple[Candidate, ...]

    def json(self) -> Json:
        """As an object of a JSON file; `from_json` reads it."""
        return asdict(self)

    @staticmethod
    def from_json(fields: Json) -> "Candidates":
        """What `json` wrote."""
        return Candidates(
            fields["id"],
            tuple(Message(**message) for message in fields["messages"]),
            fields["safety"],
            tuple(Candidate(**sample) for sample in fields["samples"]),
        )

    @property
    def text(self) -> str:
        """The prompt as one text: prompts that agree in it are the same."""
        return "\n".join(f"{m.role}: {m.content.strip()}" for m in self.messages)

    def best(self, count: int) -> list[Candidate]:
        """The `count` samples of highest reward, each another text; of equals the first drawn.

        Fewer, or none, where the others were cut off or cannot be an answer (empty, or with a tag
        of the chat format).
        """
        chosen: dict[str, Candidate] = {}
        for sample in sorted(self.samples, key=lambda sample: -sample.reward):
            answer = Message("assistant", sample.response)
            if sample.finished and dialogue_fault([*self.messages, answer]) is None:
                chosen.setdefault(sample.response.strip(), sample)
        return list(chosen.values())[:count]

    def records(self, count: int) -> list[Json]:
        """The best samples as records for SFT, with their provenance and the rewards of all."""
        rewards = sorted((sample.reward for sample in self.samples), reverse=True)
        return [
            {
                "messages": [
                    *(asdict(message) for message in self.messages),
                    {"role": "assistant", "content": sample.response},
                ],
                "loss_on": "last",
                "safety": self.safety,
                "prompt_id": self.id,
                "rank": rank,
                "rewards_of_all": rewards,
                "sample": asdict(sample),
            }
            for rank, sample in enumerate(self.best(count), 1)
        ]


def joined(rounds: Iterable[Candidates]) -> list[Candidates]:
    """Samples of several rounds by prompt, in the order of first appearance; a sample that several
    of them have counts once."""
    found: dict[str, Candidates] = {}
    samples: dict[str, dict[tuple[str, str, str], Candidate]] = {}
    for one in rounds:
        found.setdefault(one.text, one)
        known = samples.setdefault(one.text, {})
        for sample in one.samples:
            # Runs in different folders may have the same name.
            known.setdefault((sample.round, sample.id, sample.response), sample)
    return [replace(found[text], samples=tuple(samples[text].values())) for text in found]


@lru_cache(maxsize=1024)
def rank_chances(count: int, size: int, rank: int) -> tuple[float, ...]:
    """For each of `count` sorted values, smallest first, the chance to be the `rank`-th smallest
    (from 1) of `size` of them that are taken at random."""
    assert 1 <= rank <= size <= count
    choices = comb(count, size)
    return tuple(
        comb(below, rank - 1) * comb(count - 1 - below, size - rank) / choices
        for below in range(count)
    )


def expected_median(values: Sequence[float], size: int) -> float:
    """The mean, over all choices of `size` of the values, of the choice's median; that of an even
    number is half-way between the middle two."""
    lower, upper = (rank_chances(len(values), size, r) for r in ((size + 1) // 2, size // 2 + 1))
    return sum(
        value * (a + b) / 2 for value, a, b in zip(sorted(values), lower, upper, strict=True)
    )


def expected_of_best(rewards: Sequence[float], values: Sequence[float], size: int) -> float:
    """The mean, over all choices of `size` samples, of the value of the one with the highest
    reward; the mean value where several have it. With the rewards as values, the expected best
    reward of `size` samples."""
    chances = iter(rank_chances(len(rewards), size, size))
    pairs = sorted(zip(rewards, values, strict=True))
    total = 0.0
    for _, tied in groupby(pairs, key=lambda pair: pair[0]):
        several = [value for _, value in tied]
        total += fmean(several) * sum(islice(chances, len(several)))
    return total


@dataclass(frozen=True)
class Point:
    """Reward of `size` samples a prompt, averaged over prompts (paper, figure 7)."""

    size: int
    best: Estimate
    median: Estimate


def curve(
    rewards: Sequence[Sequence[float]], values: Sequence[Sequence[float]] | None = None
) -> list[Point]:
    """Best and median reward against the number of samples, from the rewards of each prompt's
    samples; at 1, 2, 3, 4, 6, 8, 12, 16, ... up to as many as every prompt has.

    values: with them, the best is still chosen by reward, and `best` and `median` are of these.
    """
    values = rewards if values is None else values
    assert rewards and all(rewards)
    most = min(map(len, rewards))
    sizes = {2**k for k in range(most.bit_length())} | {3 * 2**k for k in range(most.bit_length())}
    return [
        Point(
            size,
            estimate([expected_of_best(r, v, size) for r, v in zip(rewards, values, strict=True)]),
            estimate([expected_median(of_prompt, size) for of_prompt in values]),
        )
        for size in sorted({*sizes, most})
        if size <= most
    ]
