"""Pretraining, supervised fine-tuning and reward modelling: one loop, three objectives.

The loop runs on every worker of a group. Which rows a step sees is a function of the seed and the
step alone, so neither a restart nor the number of workers changes them.
"""

import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from actors.export import export
from actors.identity import identity, sampled_hash
from actors.objectives import LanguageModelling, Margin, Objective, Ranking
from actors.reward_report import RewardReport
from actors.steps import BadBatch, MicroBatches, evaluate, update
from cluster import training
from cluster.checkpoints import Checkpoints
from cluster.engine import Engine, EngineConfig
from cluster.run_directory import RunDirectory
from cluster.tracking import Tracker
from llama2 import checkpoint
from llama2.config import ModelConfig
from llama2.lora import LoraConfig, apply_lora
from llama2.mixing import drawn
from llama2.model import ScalarModel, Transformer, initial_weights
from llama2.packing import sample_order
from llama2.preference_mix import Aspect
from llama2.schedules import Schedule
from llama2.sequence_parallel import SequenceParallel
from llama2.shards import Shards

logger = logging.getLogger(__name__)

MOST_SKIPPED = 10
"""Steps that may be skipped in a row: more of them are no accident of the data."""


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
    micro_batches: MicroBatches
    eval_rows: int
    eval_every: int
    save_every: int
    keep_checkpoints: int
    patience: int
    """Evaluations without a better loss after which training ends; 0 never does."""
    keep_best: bool
    """Whether the result is the state with the lowest evaluation loss, not the last one."""
    on_bad_loss: Literal["stop", "skip"]
    seed: int
    lora: LoraConfig
    margin: Margin = "small"
    safety_weight: float = 0.0
    """Weight of the auxiliary safety loss, of reward models."""
    report_on: Mapping[Aspect, Path] = field(default_factory=dict)
    """Held-out comparisons that a reward model is reported on, by kind."""
    activation_checkpointing: bool = False
    wandb_project: str = "llama2"


@dataclass(frozen=True)
class Progress:
    """What a loop has seen, besides the engine's state. Every checkpoint holds it, as of before the
    evaluation of its own step, which a resumed loop makes again."""

    best: float = math.inf
    """Lowest evaluation loss."""
    best_step: int = 0
    stale: int = 0
    """Evaluations since then."""
    skipped: int = 0
    """Steps left out for a loss or gradient that was not finite."""
    skipped_in_a_row: int = 0

    def evaluated(self, step: int, loss: float) -> "Progress":
        """After an evaluation; a loss that is not a number is no better one."""
        if loss < self.best:
            return replace(self, best=loss, best_step=step, stale=0)
        return replace(self, stale=self.stale + 1)


class Trainer:
    """One worker's loop over global batches; `run` drives it (collective)."""

    def __init__(self, task: TrainTask) -> None:
        self.task = task
        self.shards, self.heldout = Shards(task.data), Shards(task.heldout)
        sequence = SequenceParallel.of(task.micro_batches.sequence_parallel)
        self.objective = _objective(task, self.shards, sequence)
        self.judge = _objective(task, self.heldout, sequence)
        module, weights = _module(task, sequence)
        self.engine = Engine(module, task.engine, task.schedule, weights)
        self.checkpoints = Checkpoints(
            task.run.checkpoints, _identity(task, self.shards, self.engine), task.keep_checkpoints
        )
        self.progress = Progress()
        self.report: RewardReport | None = None
        self.saved: int | None = None
        found = self.checkpoints.load({"model": self.engine})
        if found is not None:
            self.progress, self.saved = Progress(**found.extra), found.step

    def run(self) -> dict[str, float]:
        """Train to the schedule's last step, or until `patience` is spent. Returns the last
        evaluation."""
        task, engine = self.task, self.engine
        with ExitStack() as stack:
            lead = training.rank() == 0
            tracker = stack.enter_context(tracker_of(task, engine.updates)) if lead else None
            while True:
                step, before = engine.updates, self.progress
                metrics = self._evaluate(step)
                stale = 0 < task.patience <= self.progress.stale
                ends = step == task.schedule.steps or stale
                if self._is_due(step, ends):
                    self._save(step, before, metrics.get("eval/loss"))
                if not ends:
                    metrics |= self.step(step)
                if tracker is not None:
                    tracker.log(step, metrics)
                if ends:
                    return metrics

    def _evaluate(self, step: int) -> dict[str, float]:
        task = self.task
        if step < task.schedule.steps and (not task.eval_every or step % task.eval_every):
            return {}
        metrics = self._measure()
        self.progress = self.progress.evaluated(step, metrics["eval/loss"])
        return metrics

    def _measure(self) -> dict[str, float]:
        # Of all sources and lengths, which lie one behind the other.
        rows = drawn([len(self.heldout)], self.task.eval_rows, seed=0)[0]
        found = evaluate(self.engine, self.judge, rows, self.task.micro_batches)
        if self.task.report_on:
            self.report = RewardReport.of(
                self.engine, self.task.report_on, self.task.micro_batches, self.task.eval_rows
            )
            found |= self.report.headline
        return found

    def _is_due(self, step: int, ends: bool) -> bool:
        if step == self.saved:
            return False
        better = self.task.keep_best and self.progress.best_step == step
        better = better and self.progress.best < math.inf
        return ends or better or (step > 0 and step % self.task.save_every == 0)

    def _save(self, step: int, progress: Progress, score: float | None) -> None:
        self.checkpoints.save(step, {"model": self.engine}, _state(progress), score)
        self.saved = step

    def step(self, step: int) -> dict[str, float]:
        """The update of one global batch, or its omission. Returns what is to be recorded."""
        task = self.task
        rows = sample_order(step, task.batch_rows, len(self.shards), task.seed)
        training.seed_step(task.seed, step)
        try:
            metrics = update(self.engine, self.objective, rows, task.micro_batches)
        except BadBatch as bad:
            self._skip(step, bad)
            metrics = {"loss": math.nan}
        else:
            self.progress = replace(self.progress, skipped_in_a_row=0)
        skipped = self.progress.skipped
        return metrics | ({"skipped": float(skipped)} if skipped else {})

    def _skip(self, step: int, bad: BadBatch) -> None:
        task, seen = self.task, self.progress
        said = f"{task.run.name}: {bad.what} at step {step}, in {bad.where} of {task.data}"
        if task.on_bad_loss == "stop":
            raise FloatingPointError(
                f"{said}; look at these rows, lower the learning rate, or leave such steps out "
                "with --on-bad-loss skip."
            ) from None
        if seen.skipped_in_a_row == MOST_SKIPPED:
            raise FloatingPointError(
                f"{said}, after {MOST_SKIPPED} skipped steps in a row; lower the learning rate."
            ) from None
        if training.rank() == 0:
            logger.warning("%s; the step is skipped.", said)
        self.progress = replace(
            seen, skipped=seen.skipped + 1, skipped_in_a_row=seen.skipped_in_a_row + 1
        )

    def finish(self, final: dict[str, float]) -> None:
        """Export the last state, or the best one, and mark the run as finished."""
        task = self.task
        self.checkpoints.close()
        if task.keep_best:
            final = self._load_best(final)
        base = str(task.start or task.run.name)
        export(self.engine, task.tokenizer, task.run.model, task.lora, base)
        if training.rank() == 0:
            if self.report is not None:
                self.report.write(task.run)
            task.run.finish(final | (self.report.tables if self.report is not None else {}))
        self.engine.close()

    def _load_best(self, final: dict[str, float]) -> dict[str, float]:
        step = self.engine.updates
        if self.progress.best_step != step:
            found = self.checkpoints.load_best({"model": self.engine})
            if found is not None:  # None: no evaluation was finite
                step, final = found.step, self._measure()
        return final | {"best_step": step}


def train(task: TrainTask) -> None:
    """Train from `task.start`, or the run's newest checkpoint, to the end, on this worker's part of
    every batch.

    Raises `FloatingPointError`, on all workers alike, for a loss or gradient that is not finite,
    where the task says so.
    """
    trainer = Trainer(task)
    try:
        final = trainer.run()
    except FloatingPointError:
        trainer.checkpoints.close()  # what was saved before is to be whole
        raise
    trainer.finish(final)


def tracker_of(task: TrainTask, first_step: int) -> Tracker:
    """Records a run's metrics from `first_step` on."""
    return Tracker(
        task.run,
        stage=task.run.name,
        total_steps=task.schedule.steps,
        project=task.wandb_project,
        first_step=first_step,
        headline=("loss", "eval/loss", "eval/accuracy", "lr", "targets_per_second"),
    )


def _objective(task: TrainTask, shards: Shards, sequence: SequenceParallel) -> Objective:
    if task.stage == "reward_model":
        return Ranking(shards, sequence, task.margin, task.safety_weight)
    return LanguageModelling(shards, sequence)


def _module(
    task: TrainTask, sequence: SequenceParallel
) -> tuple[nn.Module, Iterator[tuple[str, Tensor]]]:
    """The model on the meta device, and its weights one at a time."""
    module: Transformer | ScalarModel
    if task.stage == "reward_model":
        assert task.start is not None
        module, weights = checkpoint.stream_scalar_from(task.start, task.seed)
    elif task.start is not None:
        module, weights = checkpoint.stream(task.start)
    else:
        module = checkpoint.unfilled(Transformer, task.model)
        weights = initial_weights(module, task.model, task.seed)
    module.model.activation_checkpointing = task.activation_checkpointing
    module.model.sequence_parallel = sequence
    if task.lora.rank:
        apply_lora(module, task.lora, task.seed)
    return module, weights


def _identity(task: TrainTask, shards: Shards, engine: Engine) -> dict[str, Any]:
    """What the training state belongs to."""
    assert isinstance(engine.module, Transformer | ScalarModel)
    return identity(
        task.engine,
        stage=task.stage,
        model=engine.module.config,
        schedule=task.schedule,
        batch_rows=task.batch_rows,
        lora=task.lora,
        # Adapters are nothing without the weights that they are updates of.
        base=sampled_hash(task.start) if task.lora.rank and task.start is not None else "",
        margin=task.margin,
        safety_weight=task.safety_weight,
        data=shards.fingerprint,
        seed=task.seed,
    )


def _state(progress: Progress) -> dict[str, Any]:
    # JSON has no infinity.
    return {k: v for k, v in asdict(progress).items() if v != math.inf}
