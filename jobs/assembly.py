"""The last steps of a preparation: mix the sources, pack their records into shards, and write the
manifests."""

import math
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from actors.encoder import SPLITS, Split
from actors.packer import PackTask, Pass, pack_shard
from actors.sources import Part, SourcePart
from cluster.data import Json
from jobs.preparation import Counts, Preparation, layout, too_few
from llama2.mixing import passes
from llama2.shard_files import Shard
from llama2.shards import Kind, Manifest, SourceCounts, shard_name
from llama2.tokenizer import Tokenizer

KINDS: dict[Part, Kind] = {
    "pretrain": "pretrain",
    "sft": "sft",
    "helpfulness": "preference",
    "safety": "preference",
}


@dataclass(frozen=True)
class Records:
    """The tokenized records of one kind."""

    kind: Part
    parts: tuple[SourcePart, ...]
    counts: Counts

    def files(self, preparation: Preparation, split: Split) -> Iterator[Pass]:
        """One pass over all files of a split, in order."""
        for part in self.parts:
            for fields in self.counts[part.number]["files"][split]:
                shard = Shard(**fields)
                yield Pass(preparation.work.tokens / shard.name, shard, part.name)

    def dropped(self, source: str | None = None) -> dict[str, int]:
        """How many records of a source, or of all, were dropped for each reason."""
        found: Counter[str] = Counter()
        for part in self.parts:
            if source in (None, part.name):
                found.update(self.counts[part.number]["dropped"])
        return {reason: count for reason, count in sorted(found.items()) if count}

    def read(self, source: str) -> int:
        """How many records of a source were read."""
        return sum(
            self.counts[part.number]["records"] for part in self.parts if part.name == source
        )


def assemble(
    preparation: Preparation, encoded: Counts, tokenizer: Tokenizer
) -> dict[str, Manifest]:
    """Write the shards of every kind and split, then their manifests, which are returned under
    names as "sft/train".

    Raises `ValueError` where a kind has no row in a split, or for a mix that cannot be had.
    """
    every = [
        Records(kind, tuple(part for part in preparation.parts if part.kind == kind), encoded)
        for kind in preparation.wanted
    ]
    repeats = {records.kind: _repeats(preparation, records) for records in every}
    tasks: dict[tuple[Part, Split], list[PackTask]] = {}
    for records in every:
        planned = _plan(preparation, records, repeats[records.kind])
        for split, several in planned.items():
            tasks[records.kind, split] = _tasks(
                preparation, records.kind, split, several, tokenizer
            )
    results = iter(
        preparation.run("pack", [task for one in tasks.values() for task in one], pack_shard)
    )
    manifests: dict[str, Manifest] = {}
    for records in every:
        for split in SPLITS:
            packed = [next(results) for _ in tasks[records.kind, split]]
            empty = Manifest(
                kind=KINDS[records.kind],
                tokenizer=tokenizer.fingerprint,
                context=preparation.config.context,
                layout=layout(records.kind, tokenizer),
                dropped=sum(records.dropped().values()),
                sources=_sources(preparation, records, repeats[records.kind], packed, split),
            )
            shards = [Shard(**result["shard"]) for result in packed]
            manifest = empty.with_shards([shard for shard in shards if shard.rows])
            manifests[f"{records.kind}/{split}"] = manifest
    for name, manifest in manifests.items():
        # Unfinished files are kept out of the folders that stay.
        unfinished = preparation.work.path / "manifest.json"
        unfinished.write_text(manifest.text())
        os.replace(unfinished, preparation.folder / name / "manifest.json")
    return manifests


def _repeats(preparation: Preparation, records: Records) -> dict[str, float]:
    """How often each source is passed in training."""
    tokens: Counter[str] = Counter(dict.fromkeys(preparation.wanted[records.kind], 0))
    for one in records.files(preparation, "train"):
        tokens[one.source] += one.shard.tokens
    config = preparation.config
    return passes(config.mix if records.kind == "pretrain" else {}, tokens, config.max_passes)


def _plan(
    preparation: Preparation, records: Records, repeats: dict[str, float]
) -> dict[Split, list[Pass]]:
    """The passes that make each split. Raises `ValueError` where there are not two rows."""
    once = list(records.files(preparation, "train"))
    heldout = list(records.files(preparation, "heldout"))
    pairs = KINDS[records.kind] == "preference"
    usable = sum(one.shard.rows if pairs else one.shard.sequences for one in once)
    if usable < (1 if heldout else 2):
        raise too_few(records.kind, records.dropped())
    train = [
        replace(one, share=min(1.0, repeats[name] - number))
        for name in repeats
        for number in range(math.ceil(repeats[name]))
        for one in once
        if one.source == name
    ]
    if not heldout:
        # The smallest data set, too, has something there.
        lender = once[0].file
        heldout = [replace(once[0], take="first")]
        train = [replace(one, take="rest") if one.file == lender else one for one in train]
    return {"train": train, "heldout": heldout}


def _tasks(
    preparation: Preparation,
    kind: Part,
    split: Split,
    several: Sequence[Pass],
    tokenizer: Tokenizer,
) -> list[PackTask]:
    folder = preparation.folder / kind / split
    folder.mkdir(parents=True, exist_ok=True)
    return [
        PackTask(
            path=folder / shard_name(number),
            scratch=preparation.work.tokens,
            passes=tuple(group),
            layout=layout(kind, tokenizer),
            context=preparation.config.context,
            pairs=KINDS[kind] == "preference",
        )
        for number, group in enumerate(_grouped(several, preparation.config.shard_tokens))
    ]


def _grouped(several: Sequence[Pass], most: int) -> Iterator[list[Pass]]:
    """Passes by shard, each of at most `most` tokens unless a single pass has more."""
    group: list[Pass] = []
    tokens = 0
    for one in several:
        if group and tokens + one.tokens > most:
            yield group
            group, tokens = [], 0
        group.append(one)
        tokens += one.tokens
    if group:
        yield group


def _sources(
    preparation: Preparation,
    records: Records,
    repeats: dict[str, float],
    packed: Sequence[Json],
    split: Split,
) -> dict[str, SourceCounts]:
    tokens: Counter[str] = Counter()
    documents: Counter[str] = Counter()
    for result in packed:
        tokens.update(result["tokens"])
        documents.update(result["documents"])
    weights = preparation.config.mix if records.kind == "pretrain" else {}
    return {
        name: SourceCounts(
            records=records.read(name),
            documents=documents[name],
            tokens=tokens[name],
            passes=repeats[name] if split == "train" else 1.0,
            weight=weights.get(name),
            share=tokens[name] / max(1, tokens.total()),
            dropped=records.dropped(name),
        )
        for name in preparation.wanted[records.kind]
    }
