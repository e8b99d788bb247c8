"""The packers: tasks that lay tokenized records into the rows of a shard."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from cluster.data import Json
from llama2.batches import TokenSequence
from llama2.mixing import is_taken
from llama2.packing import best_fit
from llama2.shard_files import Shard, ShardFile, ShardReader, TokenLayout

WINDOW = 1024  # rows' worth of documents that are packed together


@dataclass(frozen=True)
class Pass:
    """One pass over a file of tokenized records, or over a share of it."""

    file: Path
    shard: Shard
    """What the file holds."""
    source: str
    share: float = 1.0
    """Share of the records to take."""
    take: Literal["all", "first", "rest"] = "all"
    """The first sequence (of pairs: the first pair) may be lent to the held-out rows."""

    @property
    def tokens(self) -> int:
        """Tokens that the pass gives, about."""
        return round(self.share * self.shard.tokens)


@dataclass(frozen=True)
class PackTask:
    """Write one shard."""

    path: Path
    scratch: Path
    """Folder for the unfinished file."""
    passes: tuple[Pass, ...]
    layout: TokenLayout
    context: int
    pairs: bool
    """Whether rows are pairs, which are not packed."""


def pack_shard(task: PackTask) -> Json:
    """Write the shard. Returns its fields as `shard`, and `tokens` and `documents` by source."""
    file = ShardFile(task.path, task.layout, task.scratch)
    tokens: Counter[str] = Counter()
    documents: Counter[str] = Counter()
    for one in task.passes:
        packer = _Packer(file, task.context)
        for row, rating, safety in _rows(one, task):
            documents[one.source] += 1
            tokens[one.source] += sum(len(sequence.tokens) for sequence in row)
            if task.pairs:
                file.add(row, rating, safety)
            else:
                packer.add(row)
        packer.flush()
    return {"shard": asdict(file.close()), "tokens": dict(tokens), "documents": dict(documents)}


class _Packer:
    """Packs a window of documents at a time."""

    def __init__(self, file: ShardFile, context: int) -> None:
        self._file, self._context = file, context
        self._window: list[TokenSequence] = []
        self._places = 0

    def add(self, sequences: list[TokenSequence]) -> None:
        self._window += sequences
        self._places += sum(len(sequence.tokens) - 1 for sequence in sequences)
        if self._places >= WINDOW * self._context:
            self.flush()

    def flush(self) -> None:
        places = [len(sequence.tokens) - 1 for sequence in self._window]
        for row in best_fit(places, self._context):
            self._file.add([self._window[i] for i in row])
        self._window, self._places = [], 0


def _rows(one: Pass, task: PackTask) -> Iterator[tuple[list[TokenSequence], int, int]]:
    """Records of a pass: sequences, rating, safety label."""
    reader = ShardReader(one.file, one.shard, task.layout)
    for number in range(1 if one.take == "first" else one.shard.rows):
        row = reader.row(number)
        if not is_taken(row, one.share):
            continue
        if number == 0 and one.take != "all":
            lent = len(row) if task.pairs else 1
            row = row[:lent] if one.take == "first" else row[lent:]
        if row:
            yield row, reader.rating(number), reader.safety(number)
