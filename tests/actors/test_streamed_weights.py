"""Weights that come one at a time train as those of a whole module do, to the bit."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
from torch import Tensor, nn

from actors import learner, trainer
from actors.learner import LearnTask
from actors.trainer import TrainTask
from cluster.engine import Engine, EngineConfig
from cluster.run_directory import RunDirectory
from llama2 import checkpoint
from llama2.lora import LoraConfig, apply_lora
from llama2.model import ScalarModel, Transformer, initialize
from llama2.ppo import PPOSettings
from llama2.schedules import Schedule
from llama2.sequence_parallel import SequenceParallel
from tests.actors.small_tasks import config, reward_task, task
from tests.cluster.gloo import run_group

LORA = LoraConfig(rank=2, alpha=4.0)
KINDS = ("fresh", "fresh tied", "folder", "tied", "scalar", "scalar of tied", "scalar of scalar")
KINDS += ("lora", "fresh lora", "scalar lora")
CASES = [(kind, "bfloat16", 3) for kind in KINDS]
CASES += [(kind, "float32", 3) for kind in ("fresh", "tied", "scalar", "lora")]
CASES += [("fresh tied", "bfloat16", 1), ("scalar lora", "bfloat16", 2), ("folder", "float32", 0)]
Case = tuple[str, str, int]
Trained = tuple[list[float], dict[str, Tensor]]


def tasks(root: Path) -> dict[str, TrainTask]:
    fresh, scalar = task(root, "fresh"), reward_task(root, "scalar")
    tied = replace(config(), tie_word_embeddings=True)
    model = Transformer(tied)
    initialize(model, tied, seed=4)
    checkpoint.save(model, root / "tied")
    checkpoint.save(checkpoint.scalar_from(root / "start", 7), root / "critic")
    return {
        "fresh": fresh,
        "fresh tied": replace(fresh, model=tied),
        "folder": replace(fresh, start=root / "start"),
        "tied": replace(fresh, start=root / "tied"),
        "scalar": scalar,
        "scalar of tied": replace(scalar, start=root / "tied"),
        "scalar of scalar": replace(scalar, start=root / "critic"),
        "lora": replace(fresh, start=root / "start", lora=LORA),
        "fresh lora": replace(fresh, lora=LORA),
        "scalar lora": replace(scalar, lora=LORA),
    }


def whole(found: TrainTask) -> nn.Module:
    """The module with all its weights, in float32."""
    model: nn.Module
    if found.stage == "reward_model":
        assert found.start is not None
        model = checkpoint.scalar_from(found.start, found.seed)
    elif found.start is not None:
        model = checkpoint.load(found.start)
    else:
        model = Transformer(found.model)
        initialize(model, found.model, found.seed)
    if found.lora.rank:
        apply_lora(model, found.lora, found.seed)
    return model


def trained(engine: Engine) -> Trained:
    """Losses and norms of three steps, and the weights that come of them."""
    rank, numbers = torch.distributed.get_rank(), []
    generator = torch.Generator().manual_seed(5)
    for _ in range(3):
        tokens_BT = torch.randint(310, (4, 9), generator=generator)[rank::2]
        if isinstance(engine.module, ScalarModel):
            loss = (engine(tokens_BT) - 1).square().sum() / 36
        else:
            loss = -engine(tokens_BT[:, :-1], targets_BT=tokens_BT[:, 1:]).float().sum() / 32
        engine.backward(loss)
        numbers += [float(loss.detach()), engine.step()["grad_norm"]]
    weights = {name: tensor.float().clone() for name, tensor in engine.weights()}
    engine.close()
    return numbers, weights


def learners(root: Path) -> None:
    """A learner starts from the policy's weights, and the reward model's but for its head."""
    schedule = Schedule(1e-2, 3, 1)
    nothing: dict[str, Any] = dict.fromkeys(
        ("coordinator", "store", "generators", "timeout", "replicas", "eval_every", "save_every")
    )
    made, checkpoints = learner.make_learner(
        LearnTask(
            run=RunDirectory(root, "ppo"), policy=root / "start", critic=root / "critic",
            tokenizer=root, engine=EngineConfig(zero_stage=3), policy_schedule=schedule,
            value_schedule=schedule, ppo=PPOSettings(), iterations=1, micro_batch_size=1,
            keep_checkpoints=1, activation_checkpointing=True, wandb_project="", **nothing,
        )
    )  # fmt: skip
    policy = checkpoint.load(root / "start").state_dict()
    critic = checkpoint.load_scalar(root / "critic").state_dict()
    assert critic["score.weight"].any()
    critic["score.weight"].zero_()
    for engine, expected in ((made.policy.engine, policy), (made.value.engine, critic)):
        found = {name: tensor.clone() for name, tensor in engine.weights()}
        assert list(found) == list(expected)
        assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
        engine.close()
    checkpoints.close()


def worker(found: dict[str, TrainTask], path: Path) -> None:
    results: dict[Case, tuple[Trained, Trained]] = {}
    for kind, precision, stage in CASES:
        settings: Any = {"zero_stage": stage, "precision": precision}
        rest = EngineConfig(**settings), Schedule(1e-2, 3, 1)
        module, weights = trainer._module(found[kind], SequenceParallel())
        results[kind, precision, stage] = (
            trained(Engine(module, *rest, weights)),
            trained(Engine(whole(found[kind]), *rest)),
        )
    learners(path.parent)
    torch.save(results, path.with_suffix(f".{torch.distributed.get_rank()}"))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("streamed")


@pytest.fixture(scope="module")
def results(root: Path) -> list[dict[Case, tuple[Trained, Trained]]]:
    run_group(2, worker, tasks(root), root / "found.pt")
    return [torch.load(root / f"found.{rank}") for rank in range(2)]


@pytest.mark.parametrize("case", CASES)
def test_streamed_weights_train_as_a_whole_module_does(
    results: list[dict[Case, tuple[Trained, Trained]]], case: Case
) -> None:
    for result in results:
        (numbers, weights), (expected_numbers, expected) = result[case]
        assert numbers == expected_numbers
        assert len(set(numbers)) == len(numbers), "the weights do not change"
        assert list(weights) == list(expected)
        for name, tensor in weights.items():
            assert torch.equal(tensor, expected[name]), name
