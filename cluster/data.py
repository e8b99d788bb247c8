"""Ray Data: many tasks, each done once even if the whole is killed and started again.

A task writes what it makes to disk itself and returns statistics, which land in a file of its own
when it is finished. A later call runs those tasks only that have no such file. So nothing large
passes through the driver, and what is finished stays finished.
"""

import errno
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Generic, TypeVar

import ray.data

from cluster.run_directory import write_atomically

Json = dict[str, Any]
Task = TypeVar("Task")

# What a user can mend, and is told in a sentence instead of a worker's traceback.
USER_ERRORS = (ValueError, FileNotFoundError, PermissionError)
FULL = (errno.ENOSPC, errno.EDQUOT)


def run_once(
    folder: Path, tasks: Sequence[Task], work: Callable[[Task], Json], cpus: float = 1.0
) -> list[Json]:
    """`work(task)` of every task, in order, run by the cluster's workers.

    `folder` keeps the results, so the same tasks have to be given to it each time. Raises
    `ValueError` with the sentence of a task that raised `ValueError`, a file error, or met a full
    disk; the other tasks' results are kept.
    """
    folder.mkdir(parents=True, exist_ok=True)
    waiting = [number for number in range(len(tasks)) if not _result(folder, number).is_file()]
    if waiting:
        for error in _run(_Step(folder, waiting, tasks, work), len(waiting), cpus):
            if error:
                raise ValueError(error)
    return [json.loads(_result(folder, number).read_text()) for number in range(len(tasks))]


@contextmanager
def full_disk_named(folder: Path) -> Iterator[None]:
    """Turn the error of a full disk inside the block into a `ValueError` that names `folder`."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise ValueError(
            f"The disk that holds {error.filename or folder} is full; make room and run the same "
            "command again: what is finished is kept."
        ) from error


class _Step(Generic[Task]):
    """Runs the waiting task of a row's number and keeps its result; returns what went wrong."""

    def __init__(
        self,
        folder: Path,
        waiting: Sequence[int],
        tasks: Sequence[Task],
        work: Callable[[Task], Json],
    ) -> None:
        self._folder, self._waiting, self._tasks, self._work = folder, waiting, tasks, work

    def __call__(self, row: Json) -> dict[str, str]:
        number = self._waiting[int(row["id"])]
        try:
            with full_disk_named(self._folder.parent):
                result = self._work(self._tasks[number])
                write_atomically(_result(self._folder, number), json.dumps(result))
        except USER_ERRORS as error:
            return {"error": str(error)}
        return {"error": ""}


def _run(step: _Step[Any], count: int, cpus: float) -> Iterator[str]:
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    context = ray.data.DataContext.get_current().copy()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    with ray.data.DataContext.current(context):
        numbers = ray.data.range(count, override_num_blocks=count)
        for row in numbers.map(step, num_cpus=cpus).iter_rows():
            yield row["error"]


def _result(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.json"
