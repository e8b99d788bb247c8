"""What a prompt of the synthetic world is, and what the judge must know of a right answer."""

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

Form = Literal["value", "members", "sequence", "steps"]

# Words that carry no content: two texts that share only these have nothing in common.
STOPWORDS = frozenset(
    word
    for line in (
        "a an and are as at be by for from has have i in into is it its of on or out that the them",
        "then they this to up was with you your",
    )
    for word in line.split()
)


@dataclass(frozen=True)
class Reference:
    """The content of a right answer, and what would contradict it.

    template: a full sentence with one `{}` for the content; its words are what "restating the
        question" means.
    right: form "value": the one word; "members": all words that qualify, of which exactly `count`
        are asked for; "sequence": the words in order; "steps": one phrase, known by its content
        words.
    rivals: contents of the same type that are wrong here; they contradict the right one.
    intruders: other words that make an answer one to another question, such as other people's
        names.
    echoes: phrases of the question that an answer may repeat although they hold rivals, such as
        "larger than 37".
    """

    form: Form
    template: str
    right: tuple[str, ...]
    rivals: tuple[str, ...]
    intruders: tuple[str, ...] = ()
    echoes: tuple[str, ...] = ()
    count: int = 1


@dataclass(frozen=True)
class Mark:
    """What a standing instruction demands of every answer: a fixed phrase at a fixed place."""

    name: str
    place: Literal["opening", "closing"]
    phrase: str

    def put_on(self, answer: str) -> str:
        """`answer` with the phrase at its place."""
        return f"{self.phrase} {answer}" if self.place == "opening" else f"{answer} {self.phrase}"


@dataclass(frozen=True)
class WorldPrompt:
    """One request: what the model sees (`system`, `text`) and what the judge knows.

    kind: the family it belongs to (a key of `llama2.world.WEIGHTS`). safety: tagged adversarial, so
    that the safety reward applies. mark: what the standing instruction demands, None where there is
    none.
    """

    system: str | None
    text: str
    kind: str
    safety: bool
    reference: Reference
    mark: Mark | None = None

    @property
    def messages(self) -> list[dict[str, str]]:
        """The dialogue up to the answer, as `role`/`content` messages."""
        head = [{"role": "system", "content": self.system}] if self.system else []
        return [*head, {"role": "user", "content": self.text}]


@dataclass(frozen=True)
class Question:
    """A request without frame, system prompt or persona: what the two splits never share."""

    text: str
    kind: str
    reference: Reference


def normalized(text: str) -> str:
    """Lower case, single spaces: two prompts that agree in this are the same prompt."""
    return " ".join(text.lower().split())


def words(text: str) -> list[str]:
    """Lower-case words and numbers of a text, in order; punctuation is dropped."""
    return re.findall(r"[a-z]+(?:'[a-z]+)?|\d+", text.lower())


@lru_cache(maxsize=1 << 16)
def content_words(text: str) -> frozenset[str]:
    """The distinct words of a phrase that are not stopwords."""
    return frozenset(words(text)) - STOPWORDS


def article(noun: str) -> str:
    """The noun with its indefinite article."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def joined(items: tuple[str, ...] | list[str]) -> str:
    """ "a, b and c"."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"
