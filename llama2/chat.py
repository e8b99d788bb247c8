"""Dialogues as tokens: Llama 2's chat format, and which tokens are answers.

The format is that of Meta's reference code (`chat_completion` in its generation.py). Each exchange
is encoded on its own, between bos and eos, and the system message is part of the first question:

    bos "[INST] <<SYS>>\\n{system}\\n<</SYS>>\\n\\n{user} [/INST] {answer} " eos
    bos "[INST] {user} [/INST]"

A Hugging Face tokenizer that brings its own chat template (Llama 3, SmolLM, TinyLlama) is used with
that template. Either way the prompt of an answer is a prefix of the dialogue's tokens, and white
space around a message is dropped.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from llama2.tokenizer import HuggingFaceTokenizer, Tokenizer

Role = Literal["system", "user", "assistant"]
LossOn = Literal["all", "last"]
"""Which answers of a dialogue are to be learned."""
MARK = re.compile("\ue000([0-9]+)\ue001")
"""Stands in a message's place where a template writes it; templates have no such characters."""
TAGS = ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>")


class Unlearnable(ValueError):
    """A dialogue spells control tokens where its template's cannot be told from them."""


@dataclass(frozen=True)
class Message:
    """One turn of a dialogue, as plain text without any markup."""

    role: Role
    content: str


@dataclass(frozen=True)
class EncodedDialogue:
    """Token ids [T] of a dialogue, and for each whether a loss on answers counts it.

    An answer ends with the token that ends its turn, which the model must learn to give.
    """

    tokens: list[int]
    is_answer: list[bool]

    def scored(self) -> "EncodedDialogue":
        """As reward models read it: up to the token that ends the last answer. Templates may write
        a newline behind it, which samples have not."""
        end = max((place for place, inside in enumerate(self.is_answer, 1) if inside), default=0)
        return EncodedDialogue(self.tokens[:end], self.is_answer[:end])


def check_text(text: str, what: str) -> None:
    """Raise `ValueError`, of `what`, where a text cannot be written in Unicode."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{what} holds half of a surrogate pair ({text[error.start]!r}), which is no "
            "character; remove it."
        ) from error


def dialogue_fault(messages: Sequence[Message]) -> str | None:
    """What keeps `messages` from being a dialogue, as half a sentence, or None.

    A dialogue is an optional system message, then user and assistant in turn, none empty. The tags
    of the format are refused inside of messages, as Meta's code does, since they would forge turns.
    """
    turns = messages[1:] if messages and messages[0].role == "system" else messages
    if not turns:
        return "there is no user message"
    if any(turn.role != ("assistant" if i % 2 else "user") for i, turn in enumerate(turns)):
        return "user and assistant do not take turns, the user first"
    for message in messages:
        if not message.content.strip():
            return f"the {message.role} message is empty"
        for tag in TAGS:
            if tag in message.content:
                return f"the {message.role} message contains the tag {tag}"
    return None


def check_dialogue(messages: Sequence[Message]) -> None:
    """Raise `ValueError` where `dialogue_fault` finds one."""
    fault = dialogue_fault(messages)
    if fault is not None:
        raise ValueError(
            f"This is no dialogue: {fault}; give an optional system message, then user and "
            "assistant in turn."
        )


def encode_prompt(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    """Token ids of a dialogue that ends with a user message, up to where the answer begins.

    Raises `ValueError` where `messages` are no dialogue or do not end with the user.
    """
    check_dialogue(messages)
    if messages[-1].role != "user":
        raise ValueError("A prompt must end with a user message; drop the assistant message.")
    if isinstance(tokenizer, HuggingFaceTokenizer) and tokenizer.has_chat_template:
        return _encode_rendered(tokenizer, messages, ask=True)[0]
    tokens: list[int] = []
    for question, answer in _exchanges(messages):
        tokens += _encode_exchange(tokenizer, question, answer)
    return tokens


def encode_dialogue(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    answers: LossOn = "all",
) -> EncodedDialogue:
    """Tokens of a dialogue that ends with an answer, and the loss mask of fine-tuning.

    `answers` says which answers the mask holds: all (paper, section 3.1), or only the last one, for
    Ghost Attention (section 3.3) and answers to be compared. Raises `ValueError` where `messages`
    are no dialogue or do not end with the assistant.
    """
    check_dialogue(messages)
    if messages[-1].role != "assistant":
        raise ValueError("A dialogue to learn from must end with an assistant message; add one.")
    if isinstance(tokenizer, HuggingFaceTokenizer) and tokenizer.has_chat_template:
        return _encode_with_template(tokenizer, messages, answers)
    tokens: list[int] = []
    is_answer: list[bool] = []
    exchanges = _exchanges(messages)
    for i, (question, answer) in enumerate(exchanges):
        prompt = _encode_exchange(tokenizer, question, None)
        exchange = _encode_exchange(tokenizer, question, answer)
        if exchange[: len(prompt)] != prompt:
            raise ValueError(
                "This tokenizer joins [/INST] and the answer into one token, so no prompt could "
                "end between them; use one whose tokens do not cross spaces."
            )
        counts = answers == "all" or i == len(exchanges) - 1
        tokens += exchange
        is_answer += [False] * len(prompt) + [counts] * (len(exchange) - len(prompt))
    return EncodedDialogue(tokens, is_answer)


def _exchanges(messages: Sequence[Message]) -> list[tuple[str, str | None]]:
    """Questions with answers, the system message joined into the first; the last may be open."""
    contents = [message.content for message in messages]
    if messages[0].role == "system":
        contents = [f"<<SYS>>\n{contents[0]}\n<</SYS>>\n\n{contents[1]}", *contents[2:]]
    open_end: list[str | None] = [None] if len(contents) % 2 else []
    return list(zip(contents[::2], contents[1::2] + open_end, strict=True))


def _encode_exchange(tokenizer: Tokenizer, question: str, answer: str | None) -> list[int]:
    prompt = f"[INST] {question.strip()} [/INST]"
    if answer is None:
        return [tokenizer.bos_id, *tokenizer.encode(prompt)]
    closed = tokenizer.encode(f"{prompt} {answer.strip()} ")
    return [tokenizer.bos_id, *closed, tokenizer.eos_id]


def _render(tokenizer: HuggingFaceTokenizer, messages: Sequence[Message], ask: bool) -> str:
    turns = [{"role": message.role, "content": message.content.strip()} for message in messages]
    return tokenizer.render(turns, add_generation_prompt=ask)


def _encode_rendered(
    tokenizer: HuggingFaceTokenizer, messages: Sequence[Message], ask: bool
) -> tuple[list[int], list[tuple[int, int]]]:
    """Tokens and their characters. Control tokens that messages spell stay text: else what is said
    could forge turns."""
    text = _render(tokenizer, messages, ask)
    if not any(tokenizer.control.search(message.content) for message in messages):
        return tokenizer.encode_rendered(text)
    numbered = [Message(m.role, f"\ue000{i}\ue001") for i, m in enumerate(messages)]
    built, spelled = "", []
    for place, piece in enumerate(MARK.split(_render(tokenizer, numbered, ask))):
        if not place % 2:
            built += piece
            continue
        said = messages[int(piece)].content.strip()
        found = tokenizer.control.finditer(said)
        spelled += [(len(built) + one.start(), len(built) + one.end()) for one in found]
        built += said
    if built != text:
        raise Unlearnable(
            "The tokenizer's chat template changes what is said, so that its control tokens cannot "
            "be told from those that a message spells; remove these."
        )
    return tokenizer.encode_rendered(text, spelled)


def _encode_with_template(
    tokenizer: HuggingFaceTokenizer, messages: Sequence[Message], answers: LossOn
) -> EncodedDialogue:
    """Answers are found by rendering every beginning of the dialogue: each adds one turn's text."""
    text = _render(tokenizer, messages, ask=False)
    tokens, spans = _encode_rendered(tokenizer, messages, ask=False)
    is_answer = [False] * len(tokens)
    turns = [i for i, message in enumerate(messages) if message.role == "assistant"]
    for turn in turns if answers == "all" else turns[-1:]:
        before = _render(tokenizer, messages[:turn], ask=True)
        after = _render(tokenizer, messages[: turn + 1], ask=False)
        if not (text.startswith(after) and after.startswith(before)):
            raise ValueError(
                "The tokenizer's chat template rewrites earlier turns, so answers cannot be told "
                "from questions; use a template that only appends."
            )
        inside = [
            i for i, (start, end) in enumerate(spans) if end > len(before) and start < len(after)
        ]
        # Templates may write a newline behind the token that ends the turn, where generation stops.
        ends = [i for i in inside if tokens[i] == tokenizer.eos_id]
        for i in inside:
            is_answer[i] = not ends or i <= ends[-1]
    return EncodedDialogue(tokens, is_answer)
