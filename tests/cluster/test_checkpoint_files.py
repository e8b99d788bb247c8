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
