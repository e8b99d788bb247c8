"""The cleaners: tasks that turn a part of users' records into those worth training on."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import xxhash

from actors.sources import SourcePart, Usable
from actors.work_folder import WorkFolder, read_lines, record_line
from cluster.data import Json
from llama2.chat import Message, check_text, dialogue_fault
from llama2.cleaning import (
    Cleaner,
    CleaningSettings,
    Decontamination,
    normalize,
    write_signatures,
)
from llama2.encoding import texts_of
from llama2.records import Comparison, Dialogue, Document, Skipped
from llama2.whole_files import whole_file


@dataclass(frozen=True)
class CleanTask:
    """Clean one part."""

    part: SourcePart
    work: WorkFolder
    settings: CleaningSettings
    decontaminate: bool


def clean_part(task: CleanTask) -> Json:
    """Write the part's records that are worth keeping, and what repetitions are found by.

    Returns how many `records` were read, and how many were `dropped` for each reason.
    """
    cleaner = _cleaner(task.settings, task.work.benchmarks if task.decontaminate else None)
    dropped: Counter[str] = Counter()
    hashes: list[bytes] = []
    count = 0
    path = task.work.records(task.part)
    with whole_file(path) as file:
        for record in task.part.records():
            count += 1
            cleaned = record if isinstance(record, Skipped) else cleaner.clean(record)
            if isinstance(cleaned, Skipped):
                dropped[cleaned.reason] += 1
                continue
            for text in texts_of(cleaned):  # its place is not kept
                check_text(text, f"{cleaned.source}: the text")
            file.write(record_line(cleaned))
            if not isinstance(cleaned, Document):
                hashes.append(_identity(cleaned))
    if task.part.kind != "pretrain":
        with whole_file(task.work.hashes(task.part)) as file:
            np.save(file, np.frombuffer(b"".join(hashes), dtype="<u8").reshape(-1, 2))
    elif task.settings.near_duplicates:
        records = read_lines(path, "pretrain")
        texts = (record.text for record in records if isinstance(record, Document))
        write_signatures(texts, task.work.signatures, task.part.number)
    return {"records": count, "dropped": dict(sorted(dropped.items()))}


@dataclass(frozen=True)
class RepeatTask:
    """Find the records of these parts that repeat an earlier one word by word."""

    parts: tuple[SourcePart, ...]
    work: WorkFolder


def find_repeated(task: RepeatTask) -> Json:
    """Write the indices, within each part, of records that an earlier one equals.

    Holds 16 bytes a record, of all parts.
    """
    arrays = [np.load(task.work.hashes(part)) for part in task.parts]
    every = np.concatenate([np.empty((0, 2), dtype="<u8"), *arrays])
    _, first = np.unique(every, axis=0, return_index=True)
    is_repeated = np.ones(len(every), dtype=np.bool_)
    is_repeated[first] = False
    start = 0
    for part, array in zip(task.parts, arrays, strict=True):
        found = np.flatnonzero(is_repeated[start : start + len(array)])
        with whole_file(task.work.repeated(part)) as file:
            np.save(file, found)
        start += len(array)
    return {}


class RecordCleaner:
    """Cleans records of any form: texts by all rules, what was written for a model by fewer.

    Dialogues and comparisons are repaired, and dropped where a question is one of a benchmark.
    """

    def __init__(self, settings: CleaningSettings, benchmarks: Decontamination | None) -> None:
        self._settings, self._benchmarks = settings, benchmarks
        self._texts = Cleaner(settings, benchmarks)

    def clean(self, record: Usable) -> Usable | Skipped:
        """The record as it is kept, or why it is not."""
        if isinstance(record, Document):
            cleaned = self._texts.clean(record.text)
            if cleaned.reason is not None:
                return Skipped(cleaned.reason, record.source)
            return Document(cleaned.text, record.source)
        if isinstance(record, Dialogue):
            return self._dialogue(record)
        return self._comparison(record)

    def _dialogue(self, record: Dialogue) -> Dialogue | Skipped:
        messages = self._repaired(record.messages)
        fault = dialogue_fault(messages) or self._contamination(messages)
        return Skipped(fault, record.source) if fault else replace(record, messages=messages)

    def _comparison(self, record: Comparison) -> Comparison | Skipped:
        prompt = self._repaired(record.prompt)
        chosen, rejected = self._repaired(
            [Message("assistant", answer) for answer in (record.chosen, record.rejected)]
        )
        fault = (
            dialogue_fault([*prompt, chosen])
            or dialogue_fault([*prompt, rejected])
            or self._contamination(prompt)
        )
        if fault is None and chosen.content.strip() == rejected.content.strip():
            fault = "the two answers are equal"
        if fault:
            return Skipped(fault, record.source)
        return replace(record, prompt=prompt, chosen=chosen.content, rejected=rejected.content)

    def _repaired(self, messages: Sequence[Message]) -> tuple[Message, ...]:
        if not self._settings.normalize:
            return tuple(messages)
        return tuple(
            Message(message.role, normalize(message.content, as_prose=False))
            for message in messages
        )

    def _contamination(self, messages: Sequence[Message]) -> str | None:
        if self._benchmarks is None:
            return None
        for message in messages:
            name = self._benchmarks.hit(message.content) if message.role == "user" else None
            if name is not None:
                return f"contaminated: {name}"
        return None


@lru_cache(maxsize=1)
def _cleaner(settings: CleaningSettings, benchmarks: Path | None) -> RecordCleaner:
    found = None if benchmarks is None else Decontamination.load(benchmarks)
    return RecordCleaner(settings, found)


def _identity(record: Dialogue | Comparison) -> bytes:
    """A hash of what is said: equal for records of the same prompt and answers."""
    said = (
        record.messages
        if isinstance(record, Dialogue)
        else (*record.prompt, record.chosen, record.rejected)
    )
    return xxhash.xxh3_128_digest(repr(said).encode())
