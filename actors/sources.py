"""Where records come from: users' files or the synthetic world, in numbered parts."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from cluster.chunks import Chunk, cut, lines_before, read_chunk
from cluster.files import read_records
from llama2.record_fields import present, text_field
from llama2.records import (
    Comparison,
    Dialogue,
    Document,
    Prompt,
    Skipped,
    parse_comparisons,
    parse_dialogues,
    parse_documents,
    parse_prompts,
)
from llama2.sources import WorldSource

Part = Literal["pretrain", "sft", "helpfulness", "safety"]
Usable = Document | Dialogue | Comparison
PARSERS: dict[Part, Callable[..., list[Any]]] = {
    "pretrain": parse_documents,
    "sft": parse_dialogues,
    "helpfulness": parse_comparisons,
    "safety": parse_comparisons,
}
PREVIEW = 100  # records of each file that are looked at before any work


@dataclass(frozen=True)
class FileSource:
    """Records of users' files, cut into parts."""

    kind: Part
    files: tuple[Path, ...]
    cuts: tuple[tuple[Chunk, ...], ...]

    @staticmethod
    def of(kind: Part, files: Sequence[Path], part_bytes: int) -> "FileSource":
        """Files cut into parts of about `part_bytes`. Raises `ValueError` for a damaged table."""
        return FileSource(kind, tuple(files), tuple(cut(files, part_bytes)))

    @property
    def parts(self) -> int:
        """How many parts there are."""
        return len(self.cuts)

    def part(self, number: int) -> Iterator[Usable | Skipped]:
        """The records of one part. Raises `ValueError` that names file and line of a malformed
        one."""
        for chunk in self.cuts[number]:
            try:
                yield from self._parsed(chunk, 1)
            except ValueError:
                before = lines_before(chunk)
                if before:  # counted only now, where a line is to be named
                    for _ in self._parsed(chunk, before + 1):
                        pass
                raise

    def check(self) -> None:
        """Look at the first records of every file. Raises `ValueError` where one is malformed, or
        where a file has none that could be used."""
        for path in self.files:
            seen = list(islice(read_records(path), PREVIEW))
            parsed = [item for where, record in seen for item in PARSERS[self.kind](record, where)]
            if len(seen) < PREVIEW and all(isinstance(item, Skipped) for item in parsed):
                raise ValueError(f"{path} holds no record that {self.kind} could use.")

    def _parsed(self, chunk: Chunk, first_line: int) -> Iterator[Usable | Skipped]:
        for where, record in read_chunk(chunk, first_line):
            yield from PARSERS[self.kind](record, where)


def benchmark_texts(path: Path) -> Iterator[str]:
    """What training must not see of an evaluation set: of each record the `text`, the `question`,
    or the messages of the user in any form of prompt. Raises `ValueError` for other records."""
    for where, record in read_records(path):
        fields = present(record)
        if "text" in fields or "question" in fields:
            yield text_field(fields, "text" if "text" in fields else "question", where)
            continue
        for prompt in parse_prompts(fields, where):
            if isinstance(prompt, Prompt):
                yield from (m.content for m in prompt.messages if m.role == "user")


Source = WorldSource | FileSource


@dataclass(frozen=True)
class SourcePart:
    """One part of a named source: the work of one task."""

    number: int
    """Counted over all parts of all sources."""
    kind: Part
    name: str
    source: Source
    index: int
    """Counted within the source."""

    def records(self) -> Iterator[Usable | Skipped]:
        """The part's records, each time from the beginning."""
        return self.source.part(self.index)
