"""Ray Train: a group of workers that runs one loop and is restarted together.

What a loop needs of its group (`rank`, `all_reduce` and so on) comes from torch.distributed, so
that it also runs in any other process group.
"""

import json
import logging
import math
import random
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import ray.train
import torch
import torch.distributed
from ray.exceptions import ActorDiedError, RayTaskError
from ray.train import FailureConfig, RunConfig, ScalingConfig, UserCallback
from ray.train.torch import TorchConfig, TorchTrainer

from cluster.data import full_disk_named
from cluster.placement import Workers
from cluster.run_directory import RunDirectory, write_atomically

logger = logging.getLogger(__name__)

Task = TypeVar("Task")

# Errors that another attempt would meet again; the most special ones first.
FINAL_ERRORS: dict[str, type[Exception]] = {
    "FloatingPointError": FloatingPointError,
    "FileNotFoundError": FileNotFoundError,
    "ValueError": ValueError,
}


class WorkersFailed(RuntimeError):
    """The group failed more often than it may; the cause follows."""


def run_workers(
    loop: Callable[[Task], None],
    task: Task,
    workers: Workers,
    run: RunDirectory,
    max_failures: int = 3,
    timeout: float = 1800.0,
) -> None:
    """Run `loop(task)` on every worker until all return.

    timeout: seconds that workers wait for each other in a collective call.

    Where a worker dies, the log names it and all are started again, up to `max_failures` times;
    going on from what was saved is the loop's own part. Then raises `WorkersFailed`. A
    `ValueError`, `FileNotFoundError` or `FloatingPointError` of the loop is raised here, with its
    sentence, and not tried again.
    """
    failure = run.checkpoints / "failure.json"
    failure.unlink(missing_ok=True)
    trainer = TorchTrainer(
        _Loop(loop, task, workers.threads, failure),
        scaling_config=ScalingConfig(
            num_workers=workers.count,
            use_gpu=workers.gpus > 0,
            resources_per_worker=_resources(workers),
        ),
        torch_config=TorchConfig(
            backend="nccl" if workers.gpus > 0 else "gloo", timeout_s=math.ceil(timeout)
        ),
        run_config=RunConfig(
            name=run.checkpoints.name,
            storage_path=str(run.path),
            failure_config=FailureConfig(max_failures=max_failures),
            callbacks=[_Obituary(run.name)],
        ),
    )
    try:
        trainer.fit()
    except (ray.train.TrainingFailedError, ActorDiedError) as error:
        if not failure.exists():
            raise WorkersFailed(f"{run.name}: the workers failed: {error}") from error
    if failure.exists():
        found = json.loads(failure.read_text("utf-8"))
        raise FINAL_ERRORS[found["error"]](found["sentence"])


def _resources(workers: Workers) -> dict[str, float]:
    amounts = {"CPU": workers.cpus, "GPU": workers.gpus}
    return {name: amount for name, amount in amounts.items() if amount}


class _Loop:
    """The loop on one worker. Ray Train starts a group again after any error, so one that would
    come again is written down for the next attempt, which then ends at once."""

    def __init__(self, loop: Callable[[Any], None], task: Any, threads: int, failure: Path) -> None:
        self.loop, self.task, self.threads, self.failure = loop, task, threads, failure
        self.__name__ = getattr(loop, "__name__", "loop")

    def __call__(self) -> None:
        if self.failure.exists():
            return
        torch.set_num_threads(self.threads)
        try:
            with full_disk_named(self.failure.parent):
                self.loop(self.task)
        except tuple(FINAL_ERRORS.values()) as error:
            if not self.failure.exists():
                kind = next(name for name, kind in FINAL_ERRORS.items() if isinstance(error, kind))
                record = {"error": kind, "sentence": str(_original(error))}
                write_atomically(self.failure, json.dumps(record, ensure_ascii=False))
            raise


def _original(error: BaseException) -> BaseException:
    """The error itself of one that another process raised, whose text is that of its trace."""
    while isinstance(error, RayTaskError) and isinstance(error.cause, BaseException):
        error = error.cause
    return error


class _Obituary(UserCallback):
    """Names in the log the workers that a group lost."""

    def __init__(self, run: str) -> None:
        self.run = run

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Called by Ray Train's controller, which restarts the group afterwards."""
        for rank_, error in worker_exceptions.items():
            # A dead worker is found by its health check, whose cause names actor, process and node.
            cause = getattr(error, "health_check_failure", error)
            told = textwrap.shorten(str(cause), 400)
            logger.warning(
                "%s: worker %d failed: %s: %s", self.run, rank_, type(cause).__name__, told
            )


def rank() -> int:
    """This worker's number, from 0."""
    return torch.distributed.get_rank()


def world_size() -> int:
    """How many workers the group has."""
    return torch.distributed.get_world_size()


def all_reduce(values: torch.Tensor) -> torch.Tensor:
    """The sum of `values` over the group's workers, in place (collective)."""
    if torch.distributed.get_backend() == "nccl" and not values.is_cuda:
        summed = values.cuda()
        torch.distributed.all_reduce(summed)
        return values.copy_(summed)
    torch.distributed.all_reduce(values)
    return values


def seed_step(seed: int, step: int) -> None:
    """Make all random numbers of a step a function of (seed, step, rank), so that no state of a
    generator needs saving."""
    words = np.random.SeedSequence((seed, step, rank())).generate_state(2)
    torch.manual_seed(int(words[0]) << 32 | int(words[1]))
    np.random.seed(words[0])
    random.seed(int(words[0]))
