"""Mixes of comparisons: what is in them, in which shares, and that rows keep all they carry."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from llama2.batches import TokenSequence
from llama2.mixing import drawn, needed_rows
from llama2.preference_mix import Aspect, choose, data_sets, prepared, write_mix
from llama2.shards import Manifest, Shards, ShardWriter, SourceCounts

SIZES: dict[Aspect, dict[str, int]] = {
    "helpfulness": {"mine": 40, "open": 30},
    "safety": {"harm": 60, "harmless": 12},
}
# The first token of a row names its data set.
NAMES = {10: "helpfulness/mine", 11: "helpfulness/open", 12: "safety/harm", 13: "safety/harmless"}


def folder(root: Path) -> Path:
    """Prepared data of four data sets; the second token numbers a row within its own."""
    first = 10
    for aspect, sizes in SIZES.items():
        counts = {name: SourceCounts(documents=count) for name, count in sizes.items()}
        manifest = Manifest("preference", "made up", 32, sources=counts)
        writer = ShardWriter(root / aspect / "train", manifest)
        for count in sizes.values():
            for i in range(count):
                pair = [
                    TokenSequence(np.array([first, i, *range(n)]), np.arange(n + 2) > 1)
                    for n in (1 + i % 3, 2)
                ]
                writer.add(pair, rating=i % 4, safety=i % 3 if aspect == "safety" else -1)
            first += 1
        writer.close()
    return root


def rows(shards: Shards) -> list[tuple[str, int]]:
    """Data set and number of every row."""
    found = [shards.row(i)[0].tokens[:2].tolist() for i in range(len(shards))]
    return [(NAMES[name], number) for name, number in found]


def mixed(root: Path, aspect: Aspect, share: float, open_data: tuple[str, ...] = ()) -> Shards:
    target = root / f"mix-{aspect}-{share}"
    write_mix(choose(aspect, root, share, open_data, seed=0), target, shard_tokens=100)
    return Shards(target)


def test_rows_by_hand() -> None:
    assert needed_rows(100, 0.5) == 100
    assert needed_rows(90, 0.1) == 10
    assert needed_rows(7, 0.0) == 0
    assert drawn([3, 0, 2], 9, seed=1) == [[0, 1, 2], [], [0, 1]]
    assert drawn([3, 2], 0, seed=1) == [[], []]


def test_drawing_is_uniform_over_rows_not_sources() -> None:
    counts: Counter[int] = Counter()
    for seed in range(400):
        first, second = drawn([30, 10], 8, seed)
        assert len(first) + len(second) == 8 == len(set(first)) + len(set(second))
        counts.update([*first, *(30 + i for i in second)])
    # 80 expected of each row, with a deviation of 8.
    assert min(counts.values()) > 45 and max(counts.values()) < 115
    assert drawn([30, 10], 8, 3) == drawn([30, 10], 8, 3) != drawn([30, 10], 8, 4)


def test_data_sets_are_told_apart_by_their_places(tmp_path: Path) -> None:
    root = folder(tmp_path)
    assert list(prepared(root, "train")) == ["helpfulness", "safety"]
    assert prepared(root, "heldout") == {}
    found = data_sets("safety", Shards(root / "safety" / "train"))
    assert [(one.name, one.rows) for one in found] == [
        ("safety/harm", range(60)),
        ("safety/harmless", range(60, 72)),
    ]


def test_helpfulness_takes_as_much_again_of_safety_and_open_data(tmp_path: Path) -> None:
    root = folder(tmp_path)
    shards = mixed(root, "helpfulness", 0.5, open_data=("open",))
    found = rows(shards)
    assert len(set(found)) == len(found) == 80
    counts = Counter(name for name, _ in found)
    assert counts["helpfulness/mine"] == 40
    # 40 of 102 others, each by its size.
    assert 5 <= counts["helpfulness/open"] <= 19
    assert 15 <= counts["safety/harm"] <= 32
    assert sum(counts.values()) == 80
    sources = shards.manifest.sources
    assert {name: one.documents for name, one in sources.items()} == counts
    assert sum(one.share for one in sources.values()) == pytest.approx(1)
    assert sum(one.tokens for one in sources.values()) == shards.manifest.tokens
    assert len(shards.manifest.shards) > 3


def test_safety_takes_a_tenth_of_helpfulness(tmp_path: Path) -> None:
    counts = Counter(name for name, _ in rows(mixed(folder(tmp_path), "safety", 0.1)))
    assert counts["safety/harm"] == 60 and counts["safety/harmless"] == 12
    assert counts["helpfulness/mine"] + counts["helpfulness/open"] == 8


def test_rows_keep_ratings_labels_and_targets(tmp_path: Path) -> None:
    root = folder(tmp_path)
    shards = mixed(root, "safety", 0.3)
    sources = {
        one.name: one for a in SIZES for one in data_sets(a, Shards(root / a / "train"))
    }  # fmt: skip
    for place, (name, number) in enumerate(rows(shards)):
        one = sources[name]
        i = one.rows[number]
        assert shards.rating(place) == one.shards.rating(i) == number % 4
        assert shards.safety(place) == one.shards.safety(i)
        for ours, theirs in zip(shards.row(place), one.shards.row(i), strict=True):
            assert ours.tokens.tolist() == theirs.tokens.tolist()
            assert ours.is_target.tolist() == theirs.is_target.tolist()


def test_what_is_there_is_not_written_again(tmp_path: Path) -> None:
    root = folder(tmp_path)
    target = tmp_path / "mix"
    first = choose("safety", root, 0.1, (), seed=0)
    write_mix(first, target)
    (target / "mark").write_text("")
    assert write_mix(choose("safety", root, 0.1, (), seed=0), target).rows == 80
    assert (target / "mark").exists()
    write_mix(choose("safety", root, 0.1, (), seed=1), target)
    assert not (target / "mark").exists()


def test_fewer_than_asked_for(tmp_path: Path) -> None:
    mix = choose("safety", folder(tmp_path), 0.9, (), seed=0)
    assert (mix.wanted, mix.taken) == (648, 70)


def test_what_cannot_be_mixed(tmp_path: Path) -> None:
    root = folder(tmp_path)
    with pytest.raises(
        ValueError, match=r"'shp', but the data sets of helpfulness in .* mine, open"
    ):
        choose("helpfulness", root, 0.5, ("shp",), seed=0)
    with pytest.raises(ValueError, match=r"No helpfulness data set in .* is left"):
        choose("helpfulness", root, 0.5, ("mine", "open"), seed=0)
