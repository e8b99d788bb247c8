"""The files of a checkpoint, by themselves."""

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch

from cluster import checkpoint_files as files
from cluster.checkpoints import Checkpoints


def test_tensors_are_what_the_safetensors_library_reads(tmp_path: Path) -> None:
    tensors = {"a/0/weight": torch.randn(7), "é/12/exp_avg": torch.randn(1)}
    path = tmp_path / "a.safetensors"
    file = files.write_tensors(path, tensors)
    files.check_file(path, file)
    assert file.bytes == path.stat().st_size
    read = safetensors.torch.load_file(path)
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[key], tensors[key]) for key in tensors)
    files.write_tensors(path, {})
    assert safetensors.torch.load_file(path) == {}


def test_json_comes_back_as_written(tmp_path: Path) -> None:
    value = {"b": [1, 2.5, None, "é"], "a": {10: 1e-7, 9: float("inf")}}
    files.write_json(tmp_path / "a.json", value)
    read = files.read_json(tmp_path / "a.json")
    assert read == {"b": [1, 2.5, None, "é"], "a": {"10": 1e-7, "9": float("inf")}}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    content = json.loads((tmp_path / "a.json").read_text())
    (tmp_path / "a.json").write_text(json.dumps({**content, "b": [1]}))
    with pytest.raises(files.DamagedError, match="does not match its checksum"):
        files.read_json(tmp_path / "a.json")


def test_at_least_one_is_kept(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="keep_last is 0"):
        Checkpoints(tmp_path, {}, keep_last=0)


def test_what_a_dead_attempt_left_is_tidied_up(tmp_path: Path) -> None:
    def checkpoint(name: str, content: str) -> None:
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(content)

    checkpoint("step_00000001.abc.part", "half written")
    checkpoint("step_00000002.replaced", "its successor has no name yet")
    checkpoint("step_00000003.replaced", "its successor is there")
    checkpoint("step_00000003", "successor")
    (tmp_path / ".failure.json.7.part").write_text("no checkpoint at all")
    files.remove_unfinished(tmp_path)
    left = {path.name: path for path in tmp_path.iterdir() if path.is_dir()}
    assert sorted(left) == ["step_00000002", "step_00000003"]
    assert (left["step_00000002"] / "file").read_text() == "its successor has no name yet"
    assert (left["step_00000003"] / "file").read_text() == "successor"


def test_a_file_that_cannot_be_read_is_not_taken_for_damaged(tmp_path: Path) -> None:
    """A folder in its place stands for a file system's passing error."""
    wanted = files.write_tensors(tmp_path / "a.safetensors", {})
    (tmp_path / "b.safetensors").mkdir()
    with pytest.raises(ValueError, match=r"cannot be read .* mend the file system") as caught:
        files.check_file(tmp_path / "b.safetensors", wanted)
    assert not isinstance(caught.value, files.DamagedError)
    with pytest.raises(files.DamagedError, match="is missing"):
        files.check_file(tmp_path / "c.safetensors", wanted)
