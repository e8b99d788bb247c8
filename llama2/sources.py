"""Where records come from: the synthetic world, in numbered parts that any process can make."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import Literal

from llama2.chat import Message
from llama2.records import Comparison, Dialogue, Document, Prompt
from llama2.world import World, WorldPrompt

Kind = Literal["pretrain", "sft", "helpfulness", "safety"]


@lru_cache(maxsize=1)
def world_of(seed: int) -> World:
    """The world of a seed, made once per process."""
    return World(seed)


@dataclass(frozen=True)
class WorldSource:
    """`size` records of one kind from the world of a seed, in parts of `part_size`."""

    kind: Kind
    seed: int
    size: int
    part_size: int = 1000

    @property
    def parts(self) -> int:
        """How many parts there are."""
        return -(-self.size // self.part_size)

    def part(self, number: int) -> Iterator[Document | Dialogue | Comparison]:
        """The records of one part, a function of the seed and the number alone."""
        world = world_of(self.seed)
        count = min(self.part_size, self.size - number * self.part_size)
        name = f"world {self.seed} {self.kind} part {number}"
        if self.kind == "pretrain":
            for text in islice(world.corpus(number), count):
                yield Document(text, name)
        elif self.kind == "sft":
            for messages in world.dialogues(count, number):
                yield Dialogue(tuple(_message(message) for message in messages), name)
        else:
            for pair in world.comparisons(count, number, self.kind):
                yield Comparison(
                    prompt=_messages(pair.prompt),
                    chosen=pair.chosen,
                    rejected=pair.rejected,
                    rating=pair.rating,
                    # An unsafe but helpful answer may well win on helpfulness; only the safety
                    # model's data excludes it.
                    safety=pair.safety_label if self.kind == "safety" else None,
                    source=name,
                )


def world_prompts(
    seed: int, split: Literal["train", "heldout"], size: int, draw: int
) -> list[Prompt]:
    """`size` prompts of a split, kinds mixed by the world's weights; `draw` numbers the
    selection."""
    found = world_of(seed).sample_prompts(split, size, draw)
    return [Prompt(_messages(prompt), prompt.safety, f"world {seed} {split}") for prompt in found]


def _messages(prompt: WorldPrompt) -> tuple[Message, ...]:
    return tuple(_message(message) for message in prompt.messages)


def _message(message: dict[str, str]) -> Message:
    return Message(message["role"], message["content"])  # type: ignore[arg-type]
