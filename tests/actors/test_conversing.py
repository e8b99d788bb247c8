"""Conversations under an instruction: what the policy is shown, which answer goes on."""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from actors.conversing import Conversation, converse, dialogue
from actors.sampling import Question
from llama2.chat import Message
from llama2.ghost_attention import Constraint, Instruction
from llama2.rejection_sampling import Candidate
from tests.llama2.test_rejection_sampling import candidate

RED = Instruction((Constraint("Colour", ("Say red.",), "Red.", "red"),), "Say red.", "Red.")
TALK = Conversation("c", ("one", "two", "three"), RED)


class Source:
    """Answers by rule; a prompt's tokens are its words."""

    def __init__(
        self, answers: Callable[[Question], Sequence[Candidate]], context: int = 1000
    ) -> None:
        self.answers, self.context = answers, context
        self.shown: dict[str, str] = {}

    def room(self, messages: Sequence[Message]) -> int:
        return self.context - sum(len(m.content.split()) for m in messages)

    async def sample(
        self, questions: Sequence[Question], temperature: float, count: int
    ) -> list[list[Candidate]]:
        for question in questions:
            self.shown[question.id] = " | ".join(m.content for m in question.messages)
        return [list(self.answers(question)) for question in questions]


def held(source: Any, room: int, *talks: Conversation) -> Any:
    return asyncio.run(converse(source, talks or (TALK,), 1.0, 2, room))


def counting(question: Question) -> list[Candidate]:
    return [candidate(f"red {question.id}", 1.0)]


def test_the_instruction_in_every_turn() -> None:
    source: Any = Source(counting)
    (turns,) = held(source, 5)
    assert source.shown == {
        "c/0": "Say red. one",
        "c/1": "Say red. one | red c/0 | Say red. two",
        "c/2": "Say red. one | red c/0 | Say red. two | red c/1 | Say red. three",
    }
    assert [m.content for m in dialogue(turns)] == [
        "one", "red c/0", "two", "red c/1", "three", "red c/2",
    ]  # fmt: skip


def test_the_oldest_turns_make_room_for_the_answer() -> None:
    """The third turn with the instruction everywhere has 13 words; 8 of them fit beside 5."""
    source: Any = Source(counting, context=16)
    (turns,) = held(source, 5)
    assert len(turns) == 3
    assert source.shown["c/2"] == "Say red. two | red c/1 | Say red. three"


def test_what_could_not_be_learned_whole_is_not_drawn() -> None:
    """With the instruction once, the third turn has 2 + 3 + 4 words, and an answer up to 3 and the
    format's 2."""
    for context, turns in ((13, 2), (14, 3)):
        source: Any = Source(counting, context=context)
        assert [len(t) for t in held(source, 3)] == [turns]


def test_answers_that_keep_the_instruction_come_first_then_reward() -> None:
    def answers(question: Question) -> list[Candidate]:
        return [
            candidate("green", 9.0),
            candidate("red", 1.0),
            candidate("red again", 2.0),
            candidate("red, cut off", 5.0, finished=False),
        ]

    source: Any = Source(answers)
    (turns,) = held(source, 5)
    assert [(t.answer.response, t.kept, t.drawn) for t in turns] == [("red again", True, 4)] * 3
    other: Any = Source(lambda question: answers(question)[:1])
    (turns,) = held(other, 5)
    assert [(t.answer.response, t.kept) for t in turns] == [("green", False)] * 3


def test_where_conversations_end() -> None:
    """Behind an answer that was cut off, or is empty; the other conversations go on."""

    def answers(question: Question) -> list[Candidate]:
        if question.id == "a/1":
            return [candidate("red, cut off", 1.0, finished=False)]
        return [candidate("" if question.id == "b/2" else "red", 1.0)]

    talks = [Conversation(name, TALK.questions, RED) for name in "abc"]
    source: Any = Source(answers)
    assert [len(t) for t in held(source, 5, *talks)] == [1, 2, 3]
    assert set(source.shown) == {"a/0", "a/1", "b/0", "b/1", "b/2", "c/0", "c/1", "c/2"}
