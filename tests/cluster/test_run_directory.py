"""Run directories: what survives a kill, what a rerun may change, and what resuming leaves."""

import logging
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cluster.run_directory import (
    RunDirectory,
    append_json,
    read_config,
    read_json_lines,
    truncate_json_lines,
    write_atomically,
)

CONFIG = {"seed": 1, "optimizer": {"learning_rate": 1e-5, "betas": (0.9, 0.95)}, "workers": 2}


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a\\b", ".hidden", "a b", "a\n", "x" * 101])
def test_a_name_that_is_no_folder_name_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="cannot be used"):
        RunDirectory(tmp_path, name)


def test_a_relative_root_means_the_same_folder_in_another_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = RunDirectory(Path("runs"), "a")
    run.open(CONFIG)
    sent = pickle.dumps(run)
    monkeypatch.chdir("/")
    received = pickle.loads(sent)
    assert received == run
    assert received.read_config()["seed"] == 1
    assert received.path == tmp_path / "runs" / "a"


def test_config_survives_yaml_and_the_same_config_continues(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path, "a")
    run.open(CONFIG | {"data": Path("x.jsonl")})
    assert run.read_config() == {
        "seed": 1,
        "optimizer": {"learning_rate": 1e-5, "betas": [0.9, 0.95]},
        "workers": 2,
        "data": "x.jsonl",
    }
    run.open(CONFIG | {"data": Path("x.jsonl")})
    run.open(read_config(run.config))


def test_another_config_is_refused_with_every_differing_field(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path, "a")
    run.open(CONFIG)
    other = {"seed": 2, "optimizer": {"learning_rate": 3e-5, "betas": [0.9, 0.95]}, "beta": 0.1}
    with pytest.raises(ValueError) as caught:
        run.open(other)
    message = str(caught.value)
    assert "seed (1 there, 2 now)" in message
    assert "optimizer.learning_rate (1e-05 there, 3e-05 now)" in message
    assert "workers (2 there, absent now)" in message
    assert "beta (absent there, 0.1 now)" in message
    assert "betas" not in message
    assert "\n" not in message
    assert run.read_config()["seed"] == 1, "a refused config must not replace the run's own"


def test_fields_that_may_change_do_and_cover_what_is_beneath_them(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path, "a")
    run.open({"seed": 1, "cluster": {"workers": 1, "port": 5}, "cluster_seed": 1})
    run.open({"seed": 1, "cluster": {"workers": 2}, "cluster_seed": 1}, may_change=["cluster"])
    assert run.read_config()["cluster"] == {"workers": 2}
    with pytest.raises(ValueError, match="cluster_seed"):
        run.open({"seed": 1, "cluster": {"workers": 2}, "cluster_seed": 2}, may_change=["cluster"])


def test_a_config_that_is_no_yaml_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("seed: 1\nname: [a\nb: 2\n")
    with pytest.raises(ValueError, match=r"config\.yaml, line 3"):
        read_config(path)
    path.write_text("just words\n")
    with pytest.raises(ValueError, match="field: value"):
        read_config(path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_config(tmp_path / "nothing.yaml")


def test_a_run_is_finished_when_it_says_so(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path, "a")
    run.open(CONFIG)
    assert not run.is_finished
    assert run.summary() is None
    run.finish({"gold": 0.5, "table": [{"metric": "gold", "before": 0.1}]})
    assert run.is_finished
    assert run.summary() == {"gold": 0.5, "table": [{"metric": "gold", "before": 0.1}]}


def test_an_atomic_write_that_fails_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "summary.json"
    write_atomically(path, "old")

    def full(descriptor: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, "new")
    assert path.read_text() == "old"


def test_texts_of_every_kind_come_back_as_they_were(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    texts = ["two\nlines", "line\u2028separator", "日本語 ✓", "lone \ud800 surrogate", 'a "\\" b']
    for step, text in enumerate(texts):
        append_json(path, {"step": step, "text": text})
    assert [line["text"] for line in read_json_lines(path)] == texts
    assert path.read_bytes().count(b"\n") == len(texts)


def test_a_killed_writer_leaves_a_torn_line_that_is_left_out_and_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 0, "loss": 2.5}\n{"step": 1, "text": "\xe6\x97')
    with caplog.at_level(logging.WARNING):
        assert read_json_lines(path) == [{"step": 0, "loss": 2.5}]
    assert f"{path}, line 2 is torn" in caplog.text


def test_a_damaged_line_before_the_last_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n{"step": 1, "lo{"step": 2}\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2 is not JSON"):
        read_json_lines(path)
    path.write_text('{"step": 0}\n[1]\n')
    with pytest.raises(ValueError, match=r"line 2 is not a JSON object"):
        read_json_lines(path)


def test_resuming_cuts_later_steps_and_the_torn_line(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path, "a")
    run.open(CONFIG)
    for step in range(5):
        append_json(run.metrics, {"step": step, "loss": float("nan") if step == 1 else step})
        append_json(run.samples, {"step": step, "answer": "a"})
        append_json(run.samples, {"step": step, "answer": "b"})
    with run.metrics.open("ab") as file:
        file.write(b'{"step": 5, "lo')
    run.resume_at(3)
    append_json(run.metrics, {"step": 3, "loss": 30})
    lines = read_json_lines(run.metrics)
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    assert lines[3]["loss"] == 30
    assert lines[1]["loss"] != lines[1]["loss"], "NaN is kept"
    assert [line["step"] for line in read_json_lines(run.samples)] == [0, 0, 1, 1, 2, 2]


def test_truncating_by_any_rule(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    for value in range(6):
        append_json(path, {"value": value})
    truncate_json_lines(path, lambda line: line["value"] % 2 == 0)
    assert [line["value"] for line in read_json_lines(path)] == [0, 2, 4]
    assert [file.name for file in tmp_path.iterdir()] == ["lines.jsonl"]


def test_lines_written_before_a_real_kill_are_all_readable(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    program = (
        "import itertools, sys; from pathlib import Path\n"
        "from cluster.run_directory import append_json\n"
        "for step in itertools.count():\n"
        "    append_json(Path(sys.argv[1]), {'step': step, 'text': 'x' * 2000})\n"
    )
    repository = Path(__file__).parents[2]
    process = subprocess.Popen([sys.executable, "-c", program, str(path)], cwd=repository)
    deadline = time.monotonic() + 30
    while not (path.exists() and path.stat().st_size > 50_000):
        assert time.monotonic() < deadline, "the writer did not write"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    lines = read_json_lines(path)
    assert len(lines) >= 20
    assert [line["step"] for line in lines] == list(range(len(lines)))


def test_a_run_is_open_in_one_process_at_a_time(tmp_path: Path) -> None:
    """Until it ends, however it does; the same process may open it again."""
    run = RunDirectory(tmp_path, "mine")
    code = """
import sys, time
from pathlib import Path
from cluster.run_directory import RunDirectory
RunDirectory(Path(sys.argv[1]), "mine").open({})
print("open", flush=True)
time.sleep(60)
"""
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None and other.stdout.readline() == "open\n"
        with pytest.raises(ValueError, match="Run 'mine' is under way in another process; wait"):
            run.open({})
        other.kill()
    run.open({})
    run.open({})
    shutil.rmtree(run.path)
    run.open({})
    assert (run.path / ".lock").is_file()
