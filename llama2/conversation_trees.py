"""OpenAssistant's message trees (Köpf et al. 2023): many answers to one question, ranked by people.

A tree's `prompt` is its first message; each message has `text`, a `role` (prompter or assistant)
and `replies`, and answers have a `rank`, 0 for the best, or null where they were not ranked.
Messages that were deleted, or that reviewers rejected, are passed over with all that follows them.
"""

from collections.abc import Iterator, Mapping
from itertools import combinations
from typing import Any

from llama2.chat import Message
from llama2.record_fields import Fields, Rating

Node = Mapping[str, Any]


def is_tree(fields: Fields) -> bool:
    """Whether a record is a message tree."""
    return isinstance(fields.get("prompt"), Mapping)


def best_path(root: Node, where: str) -> list[Message]:
    """The dialogue that takes the best-ranked answer at each question, until one has no answer.

    People's questions are not ranked: the first that got an answer is followed.
    """
    _check(root, "prompter", where)
    messages: list[Message] = []
    questions = [root]
    while questions:
        question = questions[0]
        messages.append(Message("user", question["text"]))
        answers = _replies(question, "assistant", where)
        if not answers:
            break
        best = min(answers, key=_rank)
        messages.append(Message("assistant", best["text"]))
        questions = [
            node for node in _replies(best, "prompter", where) if _replies(node, "assistant", where)
        ]
    return messages


def questions_with_answers(
    root: Node, where: str
) -> Iterator[tuple[list[Message], list[tuple[str, float]]]]:
    """Every question with the conversation before it, and its answers with their ranks.

    An answer without a rank has the rank infinity.
    """
    _check(root, "prompter", where)
    open_questions: list[tuple[list[Message], Node]] = [([], root)]
    while open_questions:
        before, question = open_questions.pop(0)
        messages = [*before, Message("user", question["text"])]
        answers = _replies(question, "assistant", where)
        yield messages, [(answer["text"], _rank(answer)) for answer in answers]
        for answer in answers:
            path = [*messages, Message("assistant", answer["text"])]
            open_questions += [(path, node) for node in _replies(answer, "prompter", where)]


def ranked_pairs(answers: list[tuple[str, float]]) -> Iterator[tuple[str, str, Rating]]:
    """All pairs of ranked answers, the better one first, rated by how many ranks part them.

    A gap of three or more is "significantly better", two "better", one "slightly better".
    """
    ranked = sorted((a for a in answers if a[1] < float("inf")), key=lambda answer: answer[1])
    for (better, first), (worse, second) in combinations(ranked, 2):
        gap = second - first
        if gap >= 3:
            yield better, worse, "significantly better"
        elif gap >= 1:
            yield better, worse, "better" if gap >= 2 else "slightly better"


def _replies(node: Node, role: str, where: str) -> list[Node]:
    replies = node.get("replies") or []
    if not isinstance(replies, list):
        raise ValueError(f"{where}: the replies in the OpenAssistant tree must be a list.")
    for reply in replies:
        _check(reply, role, where)
    return [
        reply
        for reply in replies
        if not reply.get("deleted") and reply.get("review_result") is not False
    ]


def _rank(node: Node) -> float:
    rank = node.get("rank")
    return float("inf") if rank is None else float(rank)


def _check(node: object, role: str, where: str) -> None:
    if not isinstance(node, Mapping) or not isinstance(node.get("text"), str):
        raise ValueError(f"{where}: a message of the OpenAssistant tree has no text; add it.")
    if not isinstance(node.get("rank"), int | float | None):
        raise ValueError(
            f"{where}: the rank {node['rank']!r} in the OpenAssistant tree must be a number."
        )
    if node.get("role") != role:
        raise ValueError(
            f"{where}: a message of the OpenAssistant tree has the role {node.get('role')!r} where "
            f"{role!r} should be."
        )
