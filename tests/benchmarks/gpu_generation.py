"""Decoding of a 1.3B model in bfloat16 on a GPU: against transformers, and against the time that
its memory takes to be read.

python -m tests.benchmarks.gpu_generation

A decoding step must read all weights once, and the keys and values of every row: bytes over the
device's published bandwidth is the least time that it can take.
"""

import argparse
import time
from typing import Any

import torch

from llama2.config import ModelConfig
from llama2.generation import Engine, Sampling
from llama2.model import Transformer
from tests.benchmarks.generation import endless, prompts
from tests.benchmarks.gpu import shape

BANDWIDTH = {"H100": 3.35e12, "H200": 4.8e12, "A100": 2.0e12}
"""Bytes per second, as published, by what a device's name holds."""


def step_bytes(config: ModelConfig, rows: int, context: float) -> float:
    """Read by a decoding step: matrices, and keys and values."""
    matrices = config.num_parameters() - config.vocab_size * config.hidden_size
    width = config.num_key_value_heads * config.head_width
    return 2.0 * (matrices + rows * context * 2 * config.num_hidden_layers * width)


def seconds(run: Any, repeats: int = 3) -> float:
    """The best of `repeats` calls, after one that is not counted."""
    found = []
    for _ in range(repeats + 1):
        torch.cuda.synchronize()
        started = time.perf_counter()
        run()
        torch.cuda.synchronize()
        found.append(time.perf_counter() - started)
    return min(found[1:])


def transformers_model(config: ModelConfig) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("cuda"):
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=config.vocab_size, hidden_size=config.hidden_size,
                intermediate_size=config.intermediate_size,
                num_hidden_layers=config.num_hidden_layers,
                num_attention_heads=config.num_attention_heads,
                num_key_value_heads=config.num_key_value_heads,
                max_position_embeddings=config.max_position_embeddings,
            )
        ).bfloat16().eval()  # fmt: skip


def main() -> None:
    """Print tokens per second of both, and ours as a part of what the memory allows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--layers", type=int, default=24)
    asked = parser.parse_args()
    config = shape(asked.layers, asked.prompt + asked.new)
    with torch.device("cuda"):
        model = Transformer(config).bfloat16().eval().requires_grad_(False)
    theirs = transformers_model(config)
    name = torch.cuda.get_device_name()
    bandwidth = next((rate for known, rate in BANDWIDTH.items() if known in name), None)
    print(f"{name}: {config.num_parameters() / 1e9:.2f}B, {asked.prompt} + {asked.new} tokens")
    for rows in (1, 16, 64, 256):
        engine = Engine(model, max_batch_size=rows)
        given = prompts(rows, asked.prompt, rows)
        sampling: Sampling = endless(asked.new)

        def ours(engine: Engine = engine, given: Any = given, sampling: Any = sampling) -> None:
            engine.weights_changed()  # so that no run finds its prompts computed
            engine.generate(given, sampling)

        inputs = torch.tensor(given, device="cuda")

        def others(inputs: Any = inputs) -> None:
            with torch.inference_mode():
                theirs.generate(
                    inputs, attention_mask=torch.ones_like(inputs), do_sample=True, top_k=0,
                    max_new_tokens=asked.new, min_new_tokens=asked.new, pad_token_id=0,
                )  # fmt: skip

        mine, baseline = seconds(ours), seconds(others)
        line = f"  {rows:4} rows {rows * asked.new / mine:9.0f} tokens/s"
        line += f", {baseline / mine:5.1f} times transformers"
        if bandwidth is not None:
            least = asked.new * step_bytes(config, rows, asked.prompt + asked.new / 2) / bandwidth
            line += f", {least / mine:4.0%} of what reading memory allows"
        print(line, flush=True)


if __name__ == "__main__":
    main()
