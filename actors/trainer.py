"""Pretraining, supervised fine-tuning and reward modelling: one loop, three objectives.

The loop runs on every worker of a Ray Train group. Which rows a step sees is a function of the
seed and the step alone, so neither a restart nor the number of workers changes them.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from actors.export import export
from cluster import training
from cluster.engine import Engine, EngineConfig
from cluster.run_directory import RunDirectory
from cluster.tracking import Tracker
from llama2 import checkpoint
from llama2.batches import pack, pad_right
from llama2.config import ModelConfig
from llama2.losses import next_token_loss, ranking_loss
from llama2.model import ScalarModel, Transformer, initialize
from llama2.packing import sample_order
from llama2.schedules import Schedule
from llama2.shards import Shards

MARGINS = {
    "none": (0.0, 0.0, 0.0, 0.0),
    "small": (0.0, 1 / 3, 2 / 3, 1.0),
    "large": (0.0, 1.0, 2.0, 3.0),
}
"""Margin of the ranking loss by rating, negligibly to significantly better (paper, table 27)."""


@dataclass(frozen=True)
class TrainTask:
    """All that a worker needs to train one model."""

    stage: Literal["pretrain", "sft", "reward_model"]
    run: RunDirectory
    data: Path
    heldout: Path
    start: Path | None
    """Folder of the model to start from; None draws fresh weights."""
    model: ModelConfig
    engine: EngineConfig
    schedule: Schedule
    tokenizer: Path
    batch_rows: int
    """Rows (pairs, for a reward model) in a global batch."""
    micro_batch_rows: int
    """Rows that a worker holds activations of at a time."""
    eval_rows: int
    eval_every: int
    save_every: int
    seed: int
    margin: Literal["none", "small", "large"] = "small"
    activation_checkpointing: bool = False
    wandb_project: str = "llama2"


class Objective(Protocol):
    """What is minimised over rows of prepared data."""

    def total(self, rows: Sequence[int]) -> int:
        """Terms of the loss in a global batch: what its sum is divided by."""
        ...

    def loss(self, engine: Engine, rows: Sequence[int], total: int) -> Tensor:
        """These rows' part of the loss of a batch with `total` terms."""
        ...

    def measure(self, engine: Engine, rows: Sequence[int]) -> dict[str, float]:
        """Sums over rows, to be added up over micro-batches and workers; "count" among them."""
        ...


class LanguageModelling:
    """Cross-entropy on target tokens: all of them in pretraining, answers only in SFT."""

    def __init__(self, shards: Shards) -> None:
        self.shards = shards

    def total(self, rows: Sequence[int]) -> int:
        return self.shards.targets(rows)

    def loss(self, engine: Engine, rows: Sequence[int], total: int) -> Tensor:
        batch = pack([self.shards.row(i) for i in rows]).to(engine.device)
        logprobs_N = engine(batch.tokens_BT, batch.segments_BT, targets_BT=batch.targets_BT)
        return next_token_loss(logprobs_N, total)

    def measure(self, engine: Engine, rows: Sequence[int]) -> dict[str, float]:
        return {
            "loss": float(self.loss(engine, rows, 1)),
            "count": float(self.shards.targets(rows)),
        }


class Ranking:
    """Binary ranking loss with a margin by rating, the score read at the last token (paper,
    3.2.2)."""

    def __init__(self, shards: Shards, margin: Literal["none", "small", "large"]) -> None:
        self.shards = shards
        self.margins = MARGINS[margin]

    def total(self, rows: Sequence[int]) -> int:
        return len(rows)

    def loss(self, engine: Engine, rows: Sequence[int], total: int) -> Tensor:
        chosen_N, rejected_N = self._scores(engine, rows)
        return ranking_loss(chosen_N, rejected_N, self._margins(rows).to(chosen_N), total)

    def measure(self, engine: Engine, rows: Sequence[int]) -> dict[str, float]:
        chosen_N, rejected_N = self._scores(engine, rows)
        margin_N = self._margins(rows).to(chosen_N)
        right = (chosen_N > rejected_N).float() + 0.5 * (chosen_N == rejected_N).float()
        return {
            "loss": float(ranking_loss(chosen_N, rejected_N, margin_N, 1)),
            "accuracy": float(right.sum()),
            "score_gap": float((chosen_N - rejected_N).sum()),
            "count": float(len(rows)),
        }

    def _margins(self, rows: Sequence[int]) -> Tensor:
        return torch.tensor([self.margins[max(0, self.shards.rating(i))] for i in rows])

    def _scores(self, engine: Engine, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        pairs = [self.shards.row(i) for i in rows]
        tokens_BT, segments_BT, last_B = pad_right([s.tokens for pair in pairs for s in pair])
        device = engine.device
        scores_BT = engine(tokens_BT.to(device), segments_BT.to(device))
        scores_B = scores_BT.gather(1, last_B.to(device)[:, None])[:, 0]
        return scores_B[0::2], scores_B[1::2]


def train(task: TrainTask) -> None:
    """Train from `task.start` to the schedule's last step, on this worker's part of every batch."""
    shards, heldout = Shards(task.data), Shards(task.heldout)
    objective, judge = _objective(task, shards), _objective(task, heldout)
    engine = Engine(_module(task), task.engine, task.schedule)
    with training.resume() as folder:
        if folder is not None:
            engine.load(folder, "model")
    first = engine.updates
    lead = training.rank() == 0
    with ExitStack() as stack:
        tracker = stack.enter_context(_tracker(task, engine.updates)) if lead else None
        while engine.updates < task.schedule.steps:
            step, metrics = engine.updates, {}
            if task.eval_every and step % task.eval_every == 0:
                metrics = evaluate(engine, judge, task, len(heldout))
            metrics |= _update(engine, objective, task, len(shards))
            if tracker is not None:
                tracker.log(step, metrics)
            if engine.updates % task.save_every == 0 and engine.updates < task.schedule.steps:
                _save(engine)
        final = evaluate(engine, judge, task, len(heldout))
        if tracker is not None:
            tracker.log(engine.updates, final)
    export(engine, task.tokenizer, task.run.model)
    if engine.updates > first:  # else the checkpoint it came from is the last one
        _save(engine)
    if lead:
        task.run.finish(final)
    engine.close()


def _tracker(task: TrainTask, first_step: int) -> Tracker:
    return Tracker(
        task.run,
        stage=task.run.name,
        total_steps=task.schedule.steps,
        project=task.wandb_project,
        first_step=first_step,
        headline=("loss", "eval/loss", "eval/accuracy", "lr", "targets_per_second"),
    )


def _objective(task: TrainTask, shards: Shards) -> Objective:
    if task.stage == "reward_model":
        return Ranking(shards, task.margin)
    return LanguageModelling(shards)


def _module(task: TrainTask) -> nn.Module:
    module: Transformer | ScalarModel
    if task.stage == "reward_model":
        assert task.start is not None
        module = checkpoint.scalar_from(task.start, task.seed)
    elif task.start is not None:
        module = checkpoint.load(task.start)
    else:
        module = Transformer(task.model)
        initialize(module, task.model, task.seed)
    module.model.activation_checkpointing = task.activation_checkpointing
    return module


def _update(engine: Engine, objective: Objective, task: TrainTask, size: int) -> dict[str, float]:
    started = time.perf_counter()
    rows = sample_order(engine.updates, task.batch_rows, size, task.seed)
    total = objective.total(rows)
    summed = torch.zeros(1)
    for micro in _micro_batches(rows, task.micro_batch_rows):
        loss = objective.loss(engine, micro, total)
        engine.backward(loss)
        summed += loss.detach().cpu()
    metrics = engine.step()
    loss_value = float(training.all_reduce(summed.to(engine.device)))
    if not torch.isfinite(torch.tensor(loss_value)):
        raise FloatingPointError(
            f"{task.run.name}: the loss is {loss_value} at step {engine.updates - 1}; lower the "
            "learning rate or look at the data of that step."
        )
    elapsed = time.perf_counter() - started
    return {"loss": loss_value, "targets_per_second": total / elapsed, **metrics}


def _micro_batches(rows: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    mine = rows[training.rank() :: training.world_size()]
    for start in range(0, len(mine), size):
        yield mine[start : start + size]


@torch.no_grad()
def evaluate(engine: Engine, objective: Objective, task: TrainTask, size: int) -> dict[str, float]:
    """Means over the first `task.eval_rows` held-out rows, the same on all workers (collective)."""
    world = training.world_size()
    count = min(task.eval_rows, size)
    # Equal shares, since sharded weights are gathered by all workers together.
    rows = range(count // world * world) if count >= world else [0] * world
    engine.module.eval()
    sums: dict[str, float] = {}
    for micro in _micro_batches(rows, task.micro_batch_rows):
        for name, value in objective.measure(engine, micro).items():
            sums[name] = sums.get(name, 0.0) + value
    engine.module.train()
    totals = training.all_reduce(torch.tensor(list(sums.values()), device=engine.device))
    means = dict(zip(sums, totals.tolist(), strict=True))
    terms = means.pop("count")
    return {f"eval/{name}": value / terms for name, value in means.items()}


def _save(engine: Engine) -> None:
    training.save(lambda folder: engine.save(folder, "model"), engine.updates, {})
