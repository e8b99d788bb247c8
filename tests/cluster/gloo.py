"""Groups of processes for tests, a tiny model, and its training."""

import gc
import multiprocessing
import os
import socket
import warnings
from collections.abc import Callable
from operator import itemgetter
from typing import Any
from unittest import mock

import torch
import torch.distributed
import torch.multiprocessing
from torch import Tensor, nn

from cluster.engine import Engine, EngineConfig

STEPS, ROWS = 5, 8
# What a group would import first of all; the last two are DeepSpeed's doing.
PRELOADED = [
    "cluster.checkpoints",
    "deepspeed",
    "torch._dynamo",
    "deepspeed.runtime.zero.muon.muon_optimizer",
]
State = dict[tuple[str, str], Tensor]
Case = tuple[str, int, str]
"""Precision, ZeRO stage, where the optimizer state is."""


class Net(nn.Module):
    """A model small enough for thousands of steps; sizes that two ranks cannot share evenly."""

    def __init__(self, width: int = 15) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(6, width)
        self.norm, self.last = nn.LayerNorm(width), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(torch.tanh(self.first(x))))


def engine_of(case: Case, net: Net | None = None) -> Engine:
    precision, stage, offload = case
    config = EngineConfig(
        zero_stage=stage,  # type: ignore[arg-type]
        precision=precision,  # type: ignore[arg-type]
        offload_optimizer=offload,  # type: ignore[arg-type]
    )
    return Engine(net or Net(), config, schedule)


def changed_net() -> Net:
    net = Net()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(-2.0).add_(1.0)
    return net


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


def train(engine: Engine, first: int, last: int, split: int) -> tuple[list[float], list[float]]:
    """Losses and gradient norms of the steps from `first` to before `last`."""
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    dtype = next(engine.module.parameters()).dtype
    losses, norms = [], []
    for x, labels in data()[first:last]:
        summed = torch.zeros(1, device=engine.device)
        for part in torch.arange(ROWS)[rank::world].split(split):
            logits = engine(x[part].to(engine.device, dtype))
            value = loss(logits, labels[part].to(engine.device))
            engine.backward(value)
            summed += value.detach()
        norms.append(engine.step()["grad_norm"])
        torch.distributed.all_reduce(summed)
        losses.append(float(summed))
    return losses, norms


def whole_state(engine: Engine) -> State:
    """Weights and optimizer state, put together from the fragments of all ranks."""
    mine = [
        (fragment.name, kind, fragment.start, tensor.cpu().clone())
        for fragment in engine.fragments()
        for kind, tensor in fragment.tensors.items()
    ]
    parts: list[list[tuple[str, str, int, Tensor]]] = [[]] * engine.world_size
    torch.distributed.all_gather_object(parts, mine)
    state: State = {}
    for name, kind, start, tensor in sorted((p for part in parts for p in part), key=itemgetter(2)):
        before = state.get((name, kind), torch.zeros(0))
        assert len(before) == start, "the ranks' shares overlap or leave gaps"
        state[name, kind] = torch.cat([before, tensor])
    return state


def differences(state: State, other: State) -> list[tuple[str, str]]:
    """What is not the same to the bit."""
    names = {**state, **other}
    return [
        key
        for key in names
        if key not in state or key not in other or not torch.equal(state[key], other[key])
    ]


def start_group(rank: int, world: int, port: int, backend: str = "gloo") -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": str(rank)}
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world)}
    warnings.filterwarnings("ignore", category=FutureWarning)
    torch.set_num_threads(1)
    gc.freeze()  # DeepSpeed collects garbage often, and going through all modules takes long
    torch.distributed.init_process_group(backend, rank=rank, world_size=world)


def _enter(
    rank: int, world: int, port: int, backend: str, function: Callable[..., None], *rest: Any
) -> None:
    start_group(rank, world, port, backend)
    function(*rest)
    torch.distributed.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def run_group(world: int, function: Callable[..., None], *arguments: Any) -> None:
    """Run `function(*arguments)` in a gloo group of `world` processes on the CPU."""
    everything = (world, _free_port(), "gloo", function, *arguments)
    # Imports take seconds: a server makes them once and forks the processes.
    multiprocessing.set_forkserver_preload(PRELOADED)
    with mock.patch.dict(os.environ, CUDA_VISIBLE_DEVICES=""):
        torch.multiprocessing.start_processes(
            _enter, everything, nprocs=world, start_method="forkserver"
        )


def run_on_gpu(function: Callable[..., None], *arguments: Any) -> None:
    """Run `function(*arguments)` in a process with a GPU."""
    torch.multiprocessing.spawn(_enter, (1, _free_port(), "nccl", function, *arguments))
