"""The learner's update and its state, in one process on answers that lie ready."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from actors.learner import Learner, _identity
from cluster.checkpoints import Checkpoints
from tests.test_golden import PPO, ppo_worker, samples

pytestmark = pytest.mark.usefixtures("group_of_one")


def weights(worker: Learner) -> dict[str, Tensor]:
    return {
        f"{role}.{name}": tensor.clone()
        for role, engine in worker.engines.items()
        for name, tensor in engine.weights()
    }


def iterate(worker: Learner) -> dict[str, float]:
    totals = [sum(len(e.sample.response) for e in minibatch) for minibatch in samples()]
    found = worker.update(worker.experience(samples()), totals)
    return {name: value for name, value in found.items() if not name.startswith("time/")}


def close(worker: Learner) -> None:
    for engine in worker.engines.values():
        engine.close()


def test_a_learner_goes_on_to_the_bit_from_a_checkpoint(tmp_path: Path) -> None:
    first = ppo_worker(PPO, 3e-3)
    saved = Checkpoints(tmp_path, _identity(first))
    iterate(first)
    saved.save(first.iteration, first.engines, {})
    expected = [iterate(first), iterate(first)]
    saved.close()

    second = ppo_worker(PPO, 3e-3)
    found = Checkpoints(tmp_path, _identity(second)).load(second.engines)
    assert found is not None
    assert found.step == 1
    second.iteration = found.step
    assert [iterate(second), iterate(second)] == expected
    after = weights(second)
    assert all(torch.equal(tensor, after[name]) for name, tensor in weights(first).items())

    other = ppo_worker(replace(PPO, lam=0.5), 3e-3)
    with pytest.raises(ValueError, match=r"ppo.lam \(0.95 there, 0.5 now\)"):
        Checkpoints(tmp_path, _identity(other)).load(other.engines)
    for worker in (first, second, other):
        close(worker)


def test_a_reward_that_is_no_number_stops_before_the_weights_change() -> None:
    worker = ppo_worker(PPO, 3e-3)
    before = weights(worker)
    totals = [sum(len(e.sample.response) for e in minibatch) for minibatch in samples()]
    batches = worker.experience(samples())
    broken = [replace(batch, advantages_BT=batch.advantages_BT * math.nan) for batch in batches[1]]
    with pytest.raises(FloatingPointError, match="policy loss is nan in iteration 0, minibatch 1"):
        worker.update([batches[0], broken], totals[:2])
    once = ppo_worker(PPO, 3e-3)
    once.update([batches[0]], totals[:1])
    after = weights(worker)
    for name, tensor in weights(once).items():
        if name.startswith("policy"):  # the value model's own loss is one
            assert torch.equal(tensor, after[name])
    assert not torch.equal(after["policy.lm_head.weight"], before["policy.lm_head.weight"])
    close(worker)
    close(once)
