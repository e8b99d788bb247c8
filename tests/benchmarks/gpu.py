"""Training steps of a 1.3B model at 4,096 tokens in bfloat16: model FLOPs utilisation of a GPU.

python -m tests.benchmarks.gpu

Utilisation counts the FLOPs that the model needs (6 a weight and token, causal attention's half)
against the device's dense bfloat16 rate, as published and as a large product reaches it.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from llama2.config import ModelConfig
from llama2.losses import next_token_loss
from llama2.model import Transformer

PUBLISHED = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
"""FLOP/s of tensor cores, dense bfloat16, by what a device's name holds."""


def shape(layers: int, context: int) -> ModelConfig:
    """1.3B parameters with 24 layers."""
    return ModelConfig(
        vocab_size=32_000,
        hidden_size=2048,
        intermediate_size=5504,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=16,
        max_position_embeddings=context,
    )


def flops(config: ModelConfig, rows: int, tokens: int) -> float:
    """Of a step: forward and backward."""
    embeddings = config.vocab_size * config.hidden_size
    matrices = config.num_parameters() - embeddings
    attention = config.num_hidden_layers * config.hidden_size * tokens
    return 6.0 * (matrices + attention) * rows * tokens


def seconds(step: Callable[[], object], repeats: int) -> float:
    """The median of `repeats` calls, after three that are not counted."""

    found = []
    for _ in range(repeats + 3):
        torch.cuda.synchronize()
        started = time.perf_counter()
        step()
        torch.cuda.synchronize()
        found.append(time.perf_counter() - started)
    return statistics.median(found[3:])


def matmul_rate() -> float:
    matrix = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    return 2 * 8192**3 / seconds(lambda: matrix @ matrix, 20)


def main() -> None:
    """Print the device's name, tokens per second, utilisation and peak memory."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--activation-checkpointing", action="store_true")
    options = parser.parse_args()
    config = shape(options.layers, options.tokens)
    with torch.device("cuda"):
        model = Transformer(config).bfloat16()
    model.model.activation_checkpointing = options.activation_checkpointing
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    size = (options.rows, options.tokens + 1)
    tokens = torch.randint(config.vocab_size, size, device="cuda")

    def step() -> None:
        logprobs = model(tokens[:, :-1], targets_BT=tokens[:, 1:])
        next_token_loss(logprobs, len(logprobs)).backward()
        optimizer.step()
        optimizer.zero_grad()

    taken = seconds(step, options.steps)
    name, rate = torch.cuda.get_device_name(), flops(config, options.rows, options.tokens) / taken
    published = next((peak for known, peak in PUBLISHED.items() if known in name), None)
    print(f"{name}: {config.num_parameters() / 1e9:.2f}B parameters, {size[0]} x {options.tokens}")
    print(f"  {options.rows * options.tokens / taken:.0f} tokens/s, {rate / 1e12:.0f} TFLOP/s")
    if published is not None:
        print(f"  {rate / published:.0%} of the published {published / 1e12:.0f} TFLOP/s")
    print(f"  {rate / matmul_rate():.0%} of a large product's rate")
    print(f"  peak memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")


if __name__ == "__main__":
    main()
