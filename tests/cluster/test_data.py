"""Tasks are done once, and what goes wrong in one is told in its own words."""

import errno
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster import data
from cluster.data import full_disk_named, run_once


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray Data itself is used in tests/jobs/test_prepare_killed.py."""

    def run(step: Any, count: int, cpus: float) -> Iterator[str]:
        for number in range(count):
            yield step({"id": number})["error"]

    monkeypatch.setattr(data, "_run", run)


def test_only_unfinished_tasks_run(tmp_path: Path) -> None:
    done: list[int] = []

    def square(number: int) -> dict[str, int]:
        if number == 3 and len(done) == 3:
            raise KeyError("a defect of the program")
        done.append(number)
        return {"square": number * number}

    with pytest.raises(KeyError):
        run_once(tmp_path / "squares", range(5), square)
    assert done == [0, 1, 2]
    done.append(-1)
    expected = [{"square": n * n} for n in range(5)]
    assert run_once(tmp_path / "squares", range(5), square) == expected
    assert done == [0, 1, 2, -1, 3, 4]
    assert run_once(tmp_path / "squares", range(5), square) == expected
    assert len(done) == 6
    assert json.loads((tmp_path / "squares" / "000004.json").read_text()) == {"square": 16}


def test_a_users_error_is_told_as_it_is(tmp_path: Path) -> None:
    def refuse(number: int) -> dict[str, int]:
        if number == 2:
            raise ValueError("data.jsonl line 7 is not valid JSON; correct it.")
        return {}

    with pytest.raises(ValueError, match=r"^data\.jsonl line 7 is not valid JSON; correct it\.$"):
        run_once(tmp_path / "step", range(4), refuse)
    assert sorted(file.name for file in (tmp_path / "step").iterdir()) == [
        "000000.json",
        "000001.json",
    ]


def test_a_full_disk_is_named_and_finished_tasks_stay(tmp_path: Path) -> None:
    written = tmp_path / "written"
    written.mkdir()
    disk = [Path("/dev/full")]  # where the kernel says "no space left" to whoever writes

    def write(number: int) -> dict[str, int]:
        path = disk[0] if number == 1 and disk else written / str(number)
        with path.open("wb") as file:
            file.write(bytes(100_000))
        return {"bytes": 100_000}

    with pytest.raises(ValueError, match="is full; make room and run the same command") as caught:
        run_once(tmp_path / "step", range(3), write)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert [file.name for file in (tmp_path / "step").iterdir()] == ["000000.json"]
    disk.clear()
    assert len(run_once(tmp_path / "step", range(3), write)) == 3


def test_other_errors_of_the_system_pass_through(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="interrupted") as caught, full_disk_named(tmp_path):
        raise OSError(errno.EINTR, "interrupted")
    assert not isinstance(caught.value, ValueError)
