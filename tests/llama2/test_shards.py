"""Prepared data: what is written is read, and damage is named."""

from pathlib import Path

import numpy as np
import pytest

from llama2.batches import TokenSequence, pack
from llama2.losses import IGNORE
from llama2.shards import Manifest, Shards, ShardWriter, read_manifest


def sequence(tokens: list[int], targets: list[int]) -> TokenSequence:
    return TokenSequence(np.array(tokens), np.array(targets, dtype=bool))


ROWS = [
    [sequence([1, 5, 70_000, 2], [0, 0, 1, 1]), sequence([1, 9], [0, 1])],
    [sequence([1, 7, 8], [0, 1, 0])],
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    writer = ShardWriter(tmp_path / "data", Manifest("sft", "abc", context=8))
    writer.add(ROWS[0], rating=3)
    writer.add(ROWS[1], safety=1)
    writer.close(dropped=2)
    return tmp_path / "data"


def test_rows_come_back(folder: Path) -> None:
    shards = Shards(folder)
    assert len(shards) == 2
    for index, row in enumerate(ROWS):
        for found, written in zip(shards.row(index), row, strict=True):
            assert found.tokens.tolist() == written.tokens.tolist()
            assert found.is_target.tolist() == written.is_target.tolist()
    assert [shards.rating(0), shards.rating(1), shards.safety(0), shards.safety(1)] == [
        3,
        -1,
        -1,
        1,
    ]
    assert shards.targets([0]) == 3
    assert shards.targets([0, 1]) == 4
    expected = Manifest("sft", "abc", 8, rows=2, sequences=3, tokens=9, targets=4, dropped=2)
    assert read_manifest(folder) == expected


def test_nothing_appears_before_the_end(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "data", Manifest("sft", "abc", context=8))
    writer.add(ROWS[0])
    assert not (tmp_path / "data").exists()
    with pytest.raises(ValueError, match=r"data is not a prepared data folder"):
        Shards(tmp_path / "data")


def test_damage_is_named(folder: Path) -> None:
    with (folder / "tokens.bin").open("ab") as file:
        file.write(b"x")
    with pytest.raises(ValueError, match=r"tokens\.bin is missing or not 36 bytes long"):
        Shards(folder)


def test_empty_data_is_an_error(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "data", Manifest("sft", "abc", context=8))
    with pytest.raises(ValueError, match=r"No record of data data could be used \(7 dropped\)"):
        writer.close(dropped=7)


def test_packed_batch(folder: Path) -> None:
    shards = Shards(folder)
    batch = pack([shards.row(0), shards.row(1)], width=5)
    assert batch.tokens_BT.tolist() == [[1, 5, 70_000, 1, 0], [1, 7, 0, 0, 0]]
    assert batch.segments_BT.tolist() == [[1, 1, 1, 2, 0], [1, 1, 0, 0, 0]]
    x = IGNORE
    assert batch.targets_BT.tolist() == [[x, 70_000, 2, 9, x], [7, x, x, x, x]]
