"""The training loop in one process: exact resume, early stopping, bad losses, LoRA."""

import json
import logging
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from actors import trainer
from actors.objectives import Ranking
from actors.steps import BadBatch, MicroBatches, evaluate, update
from actors.trainer import Trainer, TrainTask, train
from cluster.engine import EngineConfig
from cluster.run_directory import read_json_lines
from llama2 import checkpoint
from llama2.lora import LoraConfig, load_adapter
from llama2.model import ScalarModel
from llama2.packing import sample_order
from llama2.schedules import Schedule
from llama2.sequence_parallel import SequenceParallel
from llama2.shards import Shards
from tests.actors.small_tasks import Steep, poisoned, reward_task, task, write_rows

pytestmark = pytest.mark.usefixtures("group_of_one")
ALONE = SequenceParallel()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trainer")


@pytest.fixture(autouse=True)
def without_wandb(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")


def metrics(found: TrainTask) -> list[dict[str, float]]:
    """All that is recorded but the speed, NaN as a text so that it equals itself."""
    return [
        {k: "nan" if math.isnan(v) else v for k, v in line.items() if k != "targets_per_second"}
        for line in read_json_lines(found.run.metrics)
    ]


def column(found: TrainTask, name: str) -> dict[int, float]:
    lines = read_json_lines(found.run.metrics)
    return {int(line["step"]): line[name] for line in lines if name in line}


def weights(found: TrainTask) -> dict[str, Tensor]:
    return checkpoint.load(found.run.model).state_dict()


class Killed(Exception):
    """Ends a loop as a signal would."""


def interrupted(found: TrainTask, step: int, patch: pytest.MonkeyPatch) -> None:
    """Train until just before the update of `step`."""

    def order(now: int, *others: int) -> list[int]:
        if now == step:
            raise Killed
        return sample_order(now, *others)

    with patch.context() as patched:
        patched.setattr(trainer, "sample_order", order)
        attempt = Trainer(found)
        with pytest.raises(Killed):
            attempt.run()
        attempt.checkpoints.close()
        attempt.engine.close()


@pytest.mark.parametrize("at", [3, 5, 6])
def test_a_resumed_run_repeats_the_unbroken_one_to_the_bit(
    root: Path, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Broken off at a checkpoint, between two, and at one that is an evaluation as well."""
    whole = task(root, "whole")
    if not whole.run.is_finished:
        train(whole)
    broken = task(root, f"broken-{at}")
    interrupted(broken, at, monkeypatch)
    assert len(metrics(broken)) == at
    train(broken)
    assert metrics(broken) == metrics(whole)
    assert broken.run.summary() == whole.run.summary()
    for name, tensor in weights(broken).items():
        assert torch.equal(tensor, weights(whole)[name]), name


def test_a_finished_loop_that_is_run_again_changes_nothing(root: Path) -> None:
    done = task(root, "again", schedule=Schedule(1e-2, 3, 1))
    train(done)
    before, model = metrics(done), weights(done)
    train(done)
    assert metrics(done) == before
    assert all(torch.equal(tensor, model[name]) for name, tensor in weights(done).items())


def test_another_config_is_refused_by_its_checkpoint(root: Path) -> None:
    done = task(root, "refused", schedule=Schedule(1e-2, 3, 1))
    train(done)
    other = replace(done, batch_rows=6, schedule=Schedule(2e-2, 3, 1))
    with pytest.raises(ValueError, match=r"schedule.peak \(0.01 there, 0.02 now\)") as caught:
        train(other)
    assert "batch_rows (5 there, 6 now)" in str(caught.value)
    moved = replace(done, engine=EngineConfig(zero_stage=2), micro_batches=MicroBatches(999))
    train(moved)


def overfitting(root: Path, name: str, **changes: Any) -> TrainTask:
    """Held-out rows of other tokens: at first the loss falls (rare ones become likelier than the
    rarest), then it rises."""
    if not (root / "other").is_dir():
        write_rows(root / "other", "pretrain", 7, 5, range(150, 300))
        write_rows(root / "narrow", "pretrain", 24, 6, range(10, 180))
    return task(
        root, name, data=root / "narrow", heldout=root / "other", eval_every=1, save_every=100,
        schedule=Schedule(3e-2, 16, 1), **changes,
    )  # fmt: skip


def first_stop(losses: dict[int, float], patience: int) -> int:
    """By the rule itself: the first step at which the last `patience` losses are all no lower than
    the lowest before them."""
    for step in range(patience, len(losses)):
        lowest = min(losses[i] for i in range(step - patience + 1))
        if all(losses[i] >= lowest for i in range(step - patience + 1, step + 1)):
            return step
    raise AssertionError("the held-out loss never rises for so long")


def test_early_stopping_keeps_the_best_model(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = overfitting(root, "unstopped")
    train(whole)
    losses = column(whole, "eval/loss")
    assert len(losses) == 17
    stop = first_stop(losses, patience=2)
    best = min(range(stop + 1), key=lambda step: losses[step])
    assert 0 < best < stop < 16

    stopped = overfitting(root, "stopped", patience=2, keep_best=True)
    train(stopped)
    assert column(stopped, "eval/loss") == {i: x for i, x in losses.items() if i <= stop}
    summary = stopped.run.summary()
    assert summary is not None
    assert summary["best_step"] == best
    assert summary["eval/loss"] == losses[best]
    assert evaluated(stopped) == pytest.approx(losses[best], rel=1e-6)

    broken = overfitting(root, "stopped-broken", patience=2, keep_best=True)
    interrupted(broken, stop - 1, monkeypatch)
    train(broken)
    assert metrics(broken) == metrics(stopped)
    assert broken.run.summary() == summary


@torch.no_grad()
def evaluated(found: TrainTask) -> float:
    """Held-out loss of the exported model, document by document."""
    model = checkpoint.load(found.run.model)
    shards = Shards(found.heldout)
    total = count = 0.0
    for row in range(len(shards)):
        for document in shards.row(row):
            tokens = torch.tensor(document.tokens[None].astype(np.int64))
            logprobs = model(tokens[:, :-1]).log_softmax(-1).gather(2, tokens[:, 1:, None])[0, :, 0]
            wanted = torch.tensor(document.is_target[1:].copy())
            total, count = total - float(logprobs[wanted].sum()), count + float(wanted.sum())
    return total / count


def test_without_keep_best_the_last_model_is_the_result(root: Path) -> None:
    last = overfitting(root, "last")
    train(last)
    losses = column(last, "eval/loss")
    assert evaluated(last) == pytest.approx(losses[16], rel=1e-6)
    assert losses[16] > min(losses.values()) + 0.01


def row_of(step: int) -> int:
    """A row that this one of the eight steps sees, and no other."""
    seen = [row for now in range(8) for row in sample_order(now, 5, 24, 0)]
    return next(row for row in sample_order(step, 5, 24, 0) if seen.count(row) == 1)


def test_a_bad_loss_stops_with_step_and_row(root: Path) -> None:
    step, row = 3, row_of(3)
    found = poisoned(root, "stop", {row}, micro_batches=MicroBatches(1), save_every=2)
    with pytest.raises(FloatingPointError) as caught:
        train(found)
    sentence = str(caught.value)
    place = f"at step {step}, in row {row} of {found.data};"
    assert sentence.startswith(f"stop: the loss is nan {place}")
    assert "--on-bad-loss skip" in sentence
    assert "\n" not in sentence
    assert [line["step"] for line in metrics(found)] == list(range(step))
    assert [path.name for path in found.run.checkpoints.iterdir()] == ["step_00000002"]
    # What was saved is good: the run goes on from it once such steps are left out.
    train(replace(found, on_bad_loss="skip"))
    assert column(found, "skipped")[step] == 1


def test_a_bad_loss_is_skipped_where_asked(
    root: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = [1, 3]
    both = {row_of(step) for step in steps}
    found = poisoned(root, "skip", both, on_bad_loss="skip")
    with caplog.at_level(logging.WARNING, "actors.trainer"):
        train(found)
    said = [record.getMessage() for record in caplog.records if record.name == "actors.trainer"]
    assert len(said) == 2
    assert f"at step {steps[0]}" in said[0] and "the step is skipped" in said[0]
    losses = column(found, "loss")
    assert [step for step, loss in losses.items() if math.isnan(loss)] == steps
    assert column(found, "skipped")[7] == 2
    # The rate goes on by the step, not by the update.
    rates = column(found, "lr")
    assert all(rates[step] == found.schedule(step) for step in range(8) if step not in steps)
    broken = poisoned(root, "skip-broken", both, on_bad_loss="skip")
    interrupted(broken, steps[1] + 1, monkeypatch)
    train(broken)
    assert metrics(broken) == metrics(found)


def test_a_skipped_step_leaves_no_trace(root: Path) -> None:
    """Updates before and after are as if the batch had not been there."""
    step, row = 3, row_of(3)
    found = poisoned(root, "trace", {row}, on_bad_loss="skip")
    train(found)
    clean = poisoned(root, "clean", {row})
    attempt = Trainer(clean)
    losses = {}
    for now in (i for i in range(8) if i != step):
        attempt.engine.updates = now
        rows = sample_order(now, 5, 24, 0)
        losses[now] = update(attempt.engine, attempt.objective, rows, clean.micro_batches)["loss"]
    attempt.engine.close()
    assert losses == {i: loss for i, loss in column(found, "loss").items() if i != step}


def test_nothing_but_bad_losses_stop_even_so(root: Path) -> None:
    found = poisoned(
        root, "all-bad", set(range(24)), on_bad_loss="skip", schedule=Schedule(1e-2, 20, 1)
    )
    with pytest.raises(FloatingPointError, match=r"at step 10, in rows .* after 10 skipped steps"):
        train(found)
    assert len(metrics(found)) == 10


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_bad_gradient_does_not_reach_the_weights(root: Path, stage: Any) -> None:
    found = task(root, f"steep-{stage}", engine=EngineConfig(zero_stage=stage))
    attempt = Trainer(found)
    objective = Steep(attempt.shards, ALONE)
    rows = [3, 11, 7, 0, 20]
    before = {name: tensor.clone() for name, tensor in attempt.engine.weights()}
    with pytest.raises(BadBatch, match=r"norm is (inf|nan), in row 7$") as caught:
        update(attempt.engine, objective, rows, MicroBatches(1))
    assert caught.value.rows == [7]
    for name, tensor in attempt.engine.weights():
        assert torch.equal(tensor, before[name])
    assert attempt.engine.updates == 1
    # The gradient that was not finite is gone.
    losses = update(attempt.engine, objective, [0, 1, 2], found.micro_batches)
    assert math.isfinite(losses["grad_norm"])
    attempt.engine.close()


@pytest.mark.parametrize("budget", [1, 60, 10_000])
def test_losses_and_gradients_do_not_depend_on_the_budget(root: Path, budget: int) -> None:
    norms = []
    for name, tokens in ((f"budget-{budget}", budget), (f"budget-{budget}-other", 30)):
        attempt = Trainer(task(root, name))
        rows = [3, 1, 4, 15, 9, 2, 6]
        found = update(attempt.engine, attempt.objective, rows, MicroBatches(tokens))
        norms.append((found["loss"], found["grad_norm"]))
        attempt.engine.close()
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


def test_ranking_measures_what_single_sequences_score(root: Path) -> None:
    """Against one forward pass per answer and the formula written out."""
    found = reward_task(root, "measured")
    attempt = Trainer(found)
    shards, module = attempt.heldout, attempt.engine.module
    assert isinstance(module, ScalarModel)
    with torch.no_grad():
        module.score.weight.normal_(0, 30, generator=torch.Generator().manual_seed(0))
    losses, right, gaps = [], [], []
    for row in range(len(shards)):
        tokens = [torch.tensor(s.tokens[None].astype(np.int64)) for s in shards.row(row)]
        with torch.no_grad():
            chosen, rejected = (float(module(ids)[0, -1]) for ids in tokens)
        margin = shards.rating(row) / 3
        losses.append(math.log1p(math.exp(-(chosen - rejected - margin))))
        right.append(chosen > rejected)
        gaps.append(chosen - rejected)
    assert len(set(right)) == 2
    got = evaluate(attempt.engine, attempt.judge, range(len(shards)), MicroBatches(100))
    assert got["eval/loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert got["eval/accuracy"] == pytest.approx(np.mean(right))
    assert got["eval/score_gap"] == pytest.approx(np.mean(gaps), rel=1e-5)
    assert isinstance(attempt.judge, Ranking)
    lengths = [2 * max(len(s.tokens) for s in shards.row(row)) for row in range(len(shards))]
    assert attempt.judge.lengths(range(len(shards))) == lengths
    attempt.engine.close()


LORA = LoraConfig(rank=2, alpha=4.0, dropout=0.25)


def test_lora_trains_updates_and_exports_a_plain_model(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = task(root, "lora", start=root / "start", lora=LORA)
    train(found)
    start, trained = checkpoint.load(root / "start").state_dict(), weights(found)
    changed = {name for name, tensor in trained.items() if not torch.equal(tensor, start[name])}
    assert changed == {name for name in start if name.split(".")[-2] in LORA.targets}
    assert evaluated(found) == pytest.approx(column(found, "eval/loss")[8], rel=1e-5)
    again = checkpoint.load(root / "start")
    assert load_adapter(again, found.run.model / "adapter").rank == 2
    tokens = torch.arange(20, 32)[None]
    again.eval()
    torch.testing.assert_close(again(tokens), checkpoint.load(found.run.model)(tokens))
    # Dropout follows from seed and step.
    broken = task(root, "lora-broken", start=root / "start", lora=LORA)
    interrupted(broken, 5, monkeypatch)
    train(broken)
    assert metrics(broken) == metrics(found)


def test_lora_on_a_reward_model_trains_its_head_too(root: Path) -> None:
    found = reward_task(root, "lora-reward", lora=LORA)
    train(found)
    head = checkpoint.load_scalar(found.run.model).score.weight
    drawn = checkpoint.scalar_from(root / "start", found.seed).score.weight
    assert not torch.equal(head, drawn)
    fields = json.loads((found.run.model / "adapter" / "adapter_config.json").read_text())
    assert fields["modules_to_save"] == ["score"]
