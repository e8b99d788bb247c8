"""Prepared data: what is written is read, and damage is named."""

import json
from pathlib import Path

import numpy as np
import pytest
import xxhash

from llama2.batches import TokenSequence, pack
from llama2.losses import IGNORE
from llama2.shard_files import ShardFile, TokenLayout
from llama2.shards import Kind, Manifest, Shards, ShardWriter, read_manifest


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


def several(folder: Path, kind: Kind, layout: TokenLayout, counts: list[int]) -> Path:
    """A folder of shards with so many rows each; row i has sequences of i + 2 and 3 tokens."""
    folder.mkdir()
    shards, number = [], 0
    for shard, count in enumerate(counts):
        file = ShardFile(folder / f"{shard}.bin", layout)
        for _ in range(count):
            longer = [1, *range(number, 2 * number + 1)]
            row = [sequence(longer, [1] * len(longer)), sequence([1, 2, 3], [1, 1, 1])]
            file.add(row, rating=number % 4, safety=number % 3)
            number += 1
        shards.append(file.close())
    manifest = Manifest(kind, "abc", context=99, layout=layout).with_shards(shards)
    (folder / "manifest.json").write_text(manifest.text())
    return folder


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
    assert shards.lengths([1, 0]) == [2, 4]  # the last token of a document is a target only
    found = read_manifest(folder)
    assert (found.rows, found.sequences, found.tokens, found.targets) == (2, 3, 9, 4)
    assert (found.kind, found.tokenizer, found.context, found.dropped) == ("sft", "abc", 8, 2)


@pytest.mark.parametrize("layout", [TokenLayout(2, False), TokenLayout(4, True)], ids=str)
@pytest.mark.parametrize("kind", ["pretrain", "preference"])
def test_rows_of_several_shards(layout: TokenLayout, kind: Kind, tmp_path: Path) -> None:
    shards = Shards(several(tmp_path / "data", kind, layout, [3, 1, 5]))
    assert len(shards) == 9
    for index in (8, 0, 3, 2, 4):
        first, second = shards.row(index)
        assert first.tokens.tolist() == [1, *range(index, 2 * index + 1)]
        assert second.tokens.tolist() == [1, 2, 3]
        assert first.is_target[1:].all()
        assert (shards.rating(index), shards.safety(index)) == (index % 4, index % 3)
        assert shards.targets([index]) == index + 3
    expected = [10, 3, 6] if kind == "preference" else [11, 3, 7]
    assert shards.lengths([8, 0, 4]) == expected
    shards.verify()


def test_a_file_is_as_long_as_its_layout_says(tmp_path: Path) -> None:
    short = several(tmp_path / "short", "pretrain", TokenLayout(2, False), [4])
    long = several(tmp_path / "long", "pretrain", TokenLayout(4, True), [4])
    # Rows of 2 to 5 tokens and 3: 26 tokens, 8 sequences, 4 rows. Every array fills whole 8 bytes.
    index = 8 * 8 + 4 * 8 + 4 * 4 + 8 + 8
    assert (short / "0.bin").stat().st_size == 56 + index
    assert (long / "0.bin").stat().st_size == 104 + 32 + index
    assert Shards(short).bytes == 56 + index
    content = np.fromfile(short / "0.bin", dtype="<u2", count=5)
    assert content.tolist() == [1, 0, 1, 2, 3]
    (shard,) = read_manifest(short).shards
    assert shard.hash == xxhash.xxh3_128_hexdigest((short / "0.bin").read_bytes())


def test_nothing_appears_before_the_end(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "data", Manifest("sft", "abc", context=8))
    writer.add(ROWS[0])
    assert not (tmp_path / "data").exists()
    with pytest.raises(ValueError, match=r"data is not a prepared data folder"):
        Shards(tmp_path / "data")
    file = ShardFile(tmp_path / "one.bin", TokenLayout())
    file.add(ROWS[0])
    assert not (tmp_path / "one.bin").exists()


def test_damage_is_named(folder: Path) -> None:
    path = folder / "shard-00000.bin"
    content = bytearray(path.read_bytes())
    content[3] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"shard-00000\.bin is damaged: its hash is \w{32} and"):
        Shards(folder).verify()
    path.write_bytes(content[:-1])
    with pytest.raises(ValueError, match=r"shard-00000\.bin is missing or not 120 bytes long"):
        Shards(folder)


def test_only_the_damaged_shard_is_named(tmp_path: Path) -> None:
    folder = several(tmp_path / "data", "sft", TokenLayout(), [2, 2, 2])
    content = (folder / "0.bin").read_bytes()
    (folder / "1.bin").write_bytes(
        content + bytes((folder / "1.bin").stat().st_size)[len(content) :]
    )
    with pytest.raises(ValueError, match=r"1\.bin is damaged"):
        Shards(folder).verify()


def test_the_fingerprint_is_that_of_the_content(tmp_path: Path) -> None:
    layout = TokenLayout(2, False)
    one, same, other = (
        Shards(several(tmp_path / name, "sft", layout, counts)).fingerprint
        for name, counts in (("one", [2, 3]), ("same", [2, 3]), ("other", [3, 2]))
    )
    assert one == same != other


def test_a_manifest_of_another_format_or_none(folder: Path) -> None:
    path = folder / "manifest.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"format": 3}))
    with pytest.raises(ValueError, match=r"has the format 3 and this version reads 2; prepare"):
        Shards(folder)
    for broken in ("{", "[]", json.dumps({"format": 2}), json.dumps(content | {"shards": [{}]})):
        path.write_text(broken)
        with pytest.raises(ValueError, match=r"manifest\.json is not a manifest of prepared data"):
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
