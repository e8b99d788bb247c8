"""What Ray Train, DeepSpeed and the trainer cost beside a bare loop of the same mathematics.

python -m tests.benchmarks.loop

Both run in one Ray Train worker and take turns, step by step, on the same prepared rows. The bare
loop packs the rows, calls the model, and updates float32 copies of the weights with clipping and a
fused AdamW; the trainer also measures, checks, and records its metrics.
"""

import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from actors.steps import MicroBatches
from actors.trainer import Trainer, TrainTask, tracker_of
from cluster.engine import EngineConfig
from cluster.placement import Workers
from cluster.run_directory import RunDirectory
from cluster.session import ClusterConfig, session
from cluster.training import run_workers
from llama2.batches import TokenSequence, pack
from llama2.lora import LoraConfig
from llama2.losses import next_token_loss
from llama2.packing import sample_order
from llama2.schedules import Schedule
from llama2.shards import Manifest, Shards, ShardWriter
from tests.benchmarks.side_by_side import THREADS
from tests.benchmarks.training import SHAPES, VOCABULARY, Masters, our_model

STEPS, WARMUP = 14, 3


@dataclass(frozen=True)
class Turns:
    """What the worker does: the trainer's task, the shape of its model, where to write times."""

    task: TrainTask
    shape: str
    times: Path


def take_turns(turns: Turns) -> None:
    """Time steps of the trainer and of the bare loop, one after the other."""
    task = turns.task
    trainer, shards = Trainer(task), Shards(task.data)
    bare = our_model(SHAPES[turns.shape])
    optimizer = Masters(bare)

    def bare_step(step: int) -> None:
        rows = sample_order(step, task.batch_rows, len(shards), task.seed)
        batch = pack([shards.row(row) for row in rows])
        logprobs = bare(batch.tokens_BT, batch.segments_BT, targets_BT=batch.targets_BT)
        next_token_loss(logprobs, len(logprobs)).backward()
        optimizer.step()

    lines = []
    with tracker_of(task, 0) as tracker:
        for step in range(STEPS):
            started = time.perf_counter()
            tracker.log(step, trainer.step(step))
            between = time.perf_counter()
            bare_step(step)
            lines.append(f"{between - started} {time.perf_counter() - between}\n")
    turns.times.write_text("".join(lines[WARMUP:]))


def write_rows(folder: Path, rows: int, tokens: int) -> Path:
    """Rows of two documents each."""
    writer = ShardWriter(folder, Manifest("pretrain", "made up", tokens))
    random = np.random.default_rng(0)
    for _ in range(rows):
        lengths = (tokens // 2 + 1, tokens - tokens // 2 + 1)
        drawn = [random.integers(0, VOCABULARY, length) for length in lengths]
        writer.add([TokenSequence(ids, np.arange(len(ids)) >= 0) for ids in drawn])
    writer.close()
    return folder


def compare(name: str, folder: Path) -> None:
    """Print both loops' speed for a shape of the training benchmark."""
    shape = SHAPES[name]
    data = write_rows(folder / f"rows-{name}", 4 * shape.rows, shape.tokens)
    run = RunDirectory(folder, f"loop-{name}")
    run.open({})
    task = TrainTask(
        stage="pretrain", run=run, data=data, heldout=data, start=None, model=shape.config,
        engine=EngineConfig(zero_stage=1, precision="bfloat16"), schedule=Schedule(1e-4, STEPS),
        tokenizer=folder, batch_rows=shape.rows,
        micro_batches=MicroBatches(shape.rows * shape.tokens), eval_rows=1, eval_every=0,
        save_every=STEPS, keep_checkpoints=1, patience=0, keep_best=False, on_bad_loss="stop",
        seed=0, lora=LoraConfig(),
    )  # fmt: skip
    times = folder / f"times-{name}"
    run_workers(take_turns, Turns(task, name, times), Workers(threads=THREADS), run, 0)
    pairs = torch.tensor(
        [[float(x) for x in line.split()] for line in times.read_text().splitlines()]
    )
    ours, bare = pairs.median(dim=0).values.tolist()
    ratio = statistics.median((pairs[:, 1] / pairs[:, 0]).tolist())
    tokens = shape.rows * shape.tokens
    print(
        f"{name}: trainer {tokens / ours:.0f} tokens/s, bare loop {tokens / bare:.0f} tokens/s: "
        f"{ratio:.1%} of its speed",
        flush=True,
    )


def main() -> None:
    """Print a line per shape."""
    with tempfile.TemporaryDirectory() as folder, session(ClusterConfig()):
        for name in SHAPES:
            compare(name, Path(folder))


if __name__ == "__main__":
    main()
