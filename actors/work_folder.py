"""What lies on disk between the tasks of a preparation."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from actors.sources import Part, SourcePart, Usable
from llama2.chat import Message
from llama2.records import Comparison, Dialogue, Document


@dataclass(frozen=True)
class WorkFolder:
    """The places, by part."""

    path: Path

    @property
    def results(self) -> Path:
        """Statistics of finished tasks."""
        return self.path / "results"

    @property
    def benchmarks(self) -> Path:
        """What evaluation sets hold."""
        return self.path / "benchmarks.npz"

    @property
    def signatures(self) -> Path:
        """What near-duplicates are found by."""
        return self.path / "signatures"

    @property
    def tokens(self) -> Path:
        """Tokenized records."""
        return self.path / "tokens"

    def records(self, part: SourcePart) -> Path:
        """The cleaned records of a part, as JSON lines."""
        return self.path / "records" / f"{part.number:06d}.jsonl"

    def hashes(self, part: SourcePart) -> Path:
        """A 128-bit hash of each of them, where repetitions are looked for word by word."""
        return self.path / "hashes" / f"{part.number:06d}.npy"

    def repeated(self, part: SourcePart) -> Path:
        """Indices of those that repeat an earlier one."""
        return self.path / "repeated" / f"{part.number:06d}.npy"

    def make(self) -> None:
        """Create the folders."""
        for name in ("results", "signatures", "tokens", "records", "hashes", "repeated"):
            (self.path / name).mkdir(parents=True, exist_ok=True)


def record_line(record: Usable) -> bytes:
    """A record as a line of JSON, without the place that it was read at."""
    return json.dumps(asdict(record) | {"source": ""}).encode() + b"\n"


def read_lines(path: Path, kind: Part) -> Iterator[Usable]:
    """The records in a file of such lines."""
    with path.open("rb") as file:
        for line in file:
            fields = json.loads(line)
            if kind == "pretrain":
                yield Document(**fields)
            elif kind == "sft":
                yield Dialogue(**(fields | {"messages": _messages(fields["messages"])}))
            else:
                yield Comparison(**(fields | {"prompt": _messages(fields["prompt"])}))


def _messages(values: Sequence[dict[str, Any]]) -> tuple[Message, ...]:
    return tuple(Message(**value) for value in values)
