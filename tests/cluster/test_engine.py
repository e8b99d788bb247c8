"""DeepSpeed against a plain torch loop: any ZeRO stage, ranks and split give the same losses."""

import os
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed
import torch.multiprocessing
from torch import Tensor, nn

from cluster.engine import Engine, EngineConfig

STEPS, ROWS = 5, 8
CASES = [("float32", 0), ("float32", 1), ("float32", 2), ("float32", 3), ("bfloat16", 2)]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.last = nn.Linear(6, 16), nn.LayerNorm(16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(torch.tanh(self.first(x))))


def data() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(ROWS, 6, generator=generator),
            torch.randint(0, 3, (ROWS,), generator=generator),
        )
        for _ in range(STEPS)
    ]


def schedule(step: int) -> float:
    return 0.01 * (step + 1)


def loss(logits: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits.float(), labels, reduction="sum") / ROWS


def plain() -> list[float]:
    """The same training with torch alone, decay on matrices only."""
    net, config, losses = Net(), EngineConfig(), []
    groups = [
        {"params": [p for p in net.parameters() if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in net.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(config.beta1, config.beta2), eps=config.epsilon)
    for step, (x, labels) in enumerate(data()):
        value = loss(net(x), labels)
        value.backward()
        nn.utils.clip_grad_norm_(net.parameters(), config.clip_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = schedule(step)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(value))
    return losses


def train(engine: Engine, first: int, last: int, split: int) -> list[float]:
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    losses = []
    for x, labels in data()[first:last]:
        summed = torch.zeros(1)
        for part in torch.arange(ROWS)[rank::world].split(split):
            dtype = next(engine.module.parameters()).dtype
            value = loss(engine(x[part].to(dtype)), labels[part])
            engine.backward(value)
            summed += value.detach()
        engine.step()
        torch.distributed.all_reduce(summed)
        losses.append(float(summed))
    return losses


def worker(rank: int, world: int, port: int, folder: Path) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": str(rank)}
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world)}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world)
    found = {}
    for precision, stage in CASES:
        config = EngineConfig(zero_stage=stage, precision=precision)  # type: ignore[arg-type]
        engine = Engine(Net(), config, schedule)
        losses = train(engine, 0, 3, split=2)
        engine.save(folder / f"{world}-{precision}-{stage}", "net")
        losses += train(engine, 3, STEPS, split=3)
        engine.close()
        resumed = Engine(Net(), config, schedule)
        resumed.load(folder / f"{world}-{precision}-{stage}", "net")
        again = train(resumed, 3, STEPS, split=3)
        weights = {name: tensor.float().clone() for name, tensor in resumed.weights()}
        resumed.close()
        found[precision, stage] = (losses, again, weights)
    if rank == 0:
        torch.save(found, folder / f"{world}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module", params=[1, 2], ids=["one-rank", "two-ranks"])
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict:  # type: ignore[type-arg]
    folder = tmp_path_factory.mktemp("engine")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(worker, (request.param, port, folder), nprocs=request.param)
    return torch.load(folder / f"{request.param}.pt")


@pytest.mark.parametrize(("precision", "stage"), CASES)
def test_losses_equal_plain_torch(found: dict, precision: str, stage: int) -> None:  # type: ignore[type-arg]
    losses, *_ = found[precision, stage]
    tolerance = 2e-6 if precision == "float32" else 0.02
    assert losses == pytest.approx(plain(), abs=tolerance)


@pytest.mark.parametrize(("precision", "stage"), CASES)
def test_resume_goes_on_to_the_bit(found: dict, precision: str, stage: int) -> None:  # type: ignore[type-arg]
    losses, again, _ = found[precision, stage]
    assert again == losses[3:]


def test_all_stages_end_with_the_same_weights(found: dict) -> None:  # type: ignore[type-arg]
    reference = found["float32", 0][2]
    assert set(reference) == set(Net().state_dict())
    for stage in (1, 2, 3):
        for name, tensor in found["float32", stage][2].items():
            torch.testing.assert_close(tensor, reference[name], atol=2e-6, rtol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"offload_parameters": True}, "offload_parameters needs zero_stage 3"),
        ({"offload_optimizer": True, "zero_stage": 0}, "offload_optimizer needs zero_stage 1"),
        ({"precision": "bfloat16", "zero_stage": 0}, "bfloat16 needs zero_stage 1, 2 or 3"),
    ],
)
def test_impossible_settings(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EngineConfig(**options)  # type: ignore[arg-type]
