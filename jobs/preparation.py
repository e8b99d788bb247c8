"""The first steps of a preparation: clean, look for repetitions, tokenize. Each task of a step is
done once, however often the job is started."""

import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from actors.cleaner import CleanTask, RepeatTask, clean_part, find_repeated
from actors.encoder import SPLITS, EncodeTask, encode_part
from actors.sources import FileSource, Part, Source, SourcePart
from actors.work_folder import WorkFolder
from cluster.data import Json, run_once
from jobs.prepare_config import PrepareConfig
from llama2.cleaning import (
    BUCKETS,
    PERSONAL,
    cluster_duplicates,
    find_duplicates,
    write_signatures,
)
from llama2.shard_files import TokenLayout
from llama2.tokenizer import Tokenizer

Wanted = Mapping[Part, Mapping[str, Source]]
"""Sources by kind and name."""
Counts = dict[int, Json]
"""Statistics by number of the part."""
WORK = "work"
DROPPED_SOURCE = "the source has too much personal information"


@dataclass(frozen=True)
class Preparation:
    """What is prepared, and where."""

    config: PrepareConfig
    wanted: Wanted
    folder: Path

    @property
    def work(self) -> WorkFolder:
        """What is on disk until the end only."""
        return WorkFolder(self.folder / WORK)

    @cached_property
    def parts(self) -> tuple[SourcePart, ...]:
        """All parts of all sources, texts first: near-duplicates are looked for in part 0, 1, …"""
        found: list[SourcePart] = []
        for kind, named in self.wanted.items():
            assert kind != "pretrain" or not found
            for name, source in named.items():
                for index in range(source.parts):
                    found.append(SourcePart(len(found), kind, name, source, index))
        return tuple(found)

    @property
    def file_parts(self) -> list[SourcePart]:
        """The parts of users' files."""
        return [part for part in self.parts if isinstance(part.source, FileSource)]

    def run(self, step: str, tasks: Sequence[Any], work: Callable[[Any], Json]) -> list[Json]:
        """The results of a step's tasks, in order."""
        return run_once(self.work.results / step, tasks, work, self.config.cpus)

    def is_done(self, step: str, tasks: int) -> bool:
        """Whether all of a step's tasks have been done."""
        return len(list((self.work.results / step).glob("*.json"))) == tasks


def clean(preparation: Preparation) -> Counts:
    """Clean users' files, drop sources with much personal information, find repetitions.

    Returns what `clean_part` counted; in parts of a dropped source, all that it kept is counted as
    dropped. Raises `ValueError` where nothing of a kind is left.
    """
    config, work, parts = preparation.config, preparation.work, preparation.file_parts
    if not parts:
        return {}
    tasks = [CleanTask(part, work, config.cleaning, bool(config.benchmarks)) for part in parts]
    results = preparation.run("clean", tasks, clean_part)
    counts = {part.number: result for part, result in zip(parts, results, strict=True)}
    left_out = _personal_sources(parts, counts, config.cleaning.max_personal_source)
    dropped = [part for part in parts if part.kind == "pretrain" and part.name in left_out]
    for part in dropped:
        counted = counts[part.number]
        kept = counted["records"] - sum(counted["dropped"].values())
        counted["dropped"] |= {DROPPED_SOURCE: kept}
    _check_left(preparation, counts)
    _find_repeated_records(preparation)
    if config.cleaning.near_duplicates:
        _find_near_duplicates(preparation, dropped)
    return counts


def too_few(kind: Part, dropped: Mapping[str, int]) -> ValueError:
    """The error of a kind of which too little is left, with what was dropped for which reason."""
    reasons = ", ".join(f"{count}: {reason}" for reason, count in dropped.items() if count)
    return ValueError(
        f"Training and evaluation need a record of {kind} each, and too few could be used (dropped "
        f"were {reasons or 'none'}); give more, allow a longer context, or clean less."
    )


def _check_left(preparation: Preparation, counts: Counts) -> None:
    for kind in preparation.wanted:
        several = [counts[part.number] for part in preparation.file_parts if part.kind == kind]
        dropped: Counter[str] = Counter()
        for counted in several:
            dropped.update(counted["dropped"])
        if several and dropped.total() == sum(counted["records"] for counted in several):
            raise too_few(kind, dropped)


def _personal_sources(parts: Sequence[SourcePart], counts: Counts, limit: float) -> set[str]:
    """Names of the sources of text in which more than this share of documents has much personal
    information."""
    read: Counter[str] = Counter()
    personal: Counter[str] = Counter()
    for part in parts:
        if part.kind == "pretrain":
            read[part.name] += counts[part.number]["records"]
            personal[part.name] += counts[part.number]["dropped"].get(PERSONAL, 0)
    return {name for name in read if personal[name] > limit * read[name]}


def _find_repeated_records(preparation: Preparation) -> None:
    """Of dialogues and comparisons, those that are equal word by word."""
    by_kind: dict[Part, list[SourcePart]] = {}
    for part in preparation.file_parts:
        if part.kind != "pretrain":
            by_kind.setdefault(part.kind, []).append(part)
    tasks = [RepeatTask(tuple(parts), preparation.work) for parts in by_kind.values()]
    if tasks:
        preparation.run("repeated", tasks, find_repeated)


def _find_near_duplicates(preparation: Preparation, dropped: Sequence[SourcePart]) -> None:
    """Of texts, those that are nearly the same; dropped parts take no document's place."""
    count = sum(part.kind == "pretrain" for part in preparation.file_parts)
    if not count:
        return
    folder = preparation.work.signatures
    if not preparation.is_done("clusters", 1):
        for part in dropped:
            write_signatures((), folder, part.number)
    preparation.run("buckets", range(BUCKETS), partial(_find_in_bucket, folder, count))
    preparation.run("clusters", [count], partial(_cluster, folder))


def _find_in_bucket(folder: Path, parts: int, bucket: int) -> Json:
    find_duplicates(folder, parts, bucket)
    return {}


def _cluster(folder: Path, parts: int) -> Json:
    cluster_duplicates(folder, parts)
    return {}


def encode(preparation: Preparation, cleaned: Counts, tokenizer: Tokenizer) -> Counts:
    """Tokenize every part but those of dropped sources. Returns what `encode_part` counted, with
    what was dropped in cleaning."""
    config, work = preparation.config, preparation.work
    parts = [
        part
        for part in preparation.parts
        if DROPPED_SOURCE not in cleaned.get(part.number, {"dropped": {}})["dropped"]
    ]
    tasks = [
        EncodeTask(
            part=part,
            work=work,
            is_cleaned=part.number in cleaned,
            near_duplicates=config.cleaning.near_duplicates,
            tokenizer=preparation.folder / "tokenizer",
            context=config.context,
            heldout_share=config.heldout_share,
            layout=layout(part.kind, tokenizer),
            file_tokens=config.shard_tokens,
        )
        for part in parts
    ]
    results = preparation.run("encode", tasks, encode_part)
    counts = {part.number: result for part, result in zip(parts, results, strict=True)}
    for number, counted in cleaned.items():
        encoded = counts.setdefault(
            number, {"dropped": {}, "files": {split: [] for split in SPLITS}}
        )
        encoded["records"] = counted["records"]
        encoded["dropped"] = counted["dropped"] | encoded["dropped"]
    for name in ("records", "hashes", "repeated", "signatures"):  # nobody reads them again
        shutil.rmtree(work.path / name, ignore_errors=True)
    return counts


def layout(kind: Part, tokenizer: Tokenizer) -> TokenLayout:
    """How tokens of this kind are stored."""
    return TokenLayout(
        token_bytes=2 if tokenizer.vocab_size <= 1 << 16 else 4,
        marks_targets=kind != "pretrain",
    )
