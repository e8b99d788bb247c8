"""Questions and instructions of conversations, to learn from or to measure adherence by."""

import hashlib
import json
import random
from dataclasses import asdict
from pathlib import Path
from typing import Literal

from actors.conversing import Conversation
from cluster.files import read_records
from jobs.ghost_attention_config import ConversationConfig
from jobs.sampling import Prompts, read_prompts
from llama2.ghost_attention import Constraint, default_constraints, draw_instruction
from llama2.packing import sample_order
from llama2.sources import world_of
from llama2.world.constraints import conversations as world_conversations
from llama2.world.constraints import world_constraints


def read_conversations(
    config: ConversationConfig, split: Literal["train", "heldout"]
) -> list[Conversation]:
    """Conversations to hold: of the world, or of the user's turns in users' own dialogues.

    Raises `ValueError` or `FileNotFoundError` where prompts or constraints are missing or wrong.
    """
    prompts = read_prompts(config, config.prompts, split)
    questions = _questions(config, prompts, split)
    constraints = _constraints(config, prompts)
    found = []
    for name, turns in questions:
        rng = random.Random(f"instruction {config.seed} {name}")
        instruction = draw_instruction(constraints, config.most_constraints, rng)
        found.append(Conversation(name, turns, instruction))
    return found


def digest(conversations: list[Conversation]) -> str:
    """A checksum of what is asked."""
    text = json.dumps([asdict(one) for one in conversations])
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _questions(
    config: ConversationConfig, prompts: Prompts, split: Literal["train", "heldout"]
) -> list[tuple[str, tuple[str, ...]]]:
    if prompts.world_seed is not None:
        world = world_of(prompts.world_seed)
        drawn = world_conversations(world, split, config.conversations, config.turns, config.seed)
        return [(str(i), tuple(prompt.text for prompt in one)) for i, one in enumerate(drawn)]
    count = min(config.conversations, len(prompts.prompts))
    return [
        (str(i), tuple(m.content for m in prompts.prompts[i].messages if m.role == "user"))
        for i in sample_order(0, count, len(prompts.prompts), config.seed)
    ]


def read_constraints(path: Path) -> tuple[Constraint, ...]:
    """Users' constraints, one a record. Raises `ValueError` or `FileNotFoundError` where they are
    missing or wrong."""
    return tuple(Constraint.parse(record, where) for where, record in read_records(path))


def _constraints(config: ConversationConfig, prompts: Prompts) -> tuple[Constraint, ...]:
    if config.constraints is not None:
        return read_constraints(config.constraints)
    return default_constraints() if prompts.world_seed is None else world_constraints()
