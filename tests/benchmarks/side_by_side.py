"""Timing contenders side by side: each in a process of its own, one step of each in turn.

Machines are noisy, so numbers of different minutes do not compare; ratios of neighbouring steps do.
"""

import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch

from cluster.session import WORKER_ENVIRONMENT

THREADS = 2
PAUSE = 0.5
"""Seconds before each step, in which the threads of the one before go to sleep: vLLM's wait for
work for a fifth of a second, which would be the next one's loss."""
Step = Callable[[], Any]


@dataclass(frozen=True)
class Contender:
    """What is timed: `make(*arguments)` returns the step; both run in the contender's process."""

    name: str
    make: Callable[..., Step]
    arguments: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Timing:
    """Seconds of each step, in order, and the process's highest resident memory in MiB."""

    seconds: tuple[float, ...]
    peak_mib: float

    @property
    def best(self) -> float:
        return min(self.seconds)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def _serve(connection: Connection, contender: Contender) -> None:
    torch.set_num_threads(THREADS)
    step = contender.make(*contender.arguments)
    connection.send(None)
    while connection.recv():
        started = time.perf_counter()
        step()
        seconds = time.perf_counter() - started
        connection.send((seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024))


class _Running:
    def __init__(self, contender: Contender) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, contender), daemon=True)
        self.process.start()
        theirs.close()
        self.connection.recv()
        self.seconds: list[float] = []
        self.peak = 0.0

    def step(self) -> None:
        self.connection.send(True)
        seconds, self.peak = self.connection.recv()
        self.seconds.append(seconds)

    def stop(self) -> None:
        self.connection.send(False)
        self.process.join()


def measure(contenders: Sequence[Contender], steps: int, warmup: int = 2) -> dict[str, Timing]:
    """Time `steps` steps of each contender, in turn, after `warmup` that are not counted."""
    running = {contender.name: _Running(contender) for contender in contenders}
    for _ in range(warmup + steps):
        for each in running.values():
            time.sleep(PAUSE)
            each.step()
    for each in running.values():
        each.stop()
    return {name: Timing(tuple(each.seconds[warmup:]), each.peak) for name, each in running.items()}


def ratio(slow: Timing, fast: Timing) -> float:
    """How many times as fast: the median over the turns, in which the two ran one after another."""
    return statistics.median(a / b for a, b in zip(slow.seconds, fast.seconds, strict=True))


def with_worker_environment() -> None:
    """Give child processes the environment that the jobs give their workers."""
    import os

    os.environ.update(WORKER_ENVIRONMENT)


def matmul() -> Step:
    """A large bfloat16 product: what this machine can do at most."""
    matrix = torch.randn(MATMUL_WIDTH, MATMUL_WIDTH).bfloat16()
    return lambda: matrix @ matrix


MATMUL_WIDTH = 4096
MATMUL_FLOPS = 2 * MATMUL_WIDTH**3
