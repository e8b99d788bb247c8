"""The encoders: Ray Data tasks that turn a part of a source into tokenized rows."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np

from cluster.data import Row
from cluster.files import read_records
from llama2.batches import TokenSequence
from llama2.encoding import Encoded, encode
from llama2.records import (
    Comparison,
    Dialogue,
    Document,
    Skipped,
    parse_comparisons,
    parse_dialogues,
    parse_documents,
)
from llama2.sources import WorldSource
from llama2.tokenizer import Tokenizer, load_tokenizer

Part = Literal["pretrain", "sft", "helpfulness", "safety"]
PARSERS: dict[Part, Callable[..., list[Any]]] = {
    "pretrain": parse_documents,
    "sft": parse_dialogues,
    "helpfulness": parse_comparisons,
    "safety": parse_comparisons,
}


@dataclass(frozen=True)
class FileSource:
    """Records of users' files, one part a file."""

    kind: Part
    paths: tuple[Path, ...]

    @property
    def parts(self) -> int:
        """How many parts there are."""
        return len(self.paths)

    def part(self, number: int) -> Iterator[Document | Dialogue | Comparison | Skipped]:
        """The records of one file."""
        for where, record in read_records(self.paths[number]):
            yield from PARSERS[self.kind](record, where)


Source = WorldSource | FileSource


@lru_cache(maxsize=1)
def _load_once(folder: Path) -> Tokenizer:
    return load_tokenizer(folder)


def encode_part(source: Source, tokenizer: Path, context: int, number: int) -> Iterator[Row]:
    """The rows of one part as Ray Data sees them; a record without any comes as an empty one."""
    for record in source.part(number):
        rows = (
            []
            if isinstance(record, Skipped)
            else list(encode(record, _load_once(tokenizer), context))
        )
        for row in rows or [Encoded((), "")]:
            yield {
                "tokens": [sequence.tokens.tolist() for sequence in row.sequences],
                "targets": [sequence.is_target.tolist() for sequence in row.sequences],
                "key": row.key,
                "rating": row.rating,
                "safety": row.safety,
            }


def decode_row(row: Row) -> Encoded:
    sequences = tuple(
        TokenSequence(np.array(tokens, dtype=np.int64), np.array(targets, dtype=np.bool_))
        for tokens, targets in zip(row["tokens"], row["targets"], strict=True)
    )
    return Encoded(sequences, row["key"], row["rating"], row["safety"])
