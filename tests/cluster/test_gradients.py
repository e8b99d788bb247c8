"""Gradients reach DeepSpeed's float32 buffers as they are."""

import gc
import weakref

import pytest
import torch
import torch.distributed
from torch import nn

from cluster.engine import Engine, EngineConfig
from tests.cluster.gloo import run_group


def worker() -> None:
    world = torch.distributed.get_world_size()
    engine = Engine(nn.Linear(1, 1, bias=False), EngineConfig(precision="bfloat16"), lambda _: 0.0)
    weight = engine.module.weight

    def add(*factors: float) -> None:
        for factor in factors:
            engine.backward((factor * weight).sum())
            assert weight.grad is None

    # In bfloat16, which DeepSpeed reduces over ranks in, 1 + 2^-9 would be 1.
    small = 2**-9 if world == 1 else 2**-7
    add(1.0, small)
    engine.discard()
    add(4.0)
    assert engine.step()["grad_norm"] == 4 * world
    add(1.0, small)
    assert engine.step()["grad_norm"] == pytest.approx((1 + small) * world, rel=1e-6)


def forgetting() -> None:
    """Two steps; in the second one weight has no gradient, but on the first of two ranks."""
    world, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    net = nn.ModuleList([nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)])
    config = EngineConfig(precision="bfloat16", beta1=0.5, clip_grad_norm=0.0)
    engine = Engine(net, config, lambda _: 0.0)
    one, other = net.parameters()
    engine.backward((one + other).sum() / world)
    engine.step()
    has_both = world == 2 and rank == 0
    engine.backward(0.5 * (one + other if has_both else one).sum() / world)
    engine.step()
    expected = {"0.weight": 0.5 / 2 + 0.5 / 2, "1.weight": 0.5 / 2 + (world - 1) * 0.25 / 2}
    held = {fragment.name: fragment.tensors["exp_avg"] for fragment in engine.fragments()}
    assert held or rank
    assert {name: float(values) for name, values in held.items()} == {n: expected[n] for n in held}


def closing() -> None:
    engine = Engine(nn.Linear(2, 2), EngineConfig(precision="bfloat16"), lambda _: 0.0)
    engine.backward(engine(torch.ones(1, 2, dtype=torch.bfloat16)).sum())
    engine.step()
    optimizer = weakref.ref(engine._engine.optimizer)
    engine.close()
    del engine
    gc.collect()
    assert optimizer() is None


@pytest.mark.parametrize("world", [1, 2])
def test_a_weight_without_a_gradient_does_not_get_its_last_one_again(world: int) -> None:
    run_group(world, forgetting)


def test_a_closed_engine_frees_its_optimizer() -> None:
    run_group(1, closing)


@pytest.mark.parametrize("world", [1, 2])
def test_micro_batches_add_up_in_float32_and_nothing_stays_behind(world: int) -> None:
    run_group(world, worker)
