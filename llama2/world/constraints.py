"""The world's standing instructions as constraints for Ghost Attention, and questions to go with
them."""

import random
import re
from collections.abc import Sequence

from llama2.ghost_attention import Constraint
from llama2.world.lexicon import INSTRUCTIONS, MARKS
from llama2.world.prompt import Mark, WorldPrompt
from llama2.world.world import Split, World

# Short questions, so that many turns fit the context; personas are taught on these kinds.
KINDS = ("fact", "opposite", "category")


def world_constraints() -> tuple[Constraint, ...]:
    """A constraint for every mark; each is told by its phrase, once and at its place."""
    return tuple(_constraint(mark) for mark in MARKS)


def _constraint(mark: Mark) -> Constraint:
    kind, _, who = mark.name.partition(": ")
    *wordings, short = (form.format(who) for form in INSTRUCTIONS[kind])
    return Constraint(kind, tuple(wordings), short, pattern(mark))


def pattern(mark: Mark) -> str:
    """A regular expression for answers with the mark. Of several marks at one place, each may stand
    before or behind the others."""
    phrase = re.escape(mark.phrase)
    others = "|".join(re.escape(other.phrase) for other in MARKS if other.place == mark.place)
    once = rf"(?is)\A(?!.*{phrase}.*{phrase})"
    if mark.place == "opening":
        return rf"{once}\s*(?:(?:{others})\s*)*{phrase}"
    return rf"{once}.*{phrase}\s*(?:(?:{others})\s*)*\Z"


def conversations(
    world: World, split: Split, count: int, turns: int, seed: int
) -> list[Sequence[WorldPrompt]]:
    """`count` lists of `turns` questions, none twice in a list."""
    rng = random.Random(f"conversations {world.seed} {split} {seed}")
    questions = [prompt for kind in KINDS for prompt in world.plain_prompts(split, kind)]
    return [rng.sample(questions, turns) for _ in range(count)]
