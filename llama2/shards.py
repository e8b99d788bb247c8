"""Prepared data on disk: shards and a manifest.

A folder holds `manifest.json` and the shards that it lists, each a file of `llama2/shard_files.py`.
Pretraining and SFT rows are packed documents, each a sequence of its own; a preference row is a
pair, chosen first.
"""

import json
import os
import shutil
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Literal

import xxhash

from llama2.batches import TokenSequence
from llama2.shard_files import Shard, ShardFile, ShardReader, TokenLayout, file_hash

Kind = Literal["pretrain", "sft", "preference"]
FORMAT = 2
MOST_OPEN = 128  # each open shard takes a file handle, of which a process has about a thousand


@dataclass(frozen=True)
class SourceCounts:
    """What became of one source."""

    records: int = 0
    """Records read, of both splits, those dropped included."""
    documents: int = 0
    """Records in the rows of this split, as often as they are there."""
    tokens: int = 0
    """Their tokens."""
    passes: float = 1.0
    """How often the source is gone through: whole passes, and a last one over a share of it."""
    weight: float | None = None
    """What the mix asked for; None without a mix."""
    share: float = 0.0
    """Share of this split's tokens."""
    dropped: dict[str, int] = field(default_factory=dict)
    """Records of both splits that are in neither, by reason."""


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
    """Records that are in neither split: `sources` has the reasons."""
    layout: TokenLayout = field(default_factory=TokenLayout)
    shards: tuple[Shard, ...] = ()
    sources: dict[str, SourceCounts] = field(default_factory=dict)
    format: int = FORMAT

    def with_shards(self, shards: Sequence[Shard]) -> "Manifest":
        """The same with these shards, and the totals over them."""
        return replace(
            self,
            shards=tuple(shards),
            rows=sum(shard.rows for shard in shards),
            sequences=sum(shard.sequences for shard in shards),
            tokens=sum(shard.tokens for shard in shards),
            targets=sum(shard.targets for shard in shards),
        )

    def text(self) -> str:
        """The content of `manifest.json`."""
        return json.dumps(asdict(self), indent=1) + "\n"


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a prepared folder. Raises `ValueError` where there is none, it is malformed,
    or its format is another one."""
    path = folder / "manifest.json"
    if not path.is_file():
        raise ValueError(f"{folder} is not a prepared data folder: it has no manifest.json.")
    try:
        content = json.loads(path.read_text())
        if content.get("format") != FORMAT:
            raise ValueError(
                f"{path} has the format {content.get('format', 1)} and this version reads {FORMAT};"
                " prepare the data again."
            )
        named = {item.name: content[item.name] for item in fields(Manifest)}
        named["layout"] = TokenLayout(**named["layout"])
        named["shards"] = tuple(Shard(**shard) for shard in named["shards"])
        named["sources"] = {
            name: SourceCounts(**counts) for name, counts in named["sources"].items()
        }
        return Manifest(**named)
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a manifest of prepared data: {error}.") from error


def shard_name(number: int) -> str:
    """File name of a folder's shard, counted from 0."""
    return f"shard-{number:05d}.bin"


class ShardWriter:
    """Writes a prepared folder of one shard; it appears under its name only when `close`
    succeeds."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.manifest = folder, manifest
        self._part = folder.with_name(folder.name + ".part")
        shutil.rmtree(self._part, ignore_errors=True)
        self._part.mkdir(parents=True)
        self._file = ShardFile(self._part / shard_name(0), manifest.layout)

    def add(self, row: Sequence[TokenSequence], rating: int = -1, safety: int = -1) -> None:
        """Append a row. rating: 0 (negligibly) to 3 (significantly better); safety: label; -1:
        none."""
        self._file.add(row, rating, safety)

    def close(self, dropped: int = 0) -> Manifest:
        """Finish and return the manifest. Raises `ValueError` where not one row was added."""
        shard = self._file.close()
        if not shard.rows:
            raise ValueError(
                f"No record of {self.folder.name} data could be used ({dropped} dropped); "
                "check the input, or allow a longer context."
            )
        manifest = replace(self.manifest.with_shards([shard]), dropped=dropped)
        (self._part / "manifest.json").write_text(manifest.text())
        shutil.rmtree(self.folder, ignore_errors=True)
        os.replace(self._part, self.folder)
        return manifest


class Shards:
    """Reads a prepared folder. Raises `ValueError` where a shard is not as long as the manifest
    says."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = read_manifest(folder)
        for shard in self.manifest.shards:
            path, expected = folder / shard.name, shard.size(self.manifest.layout)
            if not path.is_file() or path.stat().st_size != expected:
                raise ValueError(
                    f"{path} is missing or not {expected} bytes long, as its manifest says; "
                    "prepare the data again."
                )
        self._ends = list(accumulate(shard.rows for shard in self.manifest.shards))
        self._open = lru_cache(maxsize=MOST_OPEN)(self._reader)

    def __len__(self) -> int:
        return self.manifest.rows

    @property
    def bytes(self) -> int:
        """Bytes of all shards."""
        return sum(shard.size(self.manifest.layout) for shard in self.manifest.shards)

    @property
    def fingerprint(self) -> str:
        """What identifies this data: a hash of its manifest, which has the hashes of the shards."""
        return xxhash.xxh3_128_hexdigest(self.manifest.text().encode())

    def verify(self) -> None:
        """Read every shard once. Raises `ValueError` naming the first whose hash is not the
        manifest's."""
        for shard in self.manifest.shards:
            path = self.folder / shard.name
            found = file_hash(path)
            if found != shard.hash:
                raise ValueError(
                    f"{path} is damaged: its hash is {found} and its manifest says {shard.hash}; "
                    "copy it again or prepare the data again."
                )

    def row(self, index: int) -> list[TokenSequence]:
        """The sequences of row `index`."""
        reader, place = self._place(index)
        return reader.row(place)

    def targets(self, rows: Sequence[int]) -> int:
        """How many tokens of these rows the loss asks for."""
        return sum(reader.targets(place) for reader, place in map(self._place, rows))

    def lengths(self, rows: Sequence[int]) -> list[int]:
        """Tokens that each row takes in a batch: a packed row all its documents' but their last
        ones, a pair those of its longer sequence."""
        return [self._length(index) for index in rows]

    def rating(self, index: int) -> int:
        """Rating of pair `index`: 0 (negligibly better) to 3 (significantly better), -1 without
        one."""
        reader, place = self._place(index)
        return reader.rating(place)

    def safety(self, index: int) -> int:
        """Safety label of pair `index`, an index into `llama2.records`' labels, -1 without one."""
        reader, place = self._place(index)
        return reader.safety(place)

    def _length(self, index: int) -> int:
        reader, place = self._place(index)
        lengths = reader.sequence_lengths(place)
        return max(lengths) if self.manifest.kind == "preference" else sum(lengths) - len(lengths)

    def _place(self, index: int) -> tuple[ShardReader, int]:
        """The shard of row `index`, and the row's number in it."""
        assert 0 <= index < len(self)
        number = bisect_right(self._ends, index)
        return self._open(number), index - (self._ends[number - 1] if number else 0)

    def _reader(self, number: int) -> ShardReader:
        shard = self.manifest.shards[number]
        return ShardReader(self.folder / shard.name, shard, self.manifest.layout)
