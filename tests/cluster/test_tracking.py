"""The tracker's three outputs, read back from where a user would read them."""

import io
import json
import logging
import math
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import wandb
from wandb.proto import wandb_internal_pb2

from cluster.run_directory import RunDirectory, append_json, read_json_lines
from cluster.tracking import Console, Tracker, format_number


@pytest.fixture(autouse=True)
def _no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    directory = RunDirectory(tmp_path, "demo")
    directory.open({"seed": 7, "optimizer": {"learning_rate": 1e-3}})
    return directory


def _records(path: Path) -> Iterator[Any]:
    """The protobuf records of a `.wandb` file: LevelDB's log format after seven bytes of header."""
    data, place, record = path.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        record += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a whole record, or the last piece of one
            yield wandb_internal_pb2.Record.FromString(record)
            record = b""


def _history(path: Path) -> list[dict[str, Any]]:
    return [
        {
            item.key or "/".join(item.nested_key): json.loads(item.value_json)
            for item in record.history.item
        }
        for record in _records(path)
        if record.HasField("history")
    ]


def test_offline_wandb_files_hold_the_run_and_a_second_start_continues_it(
    run: RunDirectory,
) -> None:
    with Tracker(run, "sft", 4, project="test-project") as tracker:
        tracker.log(0, {"loss": 2.5})
        tracker.log(1, {"loss": 1.5, "eval/gold": 0.25})
        tracker.log_samples(1, [{"prompt": "2+2", "score": 1}, {"prompt": "3", "score": "none"}])
        tracker.log(2, {"loss": 9.0})
    with Tracker(run, "sft", 4, project="test-project", first_step=2) as tracker:
        tracker.log(2, {"loss": 1.25})
        tracker.log(3, {"loss": math.nan})
    wandb.teardown()  # W&B's own process writes the last of a run just after `finish` returns
    # Both start within a second at times, so the folders' names do not give their order.
    files = sorted(run.path.glob("wandb/offline-run-*/*.wandb"), key=os.path.getmtime)
    assert len(files) == 2
    starts = [next(r.run for r in _records(file) if r.HasField("run")) for file in files]
    assert starts[0].run_id == starts[1].run_id
    assert starts[0].run_id.startswith("demo-")
    assert {start.project for start in starts} == {"test-project"}
    config = {item.key: item.value_json for item in starts[0].config.update}
    assert config["seed"] == "7"
    first, second = (_history(file) for file in files)
    assert [(line["_step"], line["loss"]) for line in first] == [
        (0, 2.5),
        (1, 1.5),
        (2, 9.0),
    ]
    assert first[1]["eval/gold"] == 0.25
    assert first[1]["samples/nrows"] == 2
    assert [line["_step"] for line in second] == [2, 3]
    assert second[0]["loss"] == 1.25

    lines = read_json_lines(run.metrics)
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    assert [line["loss"] for line in lines[:3]] == [2.5, 1.5, 1.25]
    assert math.isnan(lines[3]["loss"])
    assert read_json_lines(run.samples) == [
        {"step": 1, "prompt": "2+2", "score": 1},
        {"step": 1, "prompt": "3", "score": "none"},
    ]


def test_a_run_begun_anew_under_an_old_name_gets_another_chart(tmp_path: Path) -> None:
    ids = set()
    for root in (tmp_path / "a", tmp_path / "b"):
        run = RunDirectory(root, "demo")
        run.open({})
        with Tracker(run, "sft", 1, project="p"):
            pass
        ids.add((run.path / "wandb" / "id.txt").read_text())
    assert len(ids) == 2


@pytest.mark.parametrize(
    ("environment", "mode"),
    [
        ({}, "offline"),
        ({"WANDB_API_KEY": "k"}, "online"),
        ({"WANDB_API_KEY": "k", "WANDB_MODE": "offline"}, "offline"),
        ({"WANDB_MODE": "disabled"}, "disabled"),
    ],
)
def test_wandb_mode_follows_the_environment(
    run: RunDirectory,
    monkeypatch: pytest.MonkeyPatch,
    environment: dict[str, str],
    mode: str,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    asked: list[str] = []

    def start(**arguments: Any) -> None:
        asked.append(arguments["mode"])

    monkeypatch.setattr(wandb, "init", start)
    Tracker(run, "sft", 1, project="p").finish()
    assert asked == [mode]


def test_when_wandb_cannot_start_it_is_told_once_and_the_run_goes_on(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_MODE", "nonsense")
    with (
        caplog.at_level(logging.WARNING),
        Tracker(run, "sft", 2, project="p") as tracker,
    ):
        tracker.log(0, {"loss": 1.0})
        tracker.log(1, {"loss": 0.5})
    assert [line["loss"] for line in read_json_lines(run.metrics)] == [1.0, 0.5]
    told = [r.getMessage() for r in caplog.records if r.name == "cluster.tracking"]
    assert len(told) == 1
    assert "W&B failed while starting (ValidationError" in told[0]
    assert str(run.metrics) in told[0]


def test_when_wandb_fails_midway_it_is_told_once_and_the_run_goes_on(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*arguments: Any, **keywords: Any) -> None:
        raise ConnectionError("service died")

    with (
        caplog.at_level(logging.WARNING),
        Tracker(run, "sft", 3, project="p") as tracker,
    ):
        tracker.log(0, {"loss": 1.0})
        monkeypatch.setattr(wandb.Run, "log", broken)
        tracker.log(1, {"loss": 0.5})
        tracker.log(2, {"loss": 0.25})
    assert len(read_json_lines(run.metrics)) == 3
    told = [r.getMessage() for r in caplog.records if r.name == "cluster.tracking"]
    assert len(told) == 1
    assert "logging step 1 (ConnectionError: service died)" in told[0]


def test_a_step_is_logged_once_and_after_the_ones_before_it(run: RunDirectory) -> None:
    append_json(run.metrics, {"step": 0, "loss": 1.0})
    append_json(run.metrics, {"step": 1, "loss": 1.0})
    with Tracker(run, "sft", 3, project="p", first_step=1) as tracker:
        tracker.log(1, {"loss": 0.5})
        with pytest.raises(AssertionError):
            tracker.log(1, {"loss": 0.4})
        with pytest.raises(AssertionError):
            tracker.log(2, {"step": 2})
    assert [line["loss"] for line in read_json_lines(run.metrics)] == [1.0, 0.5]


class _Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_console_prints_a_line_at_most_every_interval_and_always_the_last() -> None:
    clock, stream = _Clock(), io.StringIO()
    console = Console("sft", 10, interval=2.0, stream=stream, clock=clock)
    for step in range(10):
        clock.now += 0.75
        console.update(step, {"loss": 2.0 / (step + 1), "time/tokens_per_second": 12345.6})
    console.close()
    # Done at 0.75, 3.0 (2.25 later), 5.25 and, being the last, 7.5 seconds.
    assert stream.getvalue().splitlines() == [
        "sft  [##..................] 1/10  loss 2  12.35k tokens/s  eta 0:07",
        "sft  [########............] 4/10  loss 0.5  12.35k tokens/s  eta 0:04",
        "sft  [##############......] 7/10  loss 0.2857  12.35k tokens/s  eta 0:02",
        "sft  [####################] 10/10  loss 0.2  12.35k tokens/s  eta 0:00",
    ]


def test_console_reckons_the_time_left_from_the_resumed_step() -> None:
    clock, stream = _Clock(), io.StringIO()
    console = Console("ppo", 400, first_step=100, stream=stream, clock=clock)
    clock.now += 40.0  # two steps in 40 s, 298 to go: 5960 s
    console.update(101, {"learning_rate": 0.003})
    assert (
        stream.getvalue()
        == "ppo  [#####...............] 102/400  learning_rate 3e-3  eta 1:39:20\n"
    )


def test_console_shows_a_line_held_back_when_the_stage_ends_early() -> None:
    clock, stream = _Clock(), io.StringIO()
    console = Console("sft", 10, stream=stream, clock=clock)
    console.update(0, {})
    console.update(1, {})
    assert stream.getvalue().count("\n") == 1
    console.close()
    assert "2/10" in stream.getvalue().splitlines()[1]


def test_console_draws_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    class Screen(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm")
    stream = Screen()
    console = Console("sft", 4, stream=stream)
    for step in range(4):
        console.update(step, {"loss": 0.5})
    console.close()
    assert "4/4" in stream.getvalue()
    assert "loss 0.5" in stream.getvalue()
    assert "━" in stream.getvalue()


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (2.31, "2.31"),
        (-2.31049, "-2.31"),
        (0.25, "0.25"),
        (0.003, "3e-3"),
        (1.23456e-5, "1.235e-5"),
        (0.0099999, "0.01"),
        (400, "400"),
        (9999.4, "9999"),
        (9999.7, "10k"),
        (12346, "12.35k"),
        (999999, "1M"),
        (6_738_415_616, "6.738B"),
        (float("nan"), "nan"),
        (float("-inf"), "-inf"),
    ],
)
def test_numbers_have_four_significant_digits(value: float, text: str) -> None:
    assert format_number(value) == text
