"""Prepared data on disk: memory-mapped arrays and a manifest.

A folder holds rows; a row holds sequences; a sequence holds tokens. Pretraining and SFT rows are
packed documents; a preference row is a pair, chosen first. Arrays are flat and little-endian, so a
row is found by arithmetic and nothing is read that is not asked for.
"""

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np

from llama2.batches import TokenSequence

Kind = Literal["pretrain", "sft", "preference"]
_FILES = {
    "tokens": "<u4",
    "targets": "|b1",
    "sequence_ends": "<i8",
    "row_ends": "<i8",
    "row_targets": "<i4",
    "ratings": "|i1",
    "safety": "|i1",
}


@dataclass(frozen=True)
class Manifest:
    """What a prepared folder holds and what made it."""

    kind: Kind
    tokenizer: str
    """Fingerprint of the tokenizer that wrote the token ids."""
    context: int
    """Longest row, in tokens."""
    rows: int = 0
    sequences: int = 0
    tokens: int = 0
    targets: int = 0
    dropped: int = 0
    """Records that could not be used: too long, degenerate, or excluded by their label."""


class ShardWriter:
    """Writes a prepared folder; it appears under its name only when `close` succeeds."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.manifest = folder, manifest
        self._part = folder.with_name(folder.name + ".part")
        shutil.rmtree(self._part, ignore_errors=True)
        self._part.mkdir(parents=True)
        self._files: dict[str, IO[bytes]] = {
            name: (self._part / f"{name}.bin").open("wb") for name in _FILES
        }
        self._counts = {"rows": 0, "sequences": 0, "tokens": 0, "targets": 0}

    def add(self, row: Sequence[TokenSequence], rating: int = -1, safety: int = -1) -> None:
        """Append a row. rating: 0 (negligibly) to 3 (significantly better); safety: label; -1:
        none."""
        row_targets = 0
        for sequence in row:
            self._write("tokens", sequence.tokens)
            self._write("targets", sequence.is_target)
            row_targets += int(sequence.is_target[1:].sum())
            self._counts["tokens"] += len(sequence.tokens)
            self._write("sequence_ends", self._counts["tokens"])
        self._counts["sequences"] += len(row)
        self._counts["rows"] += 1
        self._counts["targets"] += row_targets
        self._write("row_ends", self._counts["sequences"])
        self._write("row_targets", row_targets)
        self._write("ratings", rating)
        self._write("safety", safety)

    def _write(self, name: str, values: Any) -> None:
        self._files[name].write(np.asarray(values, dtype=_FILES[name]).tobytes())

    def close(self, dropped: int = 0) -> Manifest:
        """Finish and return the manifest. Raises `ValueError` where not one row was added."""
        for file in self._files.values():
            file.close()
        if not self._counts["rows"]:
            raise ValueError(
                f"No record of {self.folder.name} data could be used ({dropped} dropped); "
                "check the input, or allow a longer context."
            )
        manifest = Manifest(**{**asdict(self.manifest), **self._counts, "dropped": dropped})
        (self._part / "manifest.json").write_text(json.dumps(asdict(manifest), indent=2))
        shutil.rmtree(self.folder, ignore_errors=True)
        os.replace(self._part, self.folder)
        return manifest


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a prepared folder. Raises `ValueError` where there is none or it is
    malformed."""
    path = folder / "manifest.json"
    if not path.is_file():
        raise ValueError(f"{folder} is not a prepared data folder: it has no manifest.json.")
    try:
        content = json.loads(path.read_text())
        return Manifest(**{field.name: content[field.name] for field in fields(Manifest)})
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a manifest of prepared data: {error}.") from error


class Shards:
    """Reads a prepared folder. Raises `ValueError` where a file is not as long as the manifest
    says."""

    def __init__(self, folder: Path) -> None:
        self.manifest = read_manifest(folder)
        counts = {
            "tokens": self.manifest.tokens,
            "targets": self.manifest.tokens,
            "sequence_ends": self.manifest.sequences,
        }
        self._arrays: dict[str, np.ndarray[Any, Any]] = {}
        for name, dtype in _FILES.items():
            path, count = folder / f"{name}.bin", counts.get(name, self.manifest.rows)
            expected = count * np.dtype(dtype).itemsize
            if not path.is_file() or path.stat().st_size != expected:
                raise ValueError(
                    f"{path} is missing or not {expected} bytes long, as its manifest says; "
                    "prepare the data again."
                )
            self._arrays[name] = np.memmap(path, dtype=dtype, mode="r")

    def __len__(self) -> int:
        return self.manifest.rows

    def row(self, index: int) -> list[TokenSequence]:
        """The sequences of row `index`."""
        first, last = self._span("row_ends", index)
        return [self._sequence(number) for number in range(first, last)]

    def _sequence(self, number: int) -> TokenSequence:
        first, last = self._span("sequence_ends", number)
        return TokenSequence(
            self._arrays["tokens"][first:last], self._arrays["targets"][first:last]
        )

    def _span(self, name: str, index: int) -> tuple[int, int]:
        ends = self._arrays[name]
        return (int(ends[index - 1]) if index else 0), int(ends[index])

    def targets(self, rows: Sequence[int]) -> int:
        """How many tokens of these rows the loss asks for."""
        return int(self._arrays["row_targets"][list(rows)].sum())

    def rating(self, index: int) -> int:
        """Rating of pair `index`: 0 (negligibly better) to 3 (significantly better), -1 without
        one."""
        return int(self._arrays["ratings"][index])

    def safety(self, index: int) -> int:
        """Safety label of pair `index`, an index into `llama2.records`' labels, -1 without one."""
        return int(self._arrays["safety"][index])
