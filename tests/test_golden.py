"""Loss and gradient norm of 20 steps of each stage, against committed curves.

In one process, on the CPU, in float32. A change that is meant to alter numbers makes them anew:

    python -m tests.test_golden

Then look at the difference: each curve should change for a reason that you can name.
"""

import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from actors import learner, objectives
from actors.learner import Learner, LearnTask
from actors.policy import Policy
from actors.records import Experience, Sample
from actors.steps import MicroBatches
from actors.trainer import Trainer, TrainTask
from actors.value import Value
from cluster.engine import Engine, EngineConfig
from cluster.run_directory import RunDirectory
from cluster.weights import Version
from llama2 import checkpoint
from llama2.batches import TokenBatch, pack, pad_right
from llama2.config import ModelConfig
from llama2.encoding import encode
from llama2.lora import LoraConfig
from llama2.losses import IGNORE
from llama2.model import ScalarModel, Transformer, initialize
from llama2.packing import best_fit
from llama2.ppo import PPOSettings
from llama2.records import Comparison, Dialogue, Document
from llama2.schedules import Schedule
from llama2.shards import Manifest, ShardWriter
from llama2.sources import WorldSource
from llama2.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from tests.actors.small_learning import experience
from tests.conftest import group

GOLDEN = Path(__file__).parent / "golden"
STEPS, RECORDS, CONTEXT, VOCABULARY = 20, 40, 160, 400
BRIEF = 12  # steps after which a mistake is plain
# Relative. Other thread counts, micro-batches, and weights that are off by a millionth stay below a
# twentieth of it to the end.
LOSS_TOLERANCE, NORM_TOLERANCE = 3e-4, 3e-3
RATES = {"pretrain": 1e-2, "sft": 1e-2, "reward_model": 1e-3}
STAGES = ("pretrain", "sft", "reward_model", "ppo")
Curve = dict[str, list[float]]


def model_config() -> ModelConfig:
    return ModelConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=CONTEXT,
    )  # fmt: skip


@lru_cache(maxsize=1)
def inputs() -> Path:
    """Tokenizer, start model and rows of a few records of the world, made once per process."""
    folder = Path(tempfile.mkdtemp(prefix="golden-"))
    texts = [r.text for r in records("pretrain") if isinstance(r, Document)]
    train_tokenizer(texts, VOCABULARY, folder / "tokenizer")
    tokenizer = load_tokenizer(folder / "tokenizer")
    model = Transformer(model_config())
    initialize(model, model_config(), seed=1)
    checkpoint.save(model, folder / "start", tokenizer.files())
    for stage, kind in (("pretrain", "pretrain"), ("sft", "sft"), ("reward_model", "helpfulness")):
        write_rows(folder / stage, tokenizer, kind)
    return folder


def records(kind: Any) -> list[Document | Dialogue | Comparison]:
    return list(WorldSource(kind, seed=0, size=RECORDS).part(0))


def write_rows(folder: Path, tokenizer: Tokenizer, kind: Any) -> None:
    pairs = kind == "helpfulness"
    writer = ShardWriter(folder, Manifest("preference" if pairs else kind, "golden", CONTEXT))
    rows = [row for record in records(kind) for row in encode(record, tokenizer, CONTEXT)]
    if pairs:
        for row in rows:
            writer.add(row.sequences, rating=row.rating)
    else:
        documents = [sequence for row in rows for sequence in row.sequences]
        lengths = [len(document.tokens) - 1 for document in documents]
        for packed in best_fit(lengths, CONTEXT):
            writer.add([documents[i] for i in packed])
    writer.close()


def train_task(stage: Any, kind: Any = "cosine") -> TrainTask:
    folder = inputs()
    start = None if stage == "pretrain" else folder / "start"
    run = RunDirectory(Path(tempfile.mkdtemp(dir=folder)), stage)
    return TrainTask(
        stage=stage, run=run, data=folder / stage, heldout=folder / stage, start=start,
        model=model_config(), engine=EngineConfig(zero_stage=1),
        schedule=Schedule(RATES[stage], STEPS, 4, kind), tokenizer=folder / "tokenizer",
        batch_rows=4, micro_batches=MicroBatches(400), eval_rows=4, eval_every=0, save_every=STEPS,
        keep_checkpoints=1, patience=0, keep_best=False, on_bad_loss="stop", seed=0,
        lora=LoraConfig(), margin="large",
    )  # fmt: skip


def train_curve(task: TrainTask, steps: int = STEPS) -> Curve:
    trainer = Trainer(task)
    lines = [trainer.step(step) for step in range(steps)]
    trainer.engine.close()
    return {name: [line[name] for line in lines] for name in ("loss", "grad_norm")}


PPO = PPOSettings(kl_coefficient=0.2, value_clip_range=0.02)


def ppo_worker(settings: PPOSettings, rate: float) -> Learner:
    """A learner's only worker; nothing samples for it, and nothing takes its weights."""
    folder = inputs()
    policy, critic = checkpoint.load(folder / "start"), ScalarModel(model_config())
    initialize(critic, model_config(), seed=2)
    torch.nn.init.zeros_(critic.score.weight)
    schedule, engine = Schedule(rate, STEPS, kind="constant"), EngineConfig(zero_stage=1)
    nothing: dict[str, Any] = dict.fromkeys(
        ("coordinator", "store", "generators", "timeout", "replicas", "eval_every", "save_every")
    )
    task = LearnTask(
        run=RunDirectory(folder, "ppo"), policy=folder, critic=folder, tokenizer=folder,
        engine=engine, policy_schedule=schedule, value_schedule=schedule, ppo=settings,
        iterations=5, micro_batch_size=3, keep_checkpoints=1, activation_checkpointing=False,
        wandb_project="", **nothing,
    )  # fmt: skip
    return Learner(
        task,
        Policy(Engine(policy, engine, schedule), settings.clip_range),
        Value(Engine(critic, engine, schedule), settings.value_clip_range),
    )


def ppo_curve(
    settings: PPOSettings = PPO, rate: float = 3e-3, iterations: int = STEPS // 4
) -> Curve:
    """Iterations of four minibatches on the same answers, chosen ones good, others bad."""
    worker, curve = ppo_worker(settings, rate), Curve()
    totals = [sum(len(e.sample.response) for e in minibatch) for minibatch in samples()]
    for _ in range(iterations):
        for batch, total in zip(worker.experience(samples()), totals, strict=True):
            line = worker.update([batch], [total])
            for name in ("loss", "value/loss", "policy/grad_norm", "value/grad_norm"):
                curve.setdefault(name, []).append(line[name])
    for engine in worker.engines.values():
        engine.close()
    return curve


@lru_cache(maxsize=1)
@torch.no_grad()
def samples() -> list[list[Experience]]:
    """Four minibatches of eight answers with the initial policy's log-probabilities."""
    tokenizer = load_tokenizer(inputs() / "tokenizer")
    reference = checkpoint.load(inputs() / "start")
    found: list[Experience] = []
    for record in records("helpfulness")[:16]:
        for row in encode(record, tokenizer, CONTEXT):
            for sequence, score in zip(row.sequences, (1.0, -1.0), strict=True):
                batch = pack([[sequence]])
                logprobs = reference(
                    batch.tokens_BT, batch.segments_BT, targets_BT=batch.targets_BT
                )
                prompt = int(np.argmax(sequence.is_target))
                tokens = np.asarray(sequence.tokens, dtype=np.int64)
                sample = Sample(
                    str(len(found)), tokens[:prompt], tokens[prompt:], logprobs.numpy(),
                    Version(0, ""), finish_reason="stop",
                )  # fmt: skip
                found.append(experience(sample, logprobs.numpy(), score))
    assert len(found) == 32
    return [found[start : start + 8] for start in range(0, 32, 8)]


def curve(stage: str, steps: int = STEPS) -> Curve:
    if stage == "ppo":
        return ppo_curve(iterations=steps // 4)
    return train_curve(train_task(stage), steps)


def golden(stage: str) -> Curve:
    found: Curve = json.loads((GOLDEN / f"{stage}.json").read_text())
    return found


def difference(found: Curve, expected: Curve) -> float:
    """The largest deviation, 1 being what is allowed, as far as `found` goes. PPO's policy loss,
    near zero by itself, is compared by the size of the largest."""
    assert found.keys() == expected.keys()
    worst = 0.0
    for name, values in expected.items():
        tolerance = NORM_TOLERANCE if name.endswith("grad_norm") else LOSS_TOLERANCE
        largest = max(abs(value) for value in values)
        for now, then in zip(found[name], values, strict=False):
            scale = abs(then) if name != "loss" or abs(then) > 0.5 else largest
            worst = max(worst, abs(now - then) / (tolerance * scale))
    return worst


pytestmark = pytest.mark.usefixtures("group_of_one")


@pytest.mark.parametrize("stage", STAGES)
def test_curves_are_those_committed(stage: str) -> None:
    expected = golden(stage)
    found = curve(stage)
    assert {len(values) for values in (*found.values(), *expected.values())} == {STEPS}
    assert difference(found, expected) < 1


def test_training_learns() -> None:
    """The curves themselves are those of a training that works."""
    for stage in ("pretrain", "sft", "reward_model"):
        losses = golden(stage)["loss"]
        assert np.mean(losses[10:]) < np.mean(losses[:10]) - 0.1
    values = golden("ppo")["value/loss"]
    assert np.mean(values[-4:]) < 0.9 * np.mean(values[:4])


@contextmanager
def patched(place: Any, name: str, value: Any) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(place, name, value)
        yield


def ascend(engine: Engine, loss: torch.Tensor) -> None:
    engine._engine.backward(-loss, scale_wrt_gas=False)


def one_document(rows: Any, width: int | None = None) -> TokenBatch:
    """Rows whose documents see each other."""
    batch = pack(rows, width)
    return replace(batch, segments_BT=(batch.segments_BT > 0).long())


def all_targets(rows: Any, width: int | None = None) -> TokenBatch:
    """Prompts are learnt as well."""
    return pack([[replace(d, is_target=d.is_target | True) for d in row] for row in rows], width)


def late_targets(rows: Any, width: int | None = None) -> TokenBatch:
    """Every place predicts the token after the next."""
    batch = pack(rows, width)
    shifted = torch.full_like(batch.targets_BT, IGNORE)
    shifted[:, :-1] = batch.targets_BT[:, 1:]
    return replace(batch, targets_BT=shifted)


def early_end(sequences: Any) -> Any:
    """Scores are read one token before the last."""
    tokens_BT, segments_BT, is_last_BT = pad_right(sequences)
    return tokens_BT, segments_BT, is_last_BT.roll(-1, dims=1)


BROKEN: dict[str, tuple[Sequence[str], Any, str, Any]] = {
    "sign": (STAGES, Engine, "backward", ascend),
    "segments": (("pretrain", "sft"), objectives, "pack", one_document),
    "mask": (("sft",), objectives, "pack", all_targets),
    "targets": (("pretrain", "sft"), objectives, "pack", late_targets),
    "last token": (("reward_model",), objectives, "pad_right", early_end),
    "margin": (("reward_model",), objectives, "MARGINS", {"large": (0.0, 1.0, 2.0, 2.9)}),
    "whitening": (("ppo",), learner, "whiten_advantages", lambda minibatches: minibatches),
}
CASES = [(what, stage) for what, (stages, *_) in BROKEN.items() for stage in stages]


@pytest.mark.parametrize(("what", "stage"), CASES)
def test_what_is_broken_is_noticed(what: str, stage: str) -> None:
    _, place, name, value = BROKEN[what]
    with patched(place, name, value):
        assert difference(curve(stage, BRIEF), golden(stage)) > 3


@pytest.mark.parametrize("stage", ["pretrain", "sft", "reward_model"])
def test_a_wrong_schedule_is_noticed(stage: str) -> None:
    assert difference(train_curve(train_task(stage, "constant"), BRIEF), golden(stage)) > 3


CHANGED: dict[str, Callable[[], Curve]] = {
    "beta": lambda: ppo_curve(replace(PPO, kl_coefficient=0.0), iterations=2),
    "clip": lambda: ppo_curve(replace(PPO, clip_range=0.4), iterations=2),
    "value clip": lambda: ppo_curve(replace(PPO, value_clip_range=None), iterations=2),
    "lambda": lambda: ppo_curve(replace(PPO, lam=1.0), iterations=2),
    "rate": lambda: ppo_curve(rate=3.1e-3, iterations=2),
}


@pytest.mark.parametrize("what", CHANGED)
def test_wrong_numbers_of_ppo_are_noticed(what: str) -> None:
    assert difference(CHANGED[what](), golden("ppo")) > 3


def main() -> None:
    """Make all curves anew."""
    GOLDEN.mkdir(exist_ok=True)
    with group(Path(tempfile.mkdtemp())):
        for stage in STAGES:
            (GOLDEN / f"{stage}.json").write_text(json.dumps(curve(stage), indent=1) + "\n")


if __name__ == "__main__":
    main()
