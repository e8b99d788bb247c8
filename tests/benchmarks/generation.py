"""Generation against vLLM and transformers, side by side in one run, and how its cost grows.

python -m tests.benchmarks.generation            # after `make vllm`
python -m tests.benchmarks.generation --only mixed
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import count
from multiprocessing import get_context
from multiprocessing.util import Finalize
from pathlib import Path

import numpy as np
import torch

from actors.generator import deploy
from actors.generator_config import GeneratorConfig
from actors.records import Request
from actors.served_model import CHUNK
from cluster.session import ClusterConfig, session
from llama2 import checkpoint
from llama2.config import ModelConfig
from llama2.generation import Engine, Sampling
from llama2.generation.runner import bytes_per_token
from llama2.model import Transformer, initialize
from tests.benchmarks.side_by_side import (
    THREADS,
    Contender,
    Step,
    Timing,
    measure,
    ratio,
    with_worker_environment,
)

VOCABULARY = 32_000
CACHE_BYTES = 2**31
"""Of keys and values, taken before the first request, as vLLM's are here."""
VLLM = Path(".venv-vllm/bin/python")


@dataclass(frozen=True)
class Workload:
    """A model's shape, and requests of one length."""

    width: int
    layers: int
    heads: int
    wide: int
    requests: int
    prompt: int
    new: int

    @property
    def config(self) -> ModelConfig:
        return ModelConfig(
            vocab_size=VOCABULARY,
            hidden_size=self.width,
            intermediate_size=self.wide,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.heads,
            max_position_embeddings=2048,
        )


WORKLOADS = {
    "24M, 64 x (64 + 128)": Workload(288, 6, 6, 768, 64, 64, 128),
    "134M, 32 x (64 + 64)": Workload(768, 12, 12, 2048, 32, 64, 64),
}
SMALL = WORKLOADS["24M, 64 x (64 + 128)"]


def prompts(requests: int, tokens: int, seed: int) -> list[list[int]]:
    generator = np.random.default_rng(seed)
    found: list[list[int]] = generator.integers(3, VOCABULARY, (requests, tokens)).tolist()
    return found


def endless(tokens: int) -> Sampling:
    """Temperature 1, to the last token."""
    return Sampling(max_new_tokens=tokens, stop_ids=())


def model(work: Workload) -> Transformer:
    made = Transformer(work.config)
    initialize(made, work.config, seed=0)
    return made.bfloat16().eval().requires_grad_(False)


def ours(work: Workload) -> Step:
    held = CACHE_BYTES // bytes_per_token(work.config, torch.bfloat16)
    engine, seeds = Engine(model(work), cache_tokens=held), count()

    def step() -> None:
        made = engine.generate(prompts(work.requests, work.prompt, next(seeds)), endless(work.new))
        assert sum(len(completion.tokens) for completion in made) == work.requests * work.new

    return step


def with_transformers(work: Workload) -> Step:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=work.width, intermediate_size=work.wide,
        num_hidden_layers=work.layers, num_attention_heads=work.heads,
        max_position_embeddings=2048,
    )  # fmt: skip
    theirs, seeds = LlamaForCausalLM(config).bfloat16().eval(), count()

    def step() -> None:
        inputs = torch.tensor(prompts(work.requests, work.prompt, next(seeds)))
        with torch.inference_mode():
            made = theirs.generate(
                inputs, attention_mask=torch.ones_like(inputs), do_sample=True, top_k=0,
                max_new_tokens=work.new, min_new_tokens=work.new, pad_token_id=0,
            )  # fmt: skip
        assert made.shape[1] == work.prompt + work.new

    return step


def with_vllm(work: Workload) -> Step:
    """vLLM in its own environment, a run for every line that it is sent."""
    shape = {
        "hidden-size": work.width, "layers": work.layers, "heads": work.heads,
        "intermediate-size": work.wide, "requests": work.requests, "prompt-tokens": work.prompt,
        "new-tokens": work.new,
    }  # fmt: skip
    options = [part for name, value in shape.items() for part in (f"--{name}", str(value))]
    process = subprocess.Popen(
        [VLLM, "-m", "tests.benchmarks.vllm_generation", "--turns", *options],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    assert process.stdin is not None and process.stdout is not None
    incoming, outgoing = process.stdout, process.stdin

    def step() -> None:
        outgoing.write("run\n")
        outgoing.flush()
        if not incoming.readline():
            raise RuntimeError("vLLM ended; run tests.benchmarks.vllm_generation by itself.")

    return step


def against_others() -> None:
    """Tokens per second of the two workloads."""
    for name, work in WORKLOADS.items():
        makers = {"ours": ours, "transformers": with_transformers}
        if VLLM.exists():
            makers["vLLM"] = with_vllm
        contenders = [Contender(who, make, (work,)) for who, make in makers.items()]
        found = measure(contenders, steps=5, warmup=1)
        for who, timing in found.items():
            print(row(name, who, work.requests * work.new, timing, found["ours"]))


def row(name: str, who: str, tokens: int, timing: Timing, mine: Timing) -> str:
    times = f"ours is {ratio(timing, mine):.2f} times as fast" if timing is not mine else ""
    return f"{name:22} {who:14} {tokens / timing.best:7.0f} tokens/s  {times}"


def mixed(work: Workload, batching: str) -> Step:
    """128 requests for 8 to 256 tokens, 32 at a time.

    static: a batch after the other, all of whose rows go on to its longest answer. leaving: the
    same, but rows leave as they end. continuous: others take their place.
    """
    engine, rounds = Engine(model(work), max_batch_size=32), count()
    lengths = np.random.default_rng(0).integers(8, 257, 128).tolist()

    def step() -> None:
        asked = prompts(128, work.prompt, next(rounds))
        size = 128 if batching == "continuous" else 32
        for start in range(0, 128, size):
            batch = range(start, start + size)
            longest = max(lengths[i] for i in batch)
            for i in batch:
                length = longest if batching == "static" else lengths[i]
                engine.submit(str(i), asked[i], endless(length), seed=i)
            while engine.busy:
                engine.step()

    return step


def against_static() -> None:
    """Continuous batching against batches that nobody joins."""
    kinds = ("static", "leaving", "continuous")
    found = measure([Contender(kind, mixed, (SMALL, kind)) for kind in kinds], steps=5, warmup=1)
    for kind in kinds[:2]:
        times = ratio(found[kind], found["continuous"])
        print(
            f"answers of 8 to 256 tokens: continuous batching {times:.2f} times as fast as {kind}"
        )


def first_tokens(work: Workload, share: bool) -> Step:
    """16 samples each of 16 prompts of 512 tokens, until each has its first token."""
    engine, rounds = Engine(model(work), share_prefixes=share), count()

    def step() -> None:
        wanted = set()
        for i, prompt in enumerate(prompts(16, 512, next(rounds))):
            for sample in range(16):
                wanted.add(f"{i}-{sample}")
                engine.submit(f"{i}-{sample}", prompt, endless(8), seed=sample)
        everyone = list(wanted)
        while wanted:
            wanted -= {token.id for token in engine.step()}
        for id in everyone:
            engine.cancel(id)

    return step


def against_unshared() -> None:
    """Prefix sharing."""
    found = measure(
        [
            Contender("unshared", first_tokens, (SMALL, False)),
            Contender("shared", first_tokens, (SMALL, True)),
        ],
        steps=3,
        warmup=1,
    )
    times = ratio(found["unshared"], found["shared"])
    print(
        f"16 x 16 samples of 512 tokens: the last first token after "
        f"{found['shared'].best:.2f} s, {times:.1f} times as fast as without sharing"
    )


def served(work: Workload, replicas: int) -> Step:
    """The workload through a handle of Ray Serve, in calls of 16 requests, as jobs make them; the
    two threads are shared out among the replicas."""
    stack, seeds = ExitStack(), count()
    Finalize(None, stack.close, exitpriority=10)  # this process runs no other exit handlers
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    checkpoint.save(model(work), folder)
    stack.enter_context(session(ClusterConfig(local_cpus=2)))
    config = GeneratorConfig(
        count=replicas, cpus=0.2, threads=THREADS // replicas, cache_gib=2 / replicas
    )
    handle = deploy("benchmark", folder, None, "bfloat16", config)

    def step() -> None:
        seed = next(seeds)
        requests = [
            Request(f"{seed}-{i}", np.array(prompt), i)
            for i, prompt in enumerate(prompts(work.requests, work.prompt, seed))
        ]
        chunks = [requests[i : i + CHUNK] for i in range(0, len(requests), CHUNK)]
        calls = [handle.generate.remote(chunk, endless(work.new)) for chunk in chunks]
        found = [sample for call in calls for sample in call.result(timeout_s=300).samples]
        assert sum(len(sample.response) for sample in found) == work.requests * work.new

    return step


def against_bare() -> None:
    """Ray Serve's part of the time, and how many replicas share two cores best."""
    contenders = [Contender("bare", ours, (SMALL,))]
    contenders += [Contender(f"{n} replicas", served, (SMALL, n)) for n in (1, 2)]
    found = measure(contenders, steps=5, warmup=2)
    for n in (1, 2):
        share = ratio(found["bare"], found[f"{n} replicas"])
        speed = SMALL.requests * SMALL.new / found[f"{n} replicas"].best
        print(f"through Serve, {n} replicas: {share:.0%} of the bare engine, {speed:.0f} tokens/s")


def growth() -> None:
    """How the cost of a step grows, in a process that starts with the workers' environment."""
    process = get_context("spawn").Process(target=charts)
    process.start()
    process.join()


def charts() -> None:
    """Milliseconds of a decoding step by rows and by context, as charts for the documents."""
    torch.set_num_threads(2)
    engine = Engine(model(SMALL))
    by_rows = [(rows, step_seconds(engine, rows, 128)) for rows in (1, 4, 16, 32, 64, 128, 256)]
    by_context = [(tokens, step_seconds(engine, 32, tokens)) for tokens in (64, 256, 512, 1024)]
    print(chart("Answer tokens per second by rows (128 tokens of context)", "rows",
                [(rows, rows / seconds) for rows, seconds in by_rows]))  # fmt: skip
    print(chart("Milliseconds of a step of 32 rows by context", "tokens",
                [(tokens, 1e3 * seconds) for tokens, seconds in by_context]))  # fmt: skip


def step_seconds(engine: Engine, rows: int, context: int) -> float:
    """Of a step in which every row decodes, the median."""
    for i, prompt in enumerate(prompts(rows, context, context)):
        engine.submit(str(i), prompt, endless(40), seed=i)
    while len(engine.step()) < rows:
        pass
    seconds = []
    for _ in range(20):
        started = time.perf_counter()
        engine.step()
        seconds.append(time.perf_counter() - started)
    for i in range(rows):
        engine.cancel(str(i))
    return statistics.median(seconds)


def chart(title: str, axis: str, points: list[tuple[int, float]]) -> str:
    names = ", ".join(str(x) for x, _ in points)
    values = ", ".join(f"{y:.4g}" for _, y in points)
    return (
        f'```mermaid\nxychart-beta\n    title "{title}"\n    x-axis "{axis}" [{names}]\n'
        f"    line [{values}]\n```"
    )


PARTS = {
    "others": against_others,
    "mixed": against_static,
    "prefixes": against_unshared,
    "serve": against_bare,
    "growth": growth,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=PARTS)
    asked = parser.parse_args()
    with_worker_environment()
    if not VLLM.exists():
        print("vLLM is left out: `make vllm` makes its environment.", file=sys.stderr)
    for name, part in PARTS.items():
        if asked.only in (None, name):
            part()


if __name__ == "__main__":
    main()
