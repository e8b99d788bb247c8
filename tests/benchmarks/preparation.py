"""Speed and memory of data preparation on text that is made up here: cleaning with all rules,
near-duplicates, tokenizing and packing.

python -m tests.benchmarks.preparation [megabytes]
"""

import multiprocessing
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from cluster import data
from cluster.run_directory import RunDirectory
from cluster.session import ClusterConfig, session
from jobs import prepare
from jobs.prepare_config import PrepareConfig
from jobs.presets import preset
from llama2.shards import read_manifest
from tests.corpora import write_corpus

PART = 1 << 21


def config(runs: Path, name: str, corpus: Path) -> PrepareConfig:
    """The paper's context, and a tokenizer that is trained before the clock starts."""
    return replace(
        preset("tiny").prepare, runs=runs, name=name, text=(corpus,), context=4096,
        vocab_size=4096, part_bytes=PART, shard_tokens=1 << 21, tokenizer=tokenizer(runs),
    )  # fmt: skip


def tokenizer(runs: Path) -> Path:
    """A tokenizer of 4,096 ids for the made-up text."""
    from llama2.tokenizer import train_tokenizer
    from tests.corpora import sentences

    if not (runs / "tokenizer").exists():
        train_tokenizer(sentences(0), 4096, runs / "tokenizer")
    return runs / "tokenizer"


def run(given: PrepareConfig) -> tuple[float, int]:
    """Seconds that a preparation takes, and the tokens it gives."""
    directory = RunDirectory(given.runs, given.name)
    started = time.perf_counter()
    prepare.prepare(given, prepare.sources(given), directory)
    elapsed = time.perf_counter() - started
    splits = (directory.path / "pretrain" / split for split in ("train", "heldout"))
    return elapsed, sum(read_manifest(folder).tokens for folder in splits)


def memory(given: PrepareConfig) -> tuple[int, int]:
    """Bytes resident, before and at most during a preparation, in a process that does all of its
    tasks, one by one."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_memory, (given,))


def _memory(given: PrepareConfig) -> tuple[int, int]:
    def serial(step: Any, count: int, cpus: float) -> Iterator[str]:
        for number in range(count):
            yield step({"id": number})["error"]

    data._run = serial
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of the imports
    before = _resident("VmRSS")
    run(given)
    return before, _resident("VmHWM")


def _resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def main(megabytes: int) -> None:
    """Print what was measured."""
    with tempfile.TemporaryDirectory() as folder:
        runs = Path(folder)
        corpus = write_corpus(runs / "corpus.jsonl", megabytes << 20, seed=1)
        size = corpus.stat().st_size / 1e6
        print(f"{size:.0f} MB of JSON lines in parts of {PART / 1e6:.1f} MB")
        seconds: dict[int, float] = {}
        with session(ClusterConfig(local_cpus=2)):
            run(config(runs, "warm", write_corpus(runs / "warm.jsonl", 2 * PART, seed=2)))
            for cpus in (2, 1):  # both workers are warm now, and an idle one is soon ended
                given = replace(config(runs, f"cpus{cpus}", corpus), cpus=2 / cpus)
                seconds[cpus], tokens = run(given)
        print(f"{'CPUs':>6} {'seconds':>9} {'MB/s':>7} {'tokens/s':>10} {'growth':>7}")
        for cpus in (1, 2):
            print(
                f"{cpus:>6} {seconds[cpus]:>9.1f} {size / seconds[cpus]:>7.2f} "
                f"{tokens / seconds[cpus]:>10,.0f} {seconds[1] / seconds[cpus]:>6.2f}x"
            )
        print(f"{'parts':>6} {'MB before':>10} {'MB at most':>11}")
        for parts in (1, 10):
            text = write_corpus(runs / f"parts{parts}.jsonl", parts * PART, seed=3)
            before, peak = memory(config(runs, f"parts{parts}", text))
            print(f"{parts:>6} {before / 1e6:>10.0f} {peak / 1e6:>11.0f}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 16)
