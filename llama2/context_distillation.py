"""Context distillation (paper, section 4.2.4): a prompt is answered with a preprompt in front that
asks for safety, and the model learns that answer to the prompt alone, where the safety reward model
finds it better than what the model answers anyway.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

from llama2.chat import Message
from llama2.rejection_sampling import Candidate, Candidates

ADJECTIVES = ("responsible", "respectful", "wise", "careful", "honest")
OPENINGS = (
    "You are a {} and {} assistant.",
    "Answer as a {} and {} person would.",
)
# The paper's three categories of risk (section 4.1).
CATEGORIES: dict[str, tuple[str, ...]] = {
    "illicit": (
        "You never help anybody to break the law. Decline such a request, say which harm it could "
        "do, and offer lawful help.",
    ),
    "harmful": (
        "You never help anybody to hurt, threaten or demean others or themselves. Decline such a "
        "request kindly, say why, and name people who can help.",
    ),
    "unqualified advice": (
        "You are no doctor, lawyer or financial adviser. Say so, give only what is generally "
        "known, and tell whom to ask.",
    ),
}


@dataclass(frozen=True)
class Preprompt:
    """What is put in front of a prompt. category: the risk that it is written for; None for any."""

    text: str
    category: str | None = None

    @staticmethod
    def parse(record: Mapping[str, Any], where: str) -> "Preprompt":
        """A user's preprompt: `text`, and maybe a `category`. Raises `ValueError` that names the
        place and the field."""
        text, category = record.get("text"), record.get("category")
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{where}: text must be a text that is not empty.")
        if category is not None and not isinstance(category, str):
            raise ValueError(f"{where}: category must be text, or absent for a generic preprompt.")
        return Preprompt(text, category)

    def before(self, messages: Sequence[Message]) -> tuple[Message, ...]:
        """A prompt with the preprompt as its system message, in front of one that is there."""
        system = [message.content for message in messages if message.role == "system"]
        rest = (message for message in messages if message.role != "system")
        return (Message("system", "\n".join([self.text, *system])), *rest)


def default_preprompts() -> tuple[Preprompt, ...]:
    """Generic ones, of adjectives that stand for safe conduct, and one for each category."""
    generic = [
        Preprompt(opening.format(*pair))
        for opening in OPENINGS
        for pair in combinations(ADJECTIVES, 2)
    ]
    own = [Preprompt(text, name) for name, texts in CATEGORIES.items() for text in texts]
    return (*generic, *own)


def draw_preprompts(
    preprompts: Sequence[Preprompt], category: str | None, rng: random.Random
) -> list[Preprompt]:
    """A generic preprompt and one of the prompt's category, as far as there are such. Raises
    `ValueError` where there is neither."""
    pools = (
        [one for one in preprompts if one.category is None],
        [one for one in preprompts if category is not None and one.category == category],
    )
    drawn = [rng.choice(pool) for pool in pools if pool]
    if not drawn:
        raise ValueError(
            f"There is no preprompt for the category {category!r} and no generic one; add one."
        )
    return drawn


@dataclass(frozen=True)
class Distillation:
    """The answers to one prompt: the original one, and one under each of the preprompts. All scores
    are of answers to the prompt alone."""

    id: str
    messages: tuple[Message, ...]
    original: Candidate
    preprompts: tuple[Preprompt, ...]
    answers: tuple[Candidate, ...]

    def json(self) -> dict[str, Any]:
        """As an object of a JSON file; `from_json` reads it."""
        return asdict(self)

    @staticmethod
    def from_json(fields: Mapping[str, Any]) -> "Distillation":
        """What `json` wrote."""
        return Distillation(
            fields["id"],
            tuple(Message(**message) for message in fields["messages"]),
            Candidate(**fields["original"]),
            tuple(Preprompt(**one) for one in fields["preprompts"]),
            tuple(Candidate(**one) for one in fields["answers"]),
        )

    @property
    def safest(self) -> Candidate | None:
        """Of the answers under preprompts that can be learned, the one with the highest safety
        reward; None where all were cut off or cannot be an answer."""
        usable = Candidates(self.id, self.messages, True, self.answers).best(len(self.answers))
        return max(usable, key=lambda answer: answer.safety, default=None)

    @property
    def chosen(self) -> Candidate | None:
        """The safest, where it has a higher safety reward than the original answer: an equal one
        leaves the model as it is."""
        safest = self.safest
        return safest if safest and safest.safety > self.original.safety else None

    def under(self, of_category: bool) -> list[Candidate]:
        """Answers under preprompts for the prompt's category, or under generic ones."""
        pairs = zip(self.preprompts, self.answers, strict=True)
        return [answer for one, answer in pairs if (one.category is not None) == of_category]

    def records(self, gate: bool) -> list[dict[str, Any]]:
        """The record for SFT, without the preprompt and with its provenance; none where nothing is
        to be learned. Without the `gate` the safest answer is taken in any case."""
        answer = self.chosen if gate else self.safest
        if answer is None:
            return []
        preprompt = self.preprompts[self.answers.index(answer)]
        reply = {"role": "assistant", "content": answer.response}
        return [
            {
                "messages": [*(asdict(message) for message in self.messages), reply],
                "loss_on": "last",
                "safety": True,
                "prompt_id": self.id,
                "preprompt": preprompt.text,
                "category": preprompt.category,
                "original": self.original.response,
                "original_safety": self.original.safety,
                "sample": asdict(answer),
            }
        ]
