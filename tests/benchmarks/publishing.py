"""What it costs to publish a model's weights, beside a plain copy of the same bytes.

python -m tests.benchmarks.publishing

A Ray Train worker publishes a model of 110M parameters to two generators on Ray Serve as a learner
does, checksums and receipts included, once in two seconds, as between iterations of PPO. Before
each time it copies as many bytes within its memory, with one thread, three times; the best counts.
The first publication is told apart: it meets memory that no one has touched yet.
"""

import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import ray
import torch
from ray import serve

from actors.generator import deploy
from actors.generator_config import GeneratorConfig
from cluster import publishing
from cluster.engine import Engine, EngineConfig
from cluster.placement import Workers
from cluster.run_directory import RunDirectory
from cluster.session import ClusterConfig, session
from cluster.training import run_workers
from cluster.weights import WeightStore
from llama2 import checkpoint
from llama2.config import ModelConfig
from llama2.model import Transformer, initialize

CONFIG = ModelConfig(
    vocab_size=32_000, hidden_size=768, intermediate_size=2048, num_hidden_layers=12,
    num_attention_heads=12, num_key_value_heads=12, max_position_embeddings=512,
    tie_word_embeddings=True,
)  # fmt: skip
REPLICAS = 2
TIMES = 20
PAUSE = 2.0
PATIENCE = 60.0
"""Seconds to wait for the store or the generators."""

Precision = Literal["bfloat16", "float32"]


@dataclass(frozen=True)
class Turns:
    """What the worker does: whose weights it publishes, to whom, and where it writes times."""

    folder: Path
    precision: Precision
    store: Any
    generators: Any
    times: Path


def take_turns(turns: Turns) -> None:
    """Time copies and publications, one after the other."""
    model = checkpoint.load(turns.folder, dtype=getattr(torch, turns.precision))
    engine = Engine(model, EngineConfig(zero_stage=1, precision=turns.precision), lambda _: 1e-4)
    size = sum(t.numel() * t.itemsize for bucket in engine.buckets() for _, t in bucket)
    source, target = np.ones(size, np.uint8), np.ones(size, np.uint8)
    attempt = publishing.enter(turns.store, PATIENCE)

    def refresh(seconds: float) -> list[Any]:
        called = turns.generators.broadcast("refresh")
        return list(called.results(timeout_s=seconds, return_exceptions=True))

    def copy() -> float:
        started = time.perf_counter()
        np.copyto(target, source)
        return time.perf_counter() - started

    lines = []
    for number in range(TIMES + 1):
        time.sleep(PAUSE)
        copied, started = min(copy() for _ in range(3)), time.perf_counter()
        version = publishing.put(engine.buckets(), number, attempt, turns.store, PATIENCE)
        written = time.perf_counter()
        publishing.confirm(version, refresh, turns.store, REPLICAS, PATIENCE)
        ended = time.perf_counter()
        lines.append(f"{size} {copied} {written - started} {ended - written}\n")
    turns.times.write_text("".join(lines))
    engine.close()


def compare(precision: Precision, folder: Path) -> None:
    """Print what publishing costs in a precision."""
    store = WeightStore.remote()  # type: ignore[attr-defined]
    name = f"publishing-{precision}"
    config = GeneratorConfig(count=REPLICAS, cpus=0.1, cache_gib=0.1)
    generators = deploy(name, folder / "model", store, precision, config)
    run, times = RunDirectory(folder, name), folder / f"times-{precision}"
    run.open({})
    turns = Turns(folder / "model", precision, store, generators, times)
    run_workers(take_turns, turns, Workers(cpus=0.5), run, 0)
    rows = [[float(x) for x in line.split()] for line in times.read_text().splitlines()]
    first, *rest = rows
    size, copied, put, confirmed = (statistics.median(column) for column in zip(*rest, strict=True))
    ratios = sorted((row[2] + row[3]) / row[1] for row in rest)
    print(
        f"{precision}: {size / 1e6:.0f} MB to {REPLICAS} replicas in "
        f"{1e3 * (put + confirmed):.1f} ms (written {1e3 * put:.1f}, taken and summed up "
        f"{1e3 * confirmed:.1f}), a plain copy {1e3 * copied:.1f} ms: "
        f"{statistics.median(ratios):.2f} times as long ({ratios[0]:.2f} to {ratios[-1]:.2f}); "
        f"the first time {1e3 * (first[2] + first[3]):.0f} ms",
        flush=True,
    )
    serve.delete(name)
    ray.kill(store)


def main() -> None:
    """Print a line per precision."""
    with tempfile.TemporaryDirectory() as made, session(ClusterConfig()):
        folder = Path(made)
        model = Transformer(CONFIG)
        initialize(model, CONFIG, seed=0)
        checkpoint.save(model, folder / "model", {})
        compare("bfloat16", folder)
        compare("float32", folder)


if __name__ == "__main__":
    main()
