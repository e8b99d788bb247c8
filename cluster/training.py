"""Ray Train: a group of workers that runs one loop, checkpoints together and is restarted
together."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import ray.train
import torch
import torch.distributed
from ray.exceptions import ActorDiedError
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from cluster.placement import Workers
from cluster.run_directory import RunDirectory

Task = TypeVar("Task")


class WorkersFailed(RuntimeError):
    """The group failed more often than it may; the cause follows."""


def run_workers(
    loop: Callable[[Task], None],
    task: Task,
    workers: Workers,
    run: RunDirectory,
    max_failures: int = 3,
    keep_checkpoints: int = 2,
) -> None:
    """Run `loop(task)` on every worker until all return.

    Where one dies, all are started again and find the newest checkpoint through `resume`. State
    goes to `run.checkpoints`; a later call with the same folder continues there. Raises
    `WorkersFailed` after `max_failures` restarts.
    """
    trainer = TorchTrainer(
        _Loop(loop, task, workers.threads),
        scaling_config=ScalingConfig(
            num_workers=workers.count,
            use_gpu=workers.gpus > 0,
            resources_per_worker=_resources(workers),
        ),
        torch_config=TorchConfig(backend="nccl" if workers.gpus > 0 else "gloo"),
        run_config=RunConfig(
            name=run.checkpoints.name,
            storage_path=str(run.path),
            failure_config=FailureConfig(max_failures=max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=keep_checkpoints),
        ),
    )
    try:
        trainer.fit()
    except (ray.train.TrainingFailedError, ActorDiedError) as error:
        raise WorkersFailed(f"{run.name}: the workers failed: {error}") from error


def _resources(workers: Workers) -> dict[str, float]:
    amounts = {"CPU": workers.cpus, "GPU": workers.gpus}
    return {name: amount for name, amount in amounts.items() if amount}


class _Loop:
    def __init__(self, loop: Callable[[Any], None], task: Any, threads: int) -> None:
        self.loop, self.task, self.threads = loop, task, threads
        self.__name__ = getattr(loop, "__name__", "loop")

    def __call__(self) -> None:
        torch.set_num_threads(self.threads)
        self.loop(self.task)


def rank() -> int:
    """This worker's number, from 0."""
    return int(ray.train.get_context().get_world_rank())


def world_size() -> int:
    """How many workers the group has."""
    return int(ray.train.get_context().get_world_size())


def all_reduce(values: torch.Tensor) -> torch.Tensor:
    """The sum of `values` over the group's workers (collective)."""
    torch.distributed.all_reduce(values)
    return values


@contextmanager
def resume() -> Iterator[Path | None]:
    """The folder of the newest checkpoint, None at the very start."""
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        yield None
    else:
        with checkpoint.as_directory() as folder:
            yield Path(folder)


def save(write: Callable[[Path], None], step: int, metrics: dict[str, Any]) -> None:
    """Write a checkpoint: `write(folder)` runs on every worker; their files become one folder.

    A checkpoint counts once all workers have written theirs (collective).
    """
    with tempfile.TemporaryDirectory(prefix="checkpoint-") as folder:
        write(Path(folder))
        ray.train.report(
            metrics,
            checkpoint=Checkpoint.from_directory(folder),
            checkpoint_dir_name=f"step_{step:08d}",
        )
