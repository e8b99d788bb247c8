"""One shard of prepared data: a file of flat little-endian arrays, one behind the other.

A shard holds rows; a row holds sequences; a sequence holds tokens. The arrays, in this order, each
beginning at a multiple of eight bytes:

    tokens         token ids, 2 or 4 bytes each
    targets        one byte a token: whether the loss asks for it; absent where it asks for all
    sequence_ends  the number of tokens up to the end of each sequence, 8 bytes
    row_ends       the number of sequences up to the end of each row, 8 bytes
    row_targets    how many tokens of each row the loss asks for, 4 bytes
    ratings        of each row, 1 byte, -1 without one
    safety         of each row, 1 byte, -1 without one

Their places follow from the counts in the manifest, so a row is found by arithmetic and nothing is
read that is not asked for.
"""

import hashlib
import os
import uuid
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import xxhash

from llama2.batches import TokenSequence

ALIGNMENT = 8


@dataclass(frozen=True)
class TokenLayout:
    """How a shard stores its tokens."""

    token_bytes: int = 4
    """Bytes of a token id: 2 where the vocabulary allows, else 4."""
    marks_targets: bool = True
    """Whether targets are marked; else all tokens but each sequence's first are."""

    def __post_init__(self) -> None:
        assert self.token_bytes in (2, 4)


@dataclass(frozen=True)
class Shard:
    """What a manifest says about one file."""

    name: str
    rows: int
    sequences: int
    tokens: int
    targets: int
    hash: str
    """xxh3-128 of the file's bytes, in hexadecimal."""

    def arrays(self, layout: TokenLayout) -> dict[str, tuple[str, int, int]]:
        """The dtype, the first byte and the length of every array."""
        found: dict[str, tuple[str, int, int]] = {}
        start = 0
        for name, dtype, count in (
            ("tokens", f"<u{layout.token_bytes}", self.tokens),
            ("targets", "|b1", self.tokens if layout.marks_targets else 0),
            ("sequence_ends", "<i8", self.sequences),
            ("row_ends", "<i8", self.rows),
            ("row_targets", "<i4", self.rows),
            ("ratings", "|i1", self.rows),
            ("safety", "|i1", self.rows),
        ):
            found[name] = (dtype, start, count)
            start = _aligned(start + np.dtype(dtype).itemsize * count)
        return found

    def size(self, layout: TokenLayout) -> int:
        """Bytes of the file."""
        dtype, start, count = self.arrays(layout)["safety"]
        return _aligned(start + np.dtype(dtype).itemsize * count)


class ShardFile:
    """Writes one shard, which appears under its name only when `close` succeeds.

    Tokens go to disk as they come; held in memory are 8 bytes a sequence, 14 a row, and a byte a
    token where targets are marked.
    """

    def __init__(self, path: Path, layout: TokenLayout, scratch: Path | None = None) -> None:
        self.path, self.layout = path, layout
        # A killed attempt may still be writing: no two of them share an unfinished file.
        self._unfinished = (scratch or path.parent) / f".{path.name}.{uuid.uuid4().hex}.part"
        self._file: IO[bytes] = self._unfinished.open("wb")
        self._hash = xxhash.xxh3_128()
        self._targets = bytearray()
        self._ends: dict[str, array[int]] = {
            "sequence_ends": array("q"),
            "row_ends": array("q"),
            "row_targets": array("i"),
            "ratings": array("b"),
            "safety": array("b"),
        }
        self.tokens = 0
        self._written = 0

    def add(self, row: Sequence[TokenSequence], rating: int = -1, safety: int = -1) -> None:
        """Append a row. rating: 0 (negligibly) to 3 (significantly better); safety: label; -1:
        none."""
        row_targets = 0
        ends = self._ends["sequence_ends"]
        for sequence in row:
            self._write(np.asarray(sequence.tokens).astype(f"<u{self.layout.token_bytes}"))
            if self.layout.marks_targets:
                self._targets += np.asarray(sequence.is_target, dtype="|b1").tobytes()
                row_targets += int(np.count_nonzero(sequence.is_target[1:]))
            else:
                row_targets += len(sequence.tokens) - 1
            self.tokens += len(sequence.tokens)
            ends.append(self.tokens)
        self._ends["row_ends"].append(len(ends))
        self._ends["row_targets"].append(row_targets)
        self._ends["ratings"].append(rating)
        self._ends["safety"].append(safety)

    def close(self) -> Shard:
        """Finish the file and say what is in it."""
        self._pad()
        self._write(np.frombuffer(self._targets, dtype=np.uint8))
        self._pad()
        for name, values in self._ends.items():
            dtype = {"sequence_ends": "<i8", "row_ends": "<i8", "row_targets": "<i4"}.get(name)
            self._write(np.array(values, dtype=dtype or "|i1"))
            self._pad()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._unfinished, self.path)
        return Shard(
            name=self.path.name,
            rows=len(self._ends["row_ends"]),
            sequences=len(self._ends["sequence_ends"]),
            tokens=self.tokens,
            targets=sum(self._ends["row_targets"]),
            hash=self._hash.hexdigest(),
        )

    def discard(self) -> None:
        """Leave nothing behind."""
        self._file.close()
        self._unfinished.unlink(missing_ok=True)

    def _write(self, values: np.ndarray[Any, Any]) -> None:
        content = values.tobytes()
        self._file.write(content)
        self._hash.update(content)
        self._written += len(content)

    def _pad(self) -> None:
        self._write(np.zeros(-self._written % ALIGNMENT, dtype=np.uint8))


class ShardReader:
    """The rows of one shard, memory-mapped."""

    def __init__(self, path: Path, shard: Shard, layout: TokenLayout) -> None:
        content = np.memmap(path, dtype=np.uint8, mode="r")
        self._marks_targets = layout.marks_targets
        self._arrays: dict[str, np.ndarray[Any, Any]] = {
            name: content[start : start + np.dtype(dtype).itemsize * count].view(dtype)
            for name, (dtype, start, count) in shard.arrays(layout).items()
        }

    def row(self, index: int) -> list[TokenSequence]:
        """The sequences of row `index`."""
        first, last = self._sequences(index)
        return [self._sequence(number) for number in range(first, last)]

    def targets(self, index: int) -> int:
        """How many tokens of row `index` the loss asks for."""
        return int(self._arrays["row_targets"][index])

    def rating(self, index: int) -> int:
        """Rating of row `index`, -1 without one."""
        return int(self._arrays["ratings"][index])

    def safety(self, index: int) -> int:
        """Safety label of row `index`, -1 without one."""
        return int(self._arrays["safety"][index])

    def sequence_lengths(self, index: int) -> list[int]:
        """Tokens of each sequence of row `index`."""
        first, last = self._sequences(index)
        ends = self._arrays["sequence_ends"][first:last].tolist()
        starts = [self._start(first), *ends[:-1]]
        return [end - start for start, end in zip(starts, ends, strict=True)]

    def _sequence(self, number: int) -> TokenSequence:
        start, end = self._start(number), int(self._arrays["sequence_ends"][number])
        tokens = self._arrays["tokens"][start:end]
        if self._marks_targets:
            return TokenSequence(tokens, self._arrays["targets"][start:end])
        return TokenSequence(tokens, np.ones(end - start, dtype=np.bool_))

    def _start(self, number: int) -> int:
        return int(self._arrays["sequence_ends"][number - 1]) if number else 0

    def _sequences(self, index: int) -> tuple[int, int]:
        ends = self._arrays["row_ends"]
        return (int(ends[index - 1]) if index else 0), int(ends[index])


def file_hash(path: Path) -> str:
    """xxh3-128 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()


def _aligned(size: int) -> int:
    return size + -size % ALIGNMENT
