"""Ghost-Attention adherence: how long a model keeps to an instruction of the first turn (paper,
table 30)."""

from collections.abc import Sequence
from pathlib import Path

from actors.conversing import Conversation
from actors.measured_model import MeasuredModel, Question
from jobs.conversations import read_constraints, read_conversations
from jobs.evaluate_config import EvaluateConfig
from jobs.ghost_attention_config import ConversationConfig
from llama2.chat import Message, dialogue_fault
from llama2.evaluation import Measure
from llama2.generation import Sampling
from llama2.ghost_attention import adherence_by_turn
from llama2.prompting import Prompting, TooLong


def find_conversations(config: EvaluateConfig, of_world: bool) -> list[Conversation]:
    """What is to be asked turn by turn: of the world, or of users' dialogues with their own
    constraints; nothing where there are neither.

    Raises `ValueError` where prompts or constraints are missing or wrong, or nobody could tell
    whether a constraint is kept.
    """
    if not config.conversations or not (of_world or config.constraints):
        return []
    if config.constraints is not None:
        check_constraints(config.constraints)
    return read_conversations(
        ConversationConfig(
            preset=config.preset,
            runs=config.runs,
            seed=config.seed,
            prompts=config.prompts,
            constraints=config.constraints,
            conversations=config.conversations,
        ),
        "heldout",
    )


def check_constraints(path: Path) -> None:
    """Raise `ValueError` or `FileNotFoundError` where constraints are missing or wrong, or nobody
    could tell whether one is kept."""
    for one in read_constraints(path):
        if one.pattern is None:
            raise ValueError(
                f"Whether an answer keeps to {one.short!r} cannot be told; give each of {path} a "
                "pattern."
            )


def adherence(
    model: MeasuredModel,
    prompting: Prompting,
    conversations: Sequence[Conversation],
    max_new_tokens: int,
) -> dict[str, Measure]:
    """Share of conversations in which the n-th answer keeps to the instruction, by "turn n".

    The likeliest answers; all conversations go side by side. One ends early where the context is
    full, and behind an answer that no message can follow, as an empty one: its later turns count as
    not kept.
    """
    sampling = Sampling(temperature=0.0, max_new_tokens=max_new_tokens, stop_ids=prompting.stop_ids)
    said: list[list[Message]] = [[] for _ in conversations]
    kept: list[list[bool]] = [[] for _ in conversations]
    going = list(range(len(conversations)))
    while going:
        prompts: dict[int, list[int]] = {}
        for i in going:
            turn = len(kept[i])
            if turn < len(conversations[i].questions):
                said[i].append(Message("user", conversations[i].questions[turn]))
                tokens = _tokens(conversations[i], said[i], prompting)
                if tokens is not None:
                    prompts[i] = tokens
        questions = [Question(tokens, sampling) for tokens in prompts.values()]
        going = []
        for i, answer in zip(prompts, model.answer(questions), strict=True):
            kept[i].append(bool(conversations[i].instruction.is_kept(answer.text.strip())))
            said[i].append(Message("assistant", answer.text.strip()))
            if dialogue_fault(said[i]) is None:
                going.append(i)
            else:
                kept[i] += [False] * (len(conversations[i].questions) - len(kept[i]))
    return {f"turn {turn}": found for turn, found in adherence_by_turn(kept).items()}


def _tokens(
    conversation: Conversation, messages: Sequence[Message], prompting: Prompting
) -> list[int] | None:
    try:
        return prompting.encode_chat(conversation.instruction.once(messages))
    except TooLong:
        return None
