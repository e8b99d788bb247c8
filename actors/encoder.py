"""The encoders: tasks that turn a part of a source into tokenized records."""

from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np

from actors.sources import Part, SourcePart, Usable
from actors.work_folder import WorkFolder, read_lines
from cluster.data import Json
from llama2.encoding import Encoded, encode, is_held_out
from llama2.records import Comparison, Skipped
from llama2.shard_files import Shard, ShardFile, TokenLayout
from llama2.tokenizer import Tokenizer, load_tokenizer

__all__ = ["SPLITS", "EncodeTask", "Part", "Split", "encode_part"]

Split = Literal["train", "heldout"]
SPLITS: tuple[Split, Split] = ("train", "heldout")


@dataclass(frozen=True)
class EncodeTask:
    """Tokenize one part."""

    part: SourcePart
    work: WorkFolder
    is_cleaned: bool
    """Whether to read the part's cleaned records; else the source itself."""
    near_duplicates: bool
    """Whether near-duplicates of cleaned texts were looked for, and are left out."""
    tokenizer: Path
    context: int
    heldout_share: float
    layout: TokenLayout
    file_tokens: int
    """Most tokens in a file, give or take a record."""


def encode_part(task: EncodeTask) -> Json:
    """Write the part's records, a row each: the pieces of a text, a dialogue, or two answers.

    Returns how many `records` were read, how many were `dropped` for each reason, and the `files`
    of each split, as the fields of `Shard`.
    """
    tokenizer = _load_once(task.tokenizer)
    dropped: Counter[str] = Counter()
    files = {split: _TokenFiles(task, split) for split in SPLITS}
    count = 0
    for record in _records(task):
        count += 1
        rows = [] if isinstance(record, Skipped) else list(encode(record, tokenizer, task.context))
        if rows:
            held_out = is_held_out(rows[0].key, task.heldout_share)
            files["heldout" if held_out else "train"].add(rows)
        else:
            dropped[_reason(record)] += 1
    return {
        "records": count,
        "dropped": dict(sorted(dropped.items())),
        "files": {split: [asdict(shard) for shard in files[split].close()] for split in SPLITS},
    }


class _TokenFiles:
    """The files of one part and split, each closed when it is full."""

    def __init__(self, task: EncodeTask, split: Split) -> None:
        self._task, self._split = task, split
        self._current: ShardFile | None = None
        self._closed: list[Shard] = []

    def add(self, rows: list[Encoded]) -> None:
        if self._current is None:
            name = f"{self._task.part.number:06d}-{len(self._closed):03d}-{self._split}.bin"
            self._current = ShardFile(self._task.work.tokens / name, self._task.layout)
        sequences = [sequence for row in rows for sequence in row.sequences]
        self._current.add(sequences, rows[0].rating, rows[0].safety)
        if self._current.tokens >= self._task.file_tokens:
            self.close()

    def close(self) -> list[Shard]:
        if self._current is not None:
            self._closed.append(self._current.close())
            self._current = None
        return self._closed


def _records(task: EncodeTask) -> Iterator[Usable | Skipped]:
    if not task.is_cleaned:
        yield from task.part.records()
        return
    is_text = task.part.kind == "pretrain"
    repeated = _repeated(task)
    reason = "nearly the same as another text" if is_text else "the same as another record"
    for index, record in enumerate(read_lines(task.work.records(task.part), task.part.kind)):
        yield Skipped(reason, "") if index in repeated else record


def _repeated(task: EncodeTask) -> Collection[int]:
    """Indices of the part's cleaned records that repeat others."""
    if task.part.kind != "pretrain":
        return frozenset(np.load(task.work.repeated(task.part)).tolist())
    if not task.near_duplicates:
        return ()
    from llama2.cleaning import duplicates  # the world's texts need none of its libraries

    return frozenset(int(i) for i in duplicates(task.work.signatures, task.part.number))


def _reason(record: Usable | Skipped) -> str:
    """Why a record has no rows."""
    if isinstance(record, Skipped):
        return record.reason
    if isinstance(record, Comparison) and record.safety == "chosen_unsafe":
        return "the chosen answer is the unsafe one"
    return "the answer does not fit the context"


@lru_cache(maxsize=1)
def _load_once(folder: Path) -> Tokenizer:
    return load_tokenizer(folder)
