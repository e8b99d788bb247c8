"""Lineage: what is entered, and that every change to a file is told."""

import json
import shutil
from pathlib import Path

import pytest
import xxhash

from cluster.lineage import Lineage, file_hash, files_of


def chain(folder: Path) -> Lineage:
    """A data set, and a model made of it."""
    for name, text in {"data/a.jsonl": "one", "model/weights": "two", "config.yaml": "x"}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    lineage = Lineage(folder / "lineage.json")
    lineage.record("data", (), None, (), (folder / "data",))
    lineage.record("chat", ("data",), folder / "config.yaml", (), (folder / "model",))
    return lineage


def test_entries_name_files_by_hash_and_parents_by_what_they_made(tmp_path: Path) -> None:
    chain(tmp_path)
    found = json.loads((tmp_path / "lineage.json").read_text())
    made = {"data/a.jsonl": xxhash.xxh3_128_hexdigest(b"one")}
    assert found["data"] == {"parents": {}, "config": {}, "data": {}, "made": made}
    chat = found["chat"]
    digest = xxhash.xxh3_128_hexdigest(json.dumps(made, sort_keys=True).encode())
    assert chat["parents"] == {"data": digest}
    assert chat["config"] == {"config.yaml": xxhash.xxh3_128_hexdigest(b"x")}
    assert chat["made"] == {"model/weights": xxhash.xxh3_128_hexdigest(b"two")}


def test_an_untouched_project_passes_also_where_it_was_moved(tmp_path: Path) -> None:
    chain(tmp_path / "here").check()
    shutil.move(tmp_path / "here", tmp_path / "there")
    moved = Lineage(tmp_path / "there" / "lineage.json")
    moved.check()
    assert list(moved.entries) == ["data", "chat"]


@pytest.mark.parametrize("text", ['{"data": {"mode": {}}}', "[1]", '{"data": ', '{"data": 3}'])
def test_a_damaged_file_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "lineage.json").write_text(text)
    with pytest.raises(ValueError, match=r"lineage\.json is no lineage file"):
        Lineage(tmp_path / "lineage.json")


@pytest.mark.parametrize(
    ("name", "owner"),
    [("data/a.jsonl", "data"), ("model/weights", "chat"), ("config.yaml", "chat")],
)
def test_a_changed_file_is_told_with_run_and_both_hashes(
    tmp_path: Path, name: str, owner: str
) -> None:
    lineage = chain(tmp_path)
    path = tmp_path / name
    before = file_hash(path)
    path.write_text(path.read_text() + "!")
    with pytest.raises(ValueError, match=f", of {owner}, was changed") as told:
        lineage.check()
    assert str(path) in str(told.value)
    assert before in str(told.value) and file_hash(path) in str(told.value)
    path.unlink()
    with pytest.raises(ValueError, match=f", of {owner}, is gone"):
        lineage.check()


def test_a_parent_that_was_entered_anew_no_longer_fits(tmp_path: Path) -> None:
    lineage = chain(tmp_path)
    (tmp_path / "data" / "a.jsonl").write_text("other")
    text = json.loads((tmp_path / "lineage.json").read_text())
    text["data"]["made"]["data/a.jsonl"] = file_hash(tmp_path / "data" / "a.jsonl")
    (tmp_path / "lineage.json").write_text(json.dumps(text))
    before = lineage.entries["chat"].parents["data"]
    with pytest.raises(ValueError, match=f"chat came from a data of hash {before}"):
        Lineage(tmp_path / "lineage.json").check()


def test_a_hash_of_many_blocks_is_that_of_the_whole(tmp_path: Path) -> None:
    whole = bytes(range(256)) * 40_000
    (tmp_path / "big").write_bytes(whole)
    assert file_hash(tmp_path / "big") == xxhash.xxh3_128_hexdigest(whole)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "small").write_bytes(b"")
    names = [file.name for file in files_of(tmp_path)]
    assert names == ["big", "small"]
