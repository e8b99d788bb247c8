"""Reward models in the loop: the auxiliary loss, and the report at the end."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from actors.reward_report import scored_pairs
from actors.steps import MicroBatches, evaluate
from actors.trainer import Trainer, TrainTask, train
from llama2 import checkpoint
from llama2.encoding import RATINGS, SAFETY_LABELS
from llama2.losses import safety_loss
from llama2.model import ScalarModel
from llama2.schedules import Schedule
from llama2.shards import Manifest, Shards, ShardWriter, SourceCounts
from tests.actors.small_tasks import CONTEXT, reward_task, sequence

pytestmark = pytest.mark.usefixtures("group_of_one")
SAFE = {"chosen_safe": (1, 0), "both_safe": (1, 1), "both_unsafe": (0, 0)}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs of which every fourth has no safety label. Safe answers are of low tokens, unsafe ones
    of high tokens, so that a model can tell them apart; the chosen one is the shorter."""
    root = tmp_path_factory.mktemp("rewards")
    reward_task(root, "first")
    for split, count in (("train", 60), ("heldout", 17)):
        random = np.random.default_rng(len(split))
        sources = {"a": SourceCounts(documents=10), "b": SourceCounts(documents=count - 10)}
        manifest = Manifest("preference", "made up", CONTEXT, sources=sources)
        writer = ShardWriter(root / "labelled" / split, manifest)
        for i in range(count):
            label = list(SAFE)[i % 3]
            ids = [range(10, 60) if safe else range(200, 260) for safe in SAFE[label]]
            pair = [
                sequence(random, n, one, 2) for n, one in zip((6 + i % 5, 18), ids, strict=True)
            ]
            writer.add(pair, i % 4, -1 if i % 4 == 3 else SAFETY_LABELS.index(label))
        writer.close()
    return root


@pytest.fixture(autouse=True)
def without_wandb(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")


def labelled(root: Path, name: str, **changes: object) -> TrainTask:
    heldout = root / "labelled" / "heldout"
    return replace(
        reward_task(root, name), data=root / "labelled" / "train", heldout=heldout,
        batch_rows=20, micro_batches=MicroBatches(400), eval_rows=99, eval_every=5,
        schedule=Schedule(3e-3, 15, 2), report_on={"safety": heldout}, **changes,
    )  # fmt: skip


def single_scores(model: ScalarModel, shards: Shards) -> list[list[float]]:
    """One forward pass per answer."""
    with torch.no_grad():
        return [
            [float(model(torch.tensor(s.tokens[None].astype(np.int64)))[0, -1]) for s in pair]
            for pair in map(shards.row, range(len(shards)))
        ]


def test_safety_loss_by_hand() -> None:
    scores, safe = torch.tensor([2.0, -1.0, 0.5]), torch.tensor([True, False, False])
    expected = math.log1p(math.exp(-2)) + math.log1p(math.exp(-1)) + math.log1p(math.exp(0.5))
    assert float(safety_loss(scores, safe, 4)) == pytest.approx(expected / 4)
    # Swapped labels are the negated scores.
    assert float(safety_loss(-scores, ~safe, 4)) == pytest.approx(expected / 4)


def test_the_loss_of_a_batch_is_the_formula_written_out(root: Path) -> None:
    attempt = Trainer(labelled(root, "formula", safety_weight=0.6, margin="large"))
    shards, module = attempt.heldout, attempt.engine.module
    assert isinstance(module, ScalarModel)
    with torch.no_grad():
        module.score.weight.normal_(0, 5, generator=torch.Generator().manual_seed(0))
    total = 0.0
    for row, (chosen, rejected) in enumerate(single_scores(module, shards)):
        total += math.log1p(math.exp(-(chosen - rejected - shards.rating(row))))
        if shards.safety(row) >= 0:
            safe = SAFE[SAFETY_LABELS[shards.safety(row)]]
            for score, is_safe in zip((chosen, rejected), safe, strict=True):
                total += 0.3 * math.log1p(math.exp(-score if is_safe else score))
    for tokens in (1, 300, 10_000):
        got = evaluate(attempt.engine, attempt.judge, range(17), MicroBatches(tokens))
        assert got["eval/loss"] == pytest.approx(total / 17, rel=1e-5)
    attempt.engine.close()


def test_the_auxiliary_loss_raises_unsafe_recall(root: Path) -> None:
    """Pairs with two unsafe answers say nothing on where zero lies, unless told."""
    recall = {}
    for weight in (0.0, 2.0):
        found = labelled(root, f"aux-{weight}", safety_weight=weight)
        train(found)
        summary = found.run.summary()
        assert summary is not None
        (row,) = summary["unsafe_answers_at_0.5"]
        recall[weight] = row["unsafe recall"] + row["safe recall"]
    assert recall[2.0] > 1.9
    assert recall[0.0] < recall[2.0] - 0.2


def test_the_report_is_of_the_exported_model(root: Path) -> None:
    found = labelled(root, "reported", safety_weight=1.0)
    train(found)
    shards = Shards(found.heldout)
    scores = single_scores(checkpoint.load_scalar(found.run.model), shards)
    right = [float(chosen > rejected) for chosen, rejected in scores]
    report = json.loads((found.run.path / "report.json").read_text())
    assert report["headline"]["heldout/accuracy"] == pytest.approx(np.mean(right))
    rows = {row["pairs of"]: row["accuracy"] for row in report["accuracy_by_data_set"]}
    assert rows == pytest.approx({"safety/a": np.mean(right[:10]), "safety/b": np.mean(right[10:])})
    for number, rating in enumerate(RATINGS):
        mine = [r for i, r in enumerate(right) if i % 4 == number]
        name = f"heldout/accuracy/{rating.replace(' ', '_')}"
        assert report["headline"][name] == pytest.approx(np.mean(mine))
    chosen = next(row for row in report["score_distributions"] if row["answers"] == "chosen")
    assert chosen["mean"] == pytest.approx(np.mean([pair[0] for pair in scores]), rel=1e-4)
    # What is told at the end of training is the same.
    summary = found.run.summary()
    assert summary is not None
    assert summary["heldout/accuracy"] == report["headline"]["heldout/accuracy"]
    assert summary["length_bias"] == report["length_bias"]
    lengths = [[int(s.is_target.sum()) for s in shards.row(i)] for i in range(17)]
    gaps = [chosen - rejected for chosen, rejected in scores]
    expected = np.corrcoef(gaps, [a - b for a, b in lengths])[0, 1]
    assert report["length_bias"][1]["value"] == pytest.approx(expected, rel=1e-3)


def test_fewer_pairs_than_there_are(root: Path) -> None:
    attempt = Trainer(labelled(root, "few"))
    shards, layout = attempt.heldout, MicroBatches(50)
    whole = scored_pairs(attempt.engine, "safety", shards, range(17), layout)
    some = scored_pairs(attempt.engine, "safety", shards, [16, 3, 9], layout)
    for pair, row in zip(some, (16, 3, 9), strict=True):
        assert pair.chosen == pytest.approx(whole[row].chosen, rel=1e-5)
        assert replace(pair, chosen=0, rejected=0) == replace(whole[row], chosen=0, rejected=0)
    assert [pair.data for pair in some] == ["safety/b", "safety/a", "safety/a"]
    attempt.engine.close()
