"""The reward models' mixes of comparisons (paper, section 3.2.2), as prepared rows of their own.

A reward model learns from all comparisons of its own kind and, beside them, from others, drawn
uniformly. The helpfulness model's own are the helpfulness data sets but the open ones, which belong
to the others with all safety data sets (half of all pairs in the paper). The safety model's own are
all safety data sets, its others all helpfulness data sets (a tenth).
"""

import os
import shutil
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import xxhash

from llama2.mixing import drawn, needed_rows
from llama2.shard_files import Shard, ShardFile
from llama2.shards import Manifest, Shards, SourceCounts, shard_name

Aspect = Literal["helpfulness", "safety"]
ASPECTS: tuple[Aspect, Aspect] = ("helpfulness", "safety")


@dataclass(frozen=True)
class DataSet:
    """Rows of one named data set, which lie side by side in a prepared folder."""

    aspect: Aspect
    source: str
    shards: Shards
    rows: Sequence[int]

    @property
    def name(self) -> str:
        """Kind and source, as "safety/harmless"."""
        return f"{self.aspect}/{self.source}"


@dataclass(frozen=True)
class Mix:
    """What a reward model is trained on."""

    own: tuple[DataSet, ...]
    others: tuple[DataSet, ...]
    wanted: int
    """Rows of others that were asked for: there may be fewer."""

    @property
    def data_sets(self) -> tuple[DataSet, ...]:
        """All of them."""
        return self.own + self.others

    @property
    def taken(self) -> int:
        """Rows of others."""
        return sum(len(data_set.rows) for data_set in self.others)


def data_sets(aspect: Aspect, shards: Shards) -> list[DataSet]:
    """The named data sets in prepared comparisons: their rows lie there one behind the other."""
    sources = shards.manifest.sources or {"all": SourceCounts(documents=len(shards))}
    found, start = [], 0
    for name, counts in sources.items():
        found.append(DataSet(aspect, name, shards, range(start, start + counts.documents)))
        start += counts.documents
    assert start == len(shards), f"{shards.folder}: sources and rows do not agree"
    return found


def prepared(root: Path, split: Literal["train", "heldout"]) -> dict[Aspect, Path]:
    """The folders of comparisons in a folder that `jobs/prepare.py` made."""
    folders = {one: root / one / split for one in ASPECTS}
    return {one: path for one, path in folders.items() if (path / "manifest.json").is_file()}


def choose(aspect: Aspect, root: Path, share: float, open_data: Collection[str], seed: int) -> Mix:
    """All own rows of `root` (a prepared folder), and others drawn by `seed` that are to make up
    `share` of all, or as many as there are.

    Raises `ValueError` for an open data set that is not there, or where nothing of the model's own
    is left.
    """
    assert 0 <= share < 1
    every = [
        data_set
        for one, folder in prepared(root, "train").items()
        for data_set in data_sets(one, Shards(folder))
    ]
    names = [data_set.source for data_set in every if data_set.aspect == "helpfulness"]
    for name in open_data:
        if name not in names:
            raise ValueError(
                f"open_data names {name!r}, but the data sets of helpfulness in {root} are: "
                f"{', '.join(names) or 'none'}."
            )
    own = [d for d in every if d.aspect == aspect and not _is_open(d, aspect, open_data)]
    others = [d for d in every if d not in own]
    count = sum(len(data_set.rows) for data_set in own)
    if not count:
        raise ValueError(
            f"No {aspect} data set in {root} is left to train on: all are open data; name fewer in "
            "open_data."
        )
    wanted = needed_rows(count, share)
    rows = drawn([len(data_set.rows) for data_set in others], wanted, seed)
    taken = [
        DataSet(d.aspect, d.source, d.shards, [d.rows[i] for i in picked])
        for d, picked in zip(others, rows, strict=True)
        if picked
    ]
    return Mix(tuple(own), tuple(taken), wanted)


def write_mix(mix: Mix, folder: Path, shard_tokens: int = 1 << 26) -> Manifest:
    """Write the rows of a mix as a prepared folder, which appears under its name only when it is
    whole. One that was written of the same rows is left as it is."""
    recipe, recipe_file = _recipe(mix), folder / "recipe.txt"
    if recipe_file.is_file() and recipe_file.read_text() == recipe:
        return Shards(folder).manifest
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    tokens: Counter[str] = Counter()
    shards = list(_write_shards(mix, part, shard_tokens, tokens))
    first = mix.own[0].shards.manifest
    manifest = Manifest(
        kind="preference",
        tokenizer=first.tokenizer,
        context=max(one.shards.manifest.context for one in mix.data_sets),
        layout=first.layout,
        sources={
            one.name: SourceCounts(
                records=len(one.rows),
                documents=len(one.rows),
                tokens=tokens[one.name],
                share=tokens[one.name] / tokens.total(),
            )
            for one in mix.data_sets
        },
    ).with_shards(shards)
    (part / "manifest.json").write_text(manifest.text())
    (part / recipe_file.name).write_text(recipe)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(part, folder)
    return manifest


def _recipe(mix: Mix) -> str:
    """A hash of what the mix is made of."""
    digest = xxhash.xxh3_128()
    for one in mix.data_sets:
        digest.update(f"{one.name} {one.shards.fingerprint} {len(one.rows)} ".encode())
        digest.update(np.asarray(one.rows, dtype="<i8").tobytes())
    return digest.hexdigest()


def _is_open(data_set: DataSet, aspect: Aspect, open_data: Collection[str]) -> bool:
    return aspect == data_set.aspect == "helpfulness" and data_set.source in open_data


def _write_shards(
    mix: Mix, folder: Path, shard_tokens: int, tokens: Counter[str]
) -> Iterator[Shard]:
    """The shards of all rows; counts the tokens of each data set."""
    file: ShardFile | None = None
    number = 0
    for one in mix.data_sets:
        for i in one.rows:
            if file is None:
                layout = mix.own[0].shards.manifest.layout
                file = ShardFile(folder / shard_name(number), layout)
                number += 1
            row = one.shards.row(i)
            tokens[one.name] += sum(len(sequence.tokens) for sequence in row)
            file.add(row, one.shards.rating(i), one.shards.safety(i))
            if file.tokens >= shard_tokens:
                yield file.close()
                file = None
    if file is not None:
        yield file.close()
