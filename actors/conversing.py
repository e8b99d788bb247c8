"""Conversations of several turns under an instruction, each turn answered by the generators."""

from collections.abc import Sequence
from dataclasses import dataclass

from actors.sampling import Question, Sampler
from llama2.chat import Message
from llama2.ghost_attention import Instruction
from llama2.rejection_sampling import Candidate, Candidates

Dialogue = tuple[Message, ...]
SPARE = 2
"""Tokens by which an answer may be longer when it is learned: the space before it, and the end."""


@dataclass(frozen=True)
class Conversation:
    """What the user says turn by turn, and the instruction that holds for all of it."""

    id: str
    questions: tuple[str, ...]
    instruction: Instruction


@dataclass(frozen=True)
class Answered:
    """A turn: how many answers were drawn, the one that the conversation goes on with, and whether
    it keeps to the instruction (None where that cannot be told)."""

    question: str
    drawn: int
    answer: Candidate
    kept: bool | None


async def converse(
    source: Sampler,
    conversations: Sequence[Conversation],
    temperature: float,
    samples: int,
    max_new_tokens: int,
) -> list[list[Answered]]:
    """The turns of every conversation, the instruction in each of them (paper, section 3.3); all
    conversations side by side.

    Of several samples, one that keeps to the instruction comes before one that does not, then the
    one with the highest reward. A conversation ends early where there is no room for an answer, and
    where no answer can be learned: all were cut off, or are empty.
    """
    found: list[list[Answered]] = [[] for _ in conversations]
    going = list(range(len(conversations)))
    turn = 0
    while going:
        shown = {i: _shown(conversations[i], found[i], source, max_new_tokens) for i in going}
        going = [i for i in going if shown[i] is not None]
        asked = [
            Question(f"{conversations[i].id}/{turn}", prompt, safety=False)
            for i in going
            if (prompt := shown[i]) is not None
        ]
        drawn = await source.sample(asked, temperature, samples)
        for i, question, several in zip(going, asked, drawn, strict=True):
            answer = _chosen(conversations[i].instruction, question, several)
            if answer is not None:
                kept = conversations[i].instruction.is_kept(answer.response)
                said = conversations[i].questions[turn]
                found[i].append(Answered(said, len(several), answer, kept))
        turn += 1
        going = [i for i in going if len(found[i]) == turn < len(conversations[i].questions)]
    return found


def dialogue(turns: Sequence[Answered]) -> Dialogue:
    """The messages of turns, without the instruction."""
    return tuple(
        message
        for turn in turns
        for message in (Message("user", turn.question), Message("assistant", turn.answer.response))
    )


def _shown(
    conversation: Conversation, turns: Sequence[Answered], source: Sampler, max_new_tokens: int
) -> Dialogue | None:
    """The next prompt, with the instruction in every turn.

    The oldest turns are left out as far as the context demands, since the instruction is in the
    others too. None where the longest answer would not fit behind the whole conversation, with the
    instruction in the first turn, as it is to be learned.
    """
    instruction = conversation.instruction
    messages = (*dialogue(turns), Message("user", conversation.questions[len(turns)]))
    if source.room(instruction.once(messages)) < max_new_tokens + SPARE:
        return None
    starts = range(0, len(messages), 2)
    several = (instruction.joined(messages[start:]) for start in starts)
    return next((shown for shown in several if source.room(shown) >= max_new_tokens), None)


def _chosen(
    instruction: Instruction, question: Question, several: Sequence[Candidate]
) -> Candidate | None:
    candidates = Candidates(question.id, question.messages, question.safety, tuple(several))
    best = candidates.best(len(several))
    kept = [one for one in best if instruction.is_kept(one.response) is not False]
    return next(iter([*kept, *best]), None)
