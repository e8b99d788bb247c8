"""Preparation on Ray: killed with SIGKILL it goes on where it was, and ends with the same bytes on
any number of CPUs."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import ray

from cluster.data import Json, run_once
from cluster.run_directory import RunDirectory
from cluster.session import ClusterConfig, session
from jobs import cli, prepare
from jobs.prepare_config import PrepareConfig
from jobs.presets import preset
from tests.corpora import write_corpus

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with session(ClusterConfig(local_cpus=2)):
        yield ray.get_runtime_context().gcs_address


def tree(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "config.yaml"
    }


def start(config: PrepareConfig, file: Path, address: str) -> "subprocess.Popen[bytes]":
    """The job as a process of its own."""
    file.write_text(cli.shown(config))
    command = [sys.executable, "jobs/prepare.py", "--config", str(file)]
    return subprocess.Popen([*command, "--cluster.address", address], cwd=ROOT)


def test_a_killed_driver(address: str, tmp_path: Path) -> None:
    config = replace(
        preset("tiny").prepare, runs=tmp_path, name="whole", vocab_size=400, part_bytes=60_000,
        shard_tokens=100_000, mix={"wiki": 1.0, "web": 1.0},
        text=(
            write_corpus(tmp_path / "wiki.jsonl", 300_000, seed=1),
            write_corpus(tmp_path / "web.jsonl", 600_000, seed=2),
        ),
    )  # fmt: skip
    prepare.main(config)
    killed = replace(config, name="killed")
    results = tmp_path / "killed" / "work" / "results" / "clean"
    process = start(killed, tmp_path / "killed.yaml", address)
    try:
        deadline = time.monotonic() + 120
        while not any(results.glob("0*.json")):
            assert process.poll() is None, "it ended by itself"
            assert time.monotonic() < deadline, "the first part takes too long"
            time.sleep(0.02)
    finally:
        process.kill()
        process.wait()
    assert not RunDirectory(tmp_path, "killed").is_finished
    assert len(list(results.glob("0*.json"))) < 15  # of 16
    prepare.main(replace(killed, cpus=2.0))  # one task at a time
    assert tree(tmp_path / "killed") == tree(tmp_path / "whole")
    assert len(tree(tmp_path / "killed")) > 10


def die_once(folder: Path) -> Json:
    """A task whose worker is killed in the middle of it."""
    tried = folder / f"tried-{folder.name}"
    if not tried.exists():
        tried.write_text("")
        os.kill(os.getpid(), signal.SIGKILL)
    return {"folder": folder.name}


def refuse(folder: Path) -> Json:
    raise ValueError(f"{folder} line 7 is not valid JSON; correct that line.")


def test_a_killed_worker(address: str, tmp_path: Path) -> None:
    assert run_once(tmp_path / "step", [tmp_path], die_once) == [{"folder": tmp_path.name}]


def test_an_error_in_a_worker_is_one_sentence(address: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="line 7 is not valid JSON; correct that line") as caught:
        run_once(tmp_path / "step", [tmp_path], refuse)
    assert str(caught.value).startswith(str(tmp_path))
    assert "\n" not in str(caught.value)
