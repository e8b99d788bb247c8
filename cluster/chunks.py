"""Cutting users' data files into parts that are read apart from one another.

The cut is a function of the files and the size of a part alone. JSON lines and plain text are cut
at line ends, Parquet between row groups; zipped files and the other formats stay whole, and are
read as a stream. Small files share a part.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster.files import (
    Record,
    extension,
    json_records,
    read_records,
    read_row_groups,
    row_group_sizes,
    text_records,
)

LINES = {".jsonl": json_records, ".txt": text_records}
BLOCK = 1 << 22


@dataclass(frozen=True)
class Chunk:
    """A run of a file's bytes or row groups, from `start` to before `stop`; both 0: the whole
    file."""

    path: Path
    start: int = 0
    stop: int = 0

    @property
    def is_whole(self) -> bool:
        """Whether the chunk is a file that cannot be cut."""
        return self.stop == 0


def cut(files: Sequence[Path], size: int) -> list[tuple[Chunk, ...]]:
    """The parts of `files`, each of about `size` bytes, in order; empty files are in none.

    Raises `ValueError` where a Parquet file is damaged.
    """
    parts: list[tuple[Chunk, ...]] = []
    current: list[Chunk] = []
    filled = 0
    for path in files:
        for chunk, weight in _chunks(path, size):
            if current and filled + weight > size:
                parts.append(tuple(current))
                current, filled = [], 0
            current.append(chunk)
            filled += weight
    return [*parts, tuple(current)] if current else parts


def _chunks(path: Path, size: int) -> Iterator[tuple[Chunk, int]]:
    """The chunks of one file, each with its bytes."""
    length = path.stat().st_size
    if _has_lines(path):
        for start in range(0, length, size):
            stop = min(start + size, length)
            yield Chunk(path, start, stop), stop - start
    elif extension(path) == ".parquet":
        start, filled = 0, 0
        groups = row_group_sizes(path)
        for number, weight in enumerate(groups):
            if number > start and filled + weight > size:
                yield Chunk(path, start, number), filled
                start, filled = number, 0
            filled += weight
        if groups:
            yield Chunk(path, start, len(groups)), filled
    elif length:
        yield Chunk(path), length


def read_chunk(chunk: Chunk, first_line: int = 1) -> Iterator[Record]:
    """The records of a chunk, as `read_records` gives them.

    A line belongs to the chunk that holds its first byte. Lines are numbered from `first_line`;
    give `lines_before(chunk) + 1` where the numbers matter, since that reads all that precedes.
    """
    if chunk.is_whole:
        yield from read_records(chunk.path)
    elif extension(chunk.path) == ".parquet":
        yield from read_row_groups(chunk.path, chunk.start, chunk.stop)
    else:
        yield from LINES[extension(chunk.path)](_lines(chunk), chunk.path, first_line)


def lines_before(chunk: Chunk) -> int:
    """How many lines of the file precede those of the chunk; 0 where it is not cut by lines."""
    if chunk.is_whole or not _has_lines(chunk.path):
        return 0
    count, left = 0, _first_byte(chunk)
    with chunk.path.open("rb") as file:
        while left and (block := file.read(min(BLOCK, left))):
            count += block.count(b"\n")
            left -= len(block)
    return count


def _lines(chunk: Chunk) -> Iterator[bytes]:
    place = _first_byte(chunk)
    with chunk.path.open("rb") as file:
        file.seek(place)
        while place < chunk.stop and (line := file.readline()):
            place += len(line)
            yield line


def _first_byte(chunk: Chunk) -> int:
    """Where the first line begins that does not begin before the chunk."""
    if not chunk.start:
        return 0
    with chunk.path.open("rb") as file:
        file.seek(chunk.start - 1)
        return chunk.start - 1 + len(file.readline())


def _has_lines(path: Path) -> bool:
    return extension(path) in LINES and not path.name.lower().endswith(".gz")
