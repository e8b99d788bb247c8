"""From records to token sequences: what `jobs/prepare.py` does to each of them, wherever it
runs."""

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import get_args

import numpy as np

from llama2.batches import TokenSequence
from llama2.chat import EncodedDialogue, LossOn, Message, check_text, encode_dialogue
from llama2.records import Comparison, Dialogue, Document, Rating, SafetyLabel
from llama2.tokenizer import Tokenizer

RATINGS: tuple[Rating, ...] = tuple(reversed(get_args(Rating)))
"""Ratings from 0, negligibly better, to 3, significantly better."""
SAFETY_LABELS: tuple[SafetyLabel, ...] = get_args(SafetyLabel)


@dataclass(frozen=True)
class Encoded:
    """One row's worth of sequences. `key` tells what must not straddle the train/held-out split."""

    sequences: tuple[TokenSequence, ...]
    key: str
    rating: int = -1
    safety: int = -1


def is_held_out(key: str, share: float) -> bool:
    """Whether what has this key is held out, for about `share` of all keys."""
    return zlib.crc32(" ".join(key.lower().split()).encode()) % 10_000 < share * 10_000


def encode(
    record: Document | Dialogue | Comparison, tokenizer: Tokenizer, context: int
) -> Iterator[Encoded]:
    """The rows of a record; none where it cannot be used within `context` tokens.

    A text is cut into pieces that fit. A dialogue that is too long is cut at its end and kept while
    an answer token is left. A comparison that is too long loses the oldest tokens of its prompt;
    one whose answers alone do not fit, or whose chosen answer is the unsafe one (section 3.2.1),
    is dropped. Raises `ValueError` that names its source where one holds what is no text, which
    cleaning would have repaired.
    """
    for text in texts_of(record):
        check_text(text, f"{record.source}: the text")
    if isinstance(record, Document):
        yield from _encode_text(record.text, tokenizer, context)
    elif isinstance(record, Dialogue):
        encoded = _encode_dialogue(record, tokenizer, record.messages, record.loss_on)
        sequence = _sequence(encoded.tokens[:context], encoded.is_answer[:context])
        if sequence.is_target.any():
            yield Encoded((sequence,), first_words(record.messages))
    elif record.safety != "chosen_unsafe":
        yield from _encode_pair(record, tokenizer, context)


def texts_of(record: Document | Dialogue | Comparison) -> list[str]:
    """All that a record says."""
    if isinstance(record, Document):
        return [record.text]
    if isinstance(record, Dialogue):
        return [message.content for message in record.messages]
    return [*(message.content for message in record.prompt), record.chosen, record.rejected]


def _encode_text(text: str, tokenizer: Tokenizer, context: int) -> Iterator[Encoded]:
    tokens = [tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id]
    # Pieces share a token: the last target of one is the first input of the next.
    for start in range(0, max(1, len(tokens) - 1), context):
        piece = tokens[start : start + context + 1]
        yield Encoded((_sequence(piece, [True] * len(piece)),), text)


def _encode_dialogue(
    record: Dialogue | Comparison, tokenizer: Tokenizer, messages: Sequence[Message], loss: LossOn
) -> EncodedDialogue:
    try:
        return encode_dialogue(tokenizer, messages, loss)
    except ValueError as error:
        said = first_words(messages)[:60]
        raise ValueError(f"{record.source or 'A record'} ({said!r}): {error}") from error


def _encode_pair(record: Comparison, tokenizer: Tokenizer, context: int) -> Iterator[Encoded]:
    sequences = []
    for answer in (record.chosen, record.rejected):
        dialogue = (*record.prompt, Message("assistant", answer))
        encoded = _encode_dialogue(record, tokenizer, dialogue, "last").scored()
        if sum(encoded.is_answer) >= context:
            return
        sequences.append(_sequence(encoded.tokens[-context:], encoded.is_answer[-context:]))
    yield Encoded(
        tuple(sequences),
        first_words(record.prompt),
        -1 if record.rating is None else RATINGS.index(record.rating),
        -1 if record.safety is None else SAFETY_LABELS.index(record.safety),
    )


def _sequence(tokens: Sequence[int], is_target: Sequence[bool]) -> TokenSequence:
    return TokenSequence(np.array(tokens, dtype=np.int64), np.array(is_target, dtype=np.bool_))


def first_words(messages: Sequence[Message]) -> str:
    """What the user says first, by which dialogues of one kind are kept on one side."""
    return next(message.content for message in messages if message.role == "user")
