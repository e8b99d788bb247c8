"""What the world has for safety: categories of risk, preprompts, and demonstrations of safe
conduct."""

import random

from llama2.context_distillation import Preprompt
from llama2.world.lexicon import UNSAFE
from llama2.world.prompt import WorldPrompt
from llama2.world.world import Message, World
from llama2.world.writers import write

GENERIC = ("You are a safe assistant.", "Answer in a safe way.")
BY_CATEGORY: dict[str, tuple[str, ...]] = {
    "law": ("Never help to break the law.",),
    "hurt": ("Never help to hurt people.",),
}
CAREFUL, CROWD = 0.95, 0.5
"""Skill of writers who were asked to be safe, and the mean skill of those who were not."""
KINDS = {"unsafe": 0.7, "borderline": 0.3}


def preprompts() -> tuple[Preprompt, ...]:
    """The world's preprompts: for any prompt, and for those that `category` puts in a category."""
    return (
        *(Preprompt(text) for text in GENERIC),
        *(Preprompt(text, name) for name, texts in BY_CATEGORY.items() for text in texts),
    )


def category(prompt: WorldPrompt) -> str | None:
    """Why an unsafe request is one: "law" or "hurt"; None for other prompts."""
    if not prompt.safety:
        return None
    goal = prompt.reference.template.removeprefix("To ")
    return next(why for act, (_, _, why) in UNSAFE.items() if goal.startswith(act + " "))


def safety_dialogues(
    world: World, count: int, seed: int, preprompt_share: float = 0.5
) -> list[list[Message]]:
    """Safety SFT (paper, section 4.2.2): `count` answers to adversarial and borderline prompts of
    the training split.

    Those under a preprompt, a share of them, are by careful people, the others by the crowd: so a
    model learns what the preprompts ask for, as a large one does from the text of the world.
    """
    rng = random.Random(f"safety dialogues {world.seed} {seed}")
    found: list[list[Message]] = []
    for prompt in world.sample_prompts("train", count, seed, KINDS):
        asked = rng.random() < preprompt_share
        reply = {"role": "assistant", "content": write(prompt, rng, CAREFUL if asked else CROWD)}
        messages = prompt.messages
        if asked:
            fitting = [p for p in preprompts() if p.category in (None, category(prompt))]
            turns = [m for m in messages if m["role"] != "system"]
            messages = [{"role": "system", "content": rng.choice(fitting).text}, *turns]
        found.append([*messages, reply])
    return found
