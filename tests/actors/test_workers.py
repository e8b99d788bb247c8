"""The training loop on two workers does what it does on one, however rows are dealt."""

import os
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
import torch.multiprocessing

from actors import trainer
from actors.steps import BadBatch, MicroBatches, update
from actors.trainer import Trainer, TrainTask, train
from cluster.engine import EngineConfig
from cluster.run_directory import read_json_lines
from llama2 import checkpoint
from llama2.packing import sample_order
from llama2.sequence_parallel import SequenceParallel
from tests.actors.small_tasks import Steep, poisoned, reward_task, task


def tasks(root: Path, world: int) -> dict[str, TrainTask]:
    """What is run by one and by two workers; the ZeRO stage and all sizes differ between them."""
    one = world == 1
    second = EngineConfig(zero_stage=2 if one else 3)
    whole_or_single = MicroBatches(10_000 if one else 1)
    return {
        # Five rows are shared by two workers as three and two.
        "pretrain": task(root, f"pretrain-{world}", micro_batches=whole_or_single),
        "sft": task(
            root, f"sft-{world}", stage="sft", start=root / "start", engine=second,
            data=root / "chat" / "train", heldout=root / "chat" / "heldout",
            micro_batches=MicroBatches(30 if one else 60),
        ),
        "reward": reward_task(root, f"reward-{world}", engine=second),
        # Two workers share the tokens of every row.
        "long": task(
            root, f"long-{world}", engine=second, activation_checkpointing=not one,
            micro_batches=MicroBatches(30, sequence_parallel=world),
        ),
        "long-reward": reward_task(
            root, f"long-reward-{world}", micro_batches=MicroBatches(50, sequence_parallel=world)
        ),
    }  # fmt: skip


def stop(found: TrainTask, step: int) -> None:
    """Train until just before the update of `step`, and no further."""
    attempt = Trainer(replace(found, patience=0))
    whole = trainer.sample_order

    def order(now: int, *others: int) -> list[int]:
        if now == step:
            raise InterruptedError
        return whole(now, *others)

    trainer.sample_order = order
    try:
        attempt.run()
    except InterruptedError:
        attempt.checkpoints.close()
        attempt.engine.close()
    finally:
        trainer.sample_order = whole


def worker(rank: int, port: int, root: Path) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": str(rank)}
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "WANDB_MODE": "disabled"}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    for found in tasks(root, 2).values():
        train(found)
    stop(task(root, "moved"), 5)
    bad = poisoned(root, "bad", set(sample_order(1, 5, 24, 0)[1:3]))
    said = ""
    try:
        train(replace(bad, micro_batches=MicroBatches(1)))
    except FloatingPointError as error:
        said = str(error)
    (root / f"said-{rank}").write_text(said)
    steep = Trainer(task(root, "steep", engine=EngineConfig(zero_stage=3)))
    try:
        update(
            steep.engine, Steep(steep.shards, SequenceParallel()), [3, 7, 1, 0, 2], MicroBatches(1)
        )
    except BadBatch as error:
        (root / f"steep-{rank}").write_text(str(error))
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, group_of_one: None) -> Path:
    """Where two workers have run everything, and one what is to be compared."""
    root = tmp_path_factory.mktemp("workers")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "disabled")
        for found in tasks(root, 1).values():
            train(found)
        poisoned(root, "made", set(sample_order(1, 5, 24, 0)[1:3]))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        torch.multiprocessing.spawn(worker, (port, root), nprocs=2)
        train(task(root, "moved", engine=EngineConfig(zero_stage=2)))
    return root


def metrics(root: Path, name: str) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for line in read_json_lines(task(root, name).run.metrics):
        for key, value in line.items():
            if key != "targets_per_second":
                found.setdefault(key, []).append(value)
    return found


def same(one: Any, two: Any) -> None:
    assert one.keys() == two.keys()
    assert {"loss", "grad_norm", "eval/loss"} <= one.keys()
    for name, values in one.items():
        assert values == pytest.approx(two[name], rel=2e-5, abs=2e-6), name


@pytest.mark.parametrize("name", ["pretrain", "sft", "reward", "long", "long-reward"])
def test_two_workers_give_the_losses_of_one(root: Path, name: str) -> None:
    same(metrics(root, f"{name}-1"), metrics(root, f"{name}-2"))


def test_one_worker_goes_on_from_the_state_of_two(root: Path) -> None:
    found = metrics(root, "moved")
    assert found["step"] == list(range(9))
    same(found, metrics(root, "pretrain-1"))
    model = checkpoint.load(task(root, "pretrain-1").run.model).state_dict()
    for name, tensor in checkpoint.load(task(root, "moved").run.model).state_dict().items():
        torch.testing.assert_close(tensor, model[name], atol=1e-4, rtol=0)


def test_all_workers_name_the_rows_of_all(root: Path) -> None:
    """The two bad rows of step 1 lie on different workers."""
    first, second = sorted(sample_order(1, 5, 24, 0)[1:3])
    said = [(root / f"said-{rank}").read_text() for rank in (0, 1)]
    assert said[0] == said[1]
    assert f"the loss is nan at step 1, in rows {first}, {second} of" in said[0]
    said = [(root / f"steep-{rank}").read_text() for rank in (0, 1)]
    assert said == ["the gradient's norm is inf, in row 7"] * 2
