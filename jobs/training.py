"""What pretraining, SFT and reward modelling share as jobs: inputs, checks, the run, the report."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from actors.encoder import Part
from actors.steps import MicroBatches
from actors.trainer import TrainTask, train
from cluster.placement import check_capacity
from cluster.report import write_report
from cluster.run_directory import RunDirectory
from cluster.session import session
from cluster.training import run_workers
from jobs import cli
from jobs.configs import RewardModelConfig, TrainConfig
from jobs.prepare import check, prepare, sources
from jobs.prepare_config import PrepareConfig
from llama2.checkpoint import check_folder
from llama2.config import ModelConfig
from llama2.preference_mix import prepared
from llama2.schedules import Schedule
from llama2.sequence_parallel import check_degree, groups
from llama2.shards import Shards
from llama2.tokenizer import Tokenizer, check_vocabulary, load_tokenizer

Stage = Literal["pretrain", "sft", "reward_model"]
# What may differ when a run is continued: it does not change what the run computes.
MAY_CHANGE = (
    "cluster", "runs", "wandb_project", "workers", "sequence_parallel", "save_every",
    "keep_checkpoints", "verify_data", "on_bad_loss", "micro_batch_tokens",
    "activation_checkpointing", "engine.zero_stage", "engine.offload_optimizer",
    "engine.offload_parameters", "engine.nvme_path",
)  # fmt: skip

VERIFIED_BYTES = 1 << 33  # read in seconds to a minute


@dataclass(frozen=True)
class Inputs:
    """Where a training job reads from."""

    data: Path
    """Folder with `train` and `heldout` rows."""
    tokenizer: Path
    raw: PrepareConfig | None
    """How to prepare the data first, where raw records were given."""


def train_job(
    config: TrainConfig,
    stage: Stage,
    start: Path | None,
    mix: Callable[[Path, RunDirectory], Path] | None = None,
) -> None:
    """Train one model into its run directory; a finished run is left as it is. `mix` makes, of the
    folder with all prepared data, that with the rows to train on."""
    part = _part(config, stage)
    run = RunDirectory(config.runs, config.run_name(part))
    if run.is_finished:
        if not run.report.exists():  # it was killed before the last line of this job
            write_report(run, _title(run, stage))
        print(f"{run.name}: finished already; the model is in {run.model}.")
        return
    model = config.model
    if start is not None:
        model = check_folder(start, scalar=None if stage == "reward_model" else False)
    inputs = find_inputs(config, part, start, run, model)
    known = inputs.tokenizer if inputs.raw is None else inputs.raw.tokenizer
    tokenizer = None if known is None else load_tokenizer(known)
    if tokenizer is not None:
        check_vocabulary(tokenizer, model.vocab_size)
    check_settings(config, model, fresh=start is None)
    if inputs.raw is not None:
        check(inputs.raw, sources(inputs.raw))
    else:
        _check_rows(config, inputs.data, model, tokenizer)
    if run.config.exists():  # told before a cluster starts
        run.open(cli.plain(config), may_change=MAY_CHANGE)
    with session(config.cluster):
        check_capacity({"training": config.workers})
        run.open(cli.plain(config), may_change=MAY_CHANGE)
        if inputs.raw is not None:
            prepared = RunDirectory(run.path, "data")
            prepare(inputs.raw, sources(inputs.raw), prepared)
            _check_rows(config, inputs.data, model, load_tokenizer(inputs.tokenizer))
        train_rows = inputs.data / "train" if mix is None else mix(inputs.data.parent, run)
        task = _task(config, stage, inputs, train_rows, model, run, start)
        print(f"{run.name}: {task.schedule.steps} steps of {config.batch_rows} rows", flush=True)
        run_workers(train, task, config.workers, run)
    write_report(run, _title(run, stage))
    print(f"{run.name}: the model is in {run.model}, the report is {run.report}.")


def check_settings(config: TrainConfig, model: ModelConfig, fresh: bool) -> None:
    """Raise `ValueError` for numbers that do not go together, or not with the model, whose weights
    are drawn where it is `fresh`."""
    check_degree(model, config.sequence_parallel)
    shares = len(groups(config.workers.count, config.sequence_parallel))
    if config.batch_rows < shares:
        raise ValueError(
            f"batch_rows {config.batch_rows} leaves some of {shares} workers (or sequence groups) "
            "without a row; change one of them."
        )
    for name in ("batch_rows", "micro_batch_tokens", "eval_rows", "save_every", "keep_checkpoints"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name} must be at least 1, not {getattr(config, name)}.")
    for name in ("seed", "steps", "warmup_steps", "eval_every", "patience"):
        if getattr(config, name) < 0:
            raise ValueError(f"{name} must not be negative, as {getattr(config, name)} is.")
    if not 0 <= config.peak_lr < math.inf:
        raise ValueError(f"peak_lr must be at least 0, not {config.peak_lr:g}.")
    if not config.steps and not 0 < config.epochs < math.inf:
        raise ValueError(f"epochs must be positive, not {config.epochs:g}.")
    if config.patience and not config.eval_every:
        raise ValueError(
            "patience counts evaluations, and eval_every 0 makes them at the end only; set it."
        )
    if config.lora.rank and fresh:
        raise ValueError(
            "LoRA trains updates of a model that is there; give --start, or leave --lora.rank 0."
        )


def _title(run: RunDirectory, stage: Stage) -> str:
    return f"{run.name}: {stage.replace('_', ' ')}"


def _part(config: TrainConfig, stage: Stage) -> Part:
    if isinstance(config, RewardModelConfig):
        return config.kind
    return "pretrain" if stage == "pretrain" else "sft"


def find_inputs(
    config: TrainConfig, part: Part, start: Path | None, run: RunDirectory, model: ModelConfig
) -> Inputs:
    """Prepared rows, or raw records that are to be prepared below the run's own folder.

    Raises `ValueError` where a path is missing or prepared data lacks the part that is needed.
    """
    paths = config.data or (config.runs / f"{config.preset}-data",)
    for path in paths:
        if not path.exists():
            hint = "" if config.data else "; run jobs/prepare.py first, or give --data"
            raise ValueError(f"{path} does not exist{hint}.")
    root = paths[0].absolute()
    prepared = [path for path in paths if (path / "tokenizer").is_dir()]
    if prepared and len(paths) > 1:
        raise ValueError(
            f"{prepared[0]} is prepared data and cannot be joined with other data; give it alone, "
            "or prepare all of it together."
        )
    if prepared:
        if not (root / part / "train" / "manifest.json").is_file():
            raise ValueError(f"{root} holds no prepared {part} data; prepare it first.")
        beside = start if start is not None and _has_tokenizer(start) else root / "tokenizer"
        return Inputs(root / part, config.tokenizer or beside, None)
    tokenizer = config.tokenizer or start
    field = {"pretrain": "text", "sft": "dialogues"}.get(part, part)
    raw = PrepareConfig(
        preset=config.preset,
        name="data",
        runs=run.path,
        tokenizer=None if tokenizer is None else tokenizer.absolute(),
        vocab_size=model.vocab_size,
        context=model.max_position_embeddings,
    )
    raw = replace(raw, **{field: tuple(path.absolute() for path in paths)})  # type: ignore[arg-type]
    data = run.path / "data"
    return Inputs(data / part, data / "tokenizer", raw)


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("tokenizer.model", "tokenizer.json"))


def _check_rows(
    config: TrainConfig, folder: Path, model: ModelConfig, tokenizer: Tokenizer | None
) -> None:
    for split in ("train", "heldout"):
        shards = Shards(folder / split)
        if shards.manifest.context > model.max_position_embeddings:
            raise ValueError(
                f"{folder} has rows of up to {shards.manifest.context} tokens and the model's "
                f"context is {model.max_position_embeddings}; prepare it with --context "
                f"{model.max_position_embeddings}."
            )
        if tokenizer is not None and shards.manifest.tokenizer != tokenizer.fingerprint:
            raise ValueError(
                f"{folder} was written with another tokenizer than the model's; prepare it again "
                "with --tokenizer naming the model's folder."
            )
        if config.verify_data or shards.bytes <= VERIFIED_BYTES:
            shards.verify()


def _task(
    config: TrainConfig,
    stage: Stage,
    inputs: Inputs,
    train_rows: Path,
    model: ModelConfig,
    run: RunDirectory,
    start: Path | None,
) -> TrainTask:
    rows = len(Shards(train_rows))
    steps = config.steps or math.ceil(config.epochs * rows / config.batch_rows)
    warmup = config.warmup_steps
    if stage == "reward_model" and not warmup:
        warmup = max(5, round(0.03 * steps))  # paper, section 3.2.2
    return TrainTask(
        stage=stage,
        run=run,
        data=train_rows,
        heldout=inputs.data / "heldout",
        start=None if start is None else start.absolute(),
        model=model,
        engine=config.engine,
        schedule=Schedule(config.peak_lr, steps, warmup, config.schedule),
        tokenizer=inputs.tokenizer.absolute(),
        batch_rows=config.batch_rows,
        micro_batches=MicroBatches(config.micro_batch_tokens, config.sequence_parallel),
        eval_rows=config.eval_rows,
        eval_every=config.eval_every,
        save_every=config.save_every,
        keep_checkpoints=config.keep_checkpoints,
        patience=config.patience,
        keep_best=config.patience > 0 if config.keep_best is None else config.keep_best,
        on_bad_loss=config.on_bad_loss,
        seed=config.seed,
        lora=config.lora,
        margin=config.margin if isinstance(config, RewardModelConfig) else "none",
        safety_weight=config.safety_weight if isinstance(config, RewardModelConfig) else 0.0,
        report_on=prepared(inputs.data.parent, "heldout") if stage == "reward_model" else {},
        activation_checkpointing=config.activation_checkpointing,
        wandb_project=config.wandb_project,
    )


def start_folder(config: TrainConfig, stage: str) -> Path:
    """The model to start from: the one given, or the preset's model of an earlier stage."""
    if config.start is not None:
        return config.start
    return config.runs / f"{config.preset}-{stage}" / "model"
