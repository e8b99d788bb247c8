"""Causal attention of right-padded documents: torch's fused kernel, blocks of queries by torch's
products, and what the model takes, which is the latter or, where that fits, compiled code.

python -m tests.benchmarks.attention
"""

import time
from collections.abc import Callable
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from llama2.causal_attention import causal_attention
from llama2.cpu import operators

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
SHAPES = [(128, 40, 4, 32), (32, 146, 4, 32), (16, 256, 4, 32), (4, 512, 6, 48), (4, 512, 12, 64)]
REPEATS = 8


def fused(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2)


def blocks(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    with mock.patch.object(operators, "fits", lambda *tensors: False):
        return causal_attention(query, key, value)


def milliseconds(attend: Attend, shape: tuple[int, ...], dtype: torch.dtype) -> float:
    """Of a forward and a backward pass, the mean over `REPEATS` after three to warm up."""
    query, key, value = (torch.randn(shape, dtype=dtype, requires_grad=True) for _ in range(3))
    upstream = torch.randn(shape, dtype=dtype)
    for repeat in range(REPEATS + 3):
        if repeat == 3:
            started = time.perf_counter()
        attend(query, key, value).backward(upstream)
    return (time.perf_counter() - started) / REPEATS * 1e3


def main() -> None:
    """Print a row per shape and precision."""
    torch.set_num_threads(1)
    print("documents x tokens x heads x width  precision   fused  blocks  taken  ms")
    for dtype in (torch.float32, torch.bfloat16):
        for shape in SHAPES:
            found = [milliseconds(f, shape, dtype) for f in (fused, blocks, causal_attention)]
            name = str(dtype).removeprefix("torch.")
            a, b, c = (f"{x:6.1f}" for x in found)
            print(f"{'x'.join(map(str, shape)):34}  {name:9}  {a}  {b} {c}")


if __name__ == "__main__":
    main()
