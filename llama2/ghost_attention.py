"""Ghost Attention (paper, section 3.3): dialogues in which an instruction holds from the first turn
to the last.

To draw the answers, the instruction is joined to every message of the user. To learn them, it
stands once, as the system message, which is part of the first turn; and only the last answer is
learned, since the earlier ones were written under more instructions than are left.
"""

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llama2.chat import Message
from llama2.evaluation import Measure, rate_of

SHORTENED_SHARE = 0.5


@dataclass(frozen=True)
class Constraint:
    """Something to be kept up in a whole dialogue.

    kind: of several constraints at once, each is of another kind. instructions: ways to ask for it.
    short: the same in the fewest words ("Figure: Napoleon."). pattern: a regular expression that
    every answer must match; None where only a person could tell.
    """

    kind: str
    instructions: tuple[str, ...]
    short: str
    pattern: str | None = None

    @staticmethod
    def parse(record: Mapping[str, Any], where: str) -> "Constraint":
        """A user's constraint: `kind`, `instructions`, `short`, and maybe `pattern`. Raises
        `ValueError` that names the place and the field."""
        for name in ("kind", "short"):
            if not isinstance(record.get(name), str) or not record[name].strip():
                raise ValueError(f"{where}: {name} must be text that is not empty.")
        given = record.get("instructions")
        if not isinstance(given, list) or not all(isinstance(i, str) and i.strip() for i in given):
            raise ValueError(f"{where}: instructions must be a list of texts.")
        if not given:
            raise ValueError(f"{where}: instructions is empty; give at least one text.")
        pattern = record.get("pattern")
        try:
            re.compile(pattern or "")
        except (re.error, TypeError) as error:
            raise ValueError(
                f"{where}: pattern {pattern!r} is no regular expression ({error})."
            ) from error
        return Constraint(record["kind"], tuple(given), record["short"], pattern)


@dataclass(frozen=True)
class Instruction:
    """One or more constraints, put into words."""

    constraints: tuple[Constraint, ...]
    text: str
    short: str

    def is_kept(self, answer: str) -> bool | None:
        """Whether an answer keeps to all constraints; None where one of them has no pattern."""
        patterns = [constraint.pattern for constraint in self.constraints]
        if any(pattern is None for pattern in patterns):
            return None
        return all(re.search(pattern or "", answer) for pattern in patterns)

    def joined(self, messages: Sequence[Message]) -> tuple[Message, ...]:
        """A dialogue with the instruction in front of every message of the user."""
        return tuple(
            Message("user", f"{self.text} {message.content}") if message.role == "user" else message
            for message in messages
        )

    def once(self, messages: Sequence[Message], shortened: bool = False) -> tuple[Message, ...]:
        """A dialogue with the instruction in its first turn alone, in front of what the system
        message says already."""
        text = self.short if shortened else self.text
        system = [message.content for message in messages if message.role == "system"]
        rest = (message for message in messages if message.role != "system")
        return (Message("system", "\n".join([text, *system])), *rest)


def draw_instruction(
    constraints: Sequence[Constraint], most: int, rng: random.Random
) -> Instruction:
    """One to `most` constraints of different kinds, each in one of its wordings."""
    by_kind: dict[str, list[Constraint]] = {}
    for constraint in constraints:
        by_kind.setdefault(constraint.kind, []).append(constraint)
    kinds = rng.sample(sorted(by_kind), rng.randint(1, min(most, len(by_kind))))
    chosen = tuple(rng.choice(by_kind[kind]) for kind in kinds)
    return Instruction(
        chosen,
        " ".join(rng.choice(constraint.instructions) for constraint in chosen),
        " ".join(constraint.short for constraint in chosen),
    )


def training_records(
    instruction: Instruction, messages: Sequence[Message], rng: random.Random
) -> list[dict[str, Any]]:
    """SFT records of a dialogue that was answered under the instruction: one for every answer,
    which alone is learned, with all that came before it; half of them with the short wording.

    messages: without the instruction, ending with an answer.
    """
    records = []
    for end, message in enumerate(messages, 1):
        if message.role == "assistant":
            shortened = rng.random() < SHORTENED_SHARE
            turns = instruction.once(messages[:end], shortened)
            records.append(
                {
                    "messages": [{"role": turn.role, "content": turn.content} for turn in turns],
                    "loss_on": "last",
                    "turn": sum(turn.role == "assistant" for turn in turns),
                    "kinds": [constraint.kind for constraint in instruction.constraints],
                    "shortened": shortened,
                }
            )
    return records


def adherence_by_turn(kept: Sequence[Sequence[bool]]) -> dict[int, Measure]:
    """Share of the dialogues whose n-th answer keeps to its instruction, by n from 1; a dialogue
    may have fewer answers than others (paper, table 30).

    kept: of each dialogue, whether each of its answers does.
    """
    turns = max(map(len, kept), default=0)
    return {
        turn: rate_of([one[turn - 1] for one in kept if len(one) >= turn])
        for turn in range(1, turns + 1)
    }


def default_constraints() -> tuple[Constraint, ...]:
    """Hobbies, languages and public figures that any large model knows."""
    hobbies = ("tennis", "chess", "cooking", "gardening", "painting", "sailing", "photography")
    languages = ("French", "Spanish", "German", "Italian", "Portuguese", "Dutch")
    figures = (
        "Napoleon", "William Shakespeare", "Albert Einstein", "Marie Curie", "Jane Austen",
        "Mahatma Gandhi", "Leonardo da Vinci",
    )  # fmt: skip
    return (
        *(_default("Hobby", name, "You enjoy {}, and let it be seen whatever you are asked.",
                   "Always let your love of {} be seen from now on.") for name in hobbies),
        *(_default("Language", name, "Speak in {}.", "From now on, answer in {} only.")
          for name in languages),
        *(_default("Figure", name, "Act as {}.", "Always act as {} from now on.")
          for name in figures),
    )  # fmt: skip


def _default(kind: str, name: str, *instructions: str) -> Constraint:
    return Constraint(kind, tuple(i.format(name) for i in instructions), f"{kind}: {name}.")
