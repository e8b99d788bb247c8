"""Users' records, in the published formats, as documents, dialogues, comparisons and prompts.

A record is one JSON object or table row. Fields with null count as absent, since tables fill absent
fields with null. Accepted forms:

- `text`: a document;
- `messages` or `conversations` (ShareGPT): a list of turns, each with `role` and `content`, or
  `from` and `value`;
- `prompt` with `response` or `completion`; `instruction` with `output` and maybe `input` (Alpaca);
  `instruction` with `instances` of `input` and `output` (seed tasks);
- `prompt`, `chosen` and `rejected`, each as text or as a list of turns, which for the answers may
  repeat the prompt; maybe with a `rating` and a `safety` label;
- `chosen` and `rejected` as transcripts "\\n\\nHuman: ... \\n\\nAssistant: ..." (hh-rlhf);
- an OpenAssistant tree: `prompt` is a node with `text`, `role`, and ranked `replies`;
- `prompt`, `instruction` or `turns` (MT-bench) alone: a question, maybe with `safety`: true and a
  `category`.

A dialogue may say `loss_on`: "last", so that its last answer alone is learned.

A record of another form, or with a field of the wrong type, raises `ValueError`: the file is not
what its reader takes it for. A record of the right form that teaches nothing (an empty answer, two
equal answers, turns out of order, prompts that differ), as published data sets have a few, gives a
`Skipped` with the reason, so that the caller can count and report them.
"""

from dataclasses import dataclass

from llama2.chat import LossOn, Message, dialogue_fault
from llama2.conversation_trees import best_path, is_tree, questions_with_answers, ranked_pairs
from llama2.record_fields import (
    Fields,
    Rating,
    SafetyLabel,
    category_field,
    is_transcript,
    loss_field,
    messages_field,
    present,
    prompt_field,
    rating_field,
    safety_field,
    safety_tag,
    text_field,
    transcript,
    wrong_fields,
)

__all__ = [
    "SAFE_ANSWERS",
    "Comparison",
    "Dialogue",
    "Document",
    "Prompt",
    "Rating",
    "SafetyLabel",
    "Skipped",
    "parse_comparisons",
    "parse_dialogues",
    "parse_documents",
    "parse_prompts",
]


SAFE_ANSWERS: dict[SafetyLabel, tuple[bool, bool]] = {
    "chosen_safe": (True, False),
    "both_safe": (True, True),
    "both_unsafe": (False, False),
    "chosen_unsafe": (False, True),
}
"""Whether the chosen and the rejected answer are safe, by label."""


@dataclass(frozen=True)
class Document:
    """Text to pretrain on. `source` says where it was read, here and below."""

    text: str
    source: str


@dataclass(frozen=True)
class Dialogue:
    """A demonstration: ends with an answer. `loss_on` says which of its answers are learned: for
    Ghost Attention (paper, section 3.3) the last one alone."""

    messages: tuple[Message, ...]
    source: str
    loss_on: LossOn = "all"


@dataclass(frozen=True)
class Comparison:
    """Two answers to one prompt, of which annotators preferred `chosen` (paper, section 3.2.1).

    `safety` names which of the two are safe; "chosen_unsafe" (with the other one safe) is what the
    paper excludes, and the caller must.
    """

    prompt: tuple[Message, ...]
    chosen: str
    rejected: str
    rating: Rating | None
    safety: SafetyLabel | None
    source: str


@dataclass(frozen=True)
class Prompt:
    """A dialogue to be answered. `safety` tags it for the safety reward model (paper, 3.2.3);
    `category` is what kind of prompt, or of risk, it is."""

    messages: tuple[Message, ...]
    safety: bool
    source: str
    category: str | None = None


@dataclass(frozen=True)
class Skipped:
    """A well-formed record that teaches nothing, and why."""

    reason: str
    source: str


def parse_documents(record: Fields, where: str) -> list[Document | Skipped]:
    """The text of a record. `where` ("data.jsonl line 12") is named in errors, here and below."""
    fields = present(record)
    if "text" not in fields:
        raise wrong_fields(fields, where, "document", "text")
    text = text_field(fields, "text", where)
    return [Document(text, where) if text.strip() else Skipped("the text is empty", where)]


def parse_dialogues(record: Fields, where: str) -> list[Dialogue | Skipped]:
    """Demonstrations: one of a record, an instance of a seed task, or an OpenAssistant tree.

    A last question without an answer is dropped. Of a tree, the best-ranked answers are followed.
    """
    fields = present(record)
    answer = "response" if "response" in fields else "completion"
    if is_tree(fields):
        dialogues = [best_path(fields["prompt"], where)]
    elif "messages" in fields or "conversations" in fields:
        dialogues = [_turns(fields, where)]
    elif "instruction" in fields and ("output" in fields or "instances" in fields):
        dialogues = [
            [_instruction(fields, task, where), Message("assistant", _output(task, where))]
            for task in _tasks(fields, where)
        ]
    elif "prompt" in fields and isinstance(fields.get(answer), list):
        dialogues = [prompt_field(fields, where) + messages_field(fields, answer, where)]
    elif "prompt" in fields and answer in fields:
        reply = Message("assistant", text_field(fields, answer, where))
        dialogues = [[*prompt_field(fields, where), reply]]
    else:
        raise wrong_fields(
            fields,
            where,
            "dialogue",
            "messages; conversations; prompt with response or completion; instruction with output "
            "or instances; an OpenAssistant tree",
        )
    loss_on = loss_field(fields, where)
    return [_dialogue(messages, loss_on, where) for messages in dialogues]


def parse_comparisons(record: Fields, where: str) -> list[Comparison | Skipped]:
    """Preferences: one of a record, or all pairs of ranked answers in an OpenAssistant tree."""
    fields = present(record)
    if is_tree(fields):
        pairs = [
            _comparison(messages, chosen, rejected, rating, None, where)
            for messages, answers in questions_with_answers(fields["prompt"], where)
            for chosen, rejected, rating in ranked_pairs(answers)
        ]
        return pairs or [Skipped("no question of the tree has two ranked answers", where)]
    rating, safety = rating_field(fields, where), safety_field(fields, where)
    sides = _sides(fields, where)
    if isinstance(sides, Skipped):
        return [sides]
    return [_comparison(*sides, rating, safety, where)]


def parse_prompts(record: Fields, where: str) -> list[Prompt | Skipped]:
    """What a model can be asked: the last question of a dialogue or a comparison with all that
    precedes it, each question of an OpenAssistant tree, the first turn of an MT-bench question.

    A prompt is tagged as one of safety where `safety` is true or is a label of a comparison.
    """
    fields = present(record)
    safety, category = safety_tag(fields, where), category_field(fields)
    prompts: list[list[Message]]
    if is_tree(fields):
        prompts = [messages for messages, _ in questions_with_answers(fields["prompt"], where)]
    elif "chosen" in fields and "rejected" in fields:
        sides = _sides(fields, where)
        if isinstance(sides, Skipped):
            return [sides]
        prompts = [sides[0]]
    elif "messages" in fields or "conversations" in fields:
        messages = _turns(fields, where)
        prompts = [messages[:-1] if messages and messages[-1].role == "assistant" else messages]
    elif "instruction" in fields:
        prompts = [[_instruction(fields, task, where)] for task in _tasks(fields, where)]
    elif "prompt" in fields:
        prompts = [prompt_field(fields, where)]
    elif "turns" in fields:
        prompts = [[_first_turn(fields, where)]]
    else:
        raise wrong_fields(
            fields,
            where,
            "prompt",
            "prompt; instruction; turns; messages; conversations; chosen and rejected; an "
            "OpenAssistant tree",
        )
    return [_prompt(messages, safety, category, where) for messages in prompts]


def _dialogue(messages: list[Message], loss_on: LossOn, where: str) -> Dialogue | Skipped:
    if messages and messages[-1].role == "user":
        messages = messages[:-1]
    if not any(message.role == "assistant" for message in messages):
        return Skipped("there is no answer", where)
    fault = dialogue_fault(messages)
    return Skipped(fault, where) if fault else Dialogue(tuple(messages), where, loss_on)


def _prompt(
    messages: list[Message], safety: bool, category: str | None, where: str
) -> Prompt | Skipped:
    fault = dialogue_fault(messages)
    if fault is None and messages[-1].role != "user":
        fault = "the prompt does not end with a user message"
    return Skipped(fault, where) if fault else Prompt(tuple(messages), safety, where, category)


def _comparison(
    prompt: list[Message],
    chosen: str,
    rejected: str,
    rating: Rating | None,
    safety: SafetyLabel | None,
    where: str,
) -> Comparison | Skipped:
    for answer in (chosen, rejected):
        fault = dialogue_fault([*prompt, Message("assistant", answer)])
        if fault:
            return Skipped(fault, where)
    if chosen.strip() == rejected.strip():
        return Skipped("the two answers are equal", where)
    return Comparison(tuple(prompt), chosen, rejected, rating, safety, where)


def _sides(fields: Fields, where: str) -> tuple[list[Message], str, str] | Skipped:
    """The prompt, the chosen answer and the rejected one."""
    pair = (fields.get("chosen"), fields.get("rejected"))
    listed = all(isinstance(side, list) for side in pair)
    texts = [side for side in pair if isinstance(side, str)]
    if listed:
        sides = [messages_field(fields, name, where) for name in ("chosen", "rejected")]
        if "prompt" in fields:
            prompt = prompt_field(fields, where)
            repeated = [bool(side) and side[0].role != "assistant" for side in sides]
            sides = [side if r else prompt + side for side, r in zip(sides, repeated, strict=True)]
            if not all(_contains(side, prompt) for side in sides):
                return Skipped("the answers repeat another prompt than the prompt field", where)
    elif len(texts) == 2 and all(is_transcript(text) for text in texts):
        sides = [transcript(text) for text in texts]
    elif len(texts) == 2 and "prompt" in fields:
        return prompt_field(fields, where), texts[0], texts[1]
    else:
        raise wrong_fields(
            fields,
            where,
            "comparison",
            "prompt, chosen and rejected as text; chosen and rejected as lists of turns or as "
            "transcripts (\\n\\nHuman: ... \\n\\nAssistant: ...); an OpenAssistant tree",
        )
    if any(not side or side[-1].role != "assistant" for side in sides):
        return Skipped("chosen or rejected does not end with an answer", where)
    if sides[0][:-1] != sides[1][:-1]:
        return Skipped("chosen and rejected answer different prompts", where)
    return sides[0][:-1], sides[0][-1].content, sides[1][-1].content


def _contains(side: list[Message], prompt: list[Message]) -> bool:
    return {m.content.strip() for m in prompt} <= {m.content.strip() for m in side}


def _turns(fields: Fields, where: str) -> list[Message]:
    return messages_field(fields, "messages" if "messages" in fields else "conversations", where)


def _tasks(fields: Fields, where: str) -> list[Fields]:
    """The record itself (Alpaca), or the instances of a seed task."""
    instances = fields.get("instances", [fields])
    if not isinstance(instances, list) or not all(isinstance(i, dict) for i in instances):
        raise ValueError(f"{where}: instances must be a list of objects with input and output.")
    return instances


def _instruction(fields: Fields, task: Fields, where: str) -> Message:
    instruction = text_field(fields, "instruction", where)
    given = text_field({"input": ""} | present(task), "input", where)
    return Message("user", f"{instruction}\n\n{given}" if given.strip() else instruction)


def _output(task: Fields, where: str) -> str:
    return text_field(task, "output", where)


def _first_turn(fields: Fields, where: str) -> Message:
    turns = fields["turns"]
    if not isinstance(turns, list) or not turns or not isinstance(turns[0], str):
        raise ValueError(f"{where}: turns must be a list of texts, the first question first.")
    return Message("user", turns[0])
