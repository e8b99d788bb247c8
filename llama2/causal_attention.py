"""Causal attention in bfloat16 on a CPU, where torch's fused kernel has a slow backward pass.

Queries are taken in blocks, each with the keys up to its own end, so that the half of the scores
that lies in the future is mostly never computed. The rest is plain batched products, whose factors
lie contiguous: of slices torch would make copies, slow ones where a slice is transposed as well.
Their lengths are rounded up, with zeros that no token sees behind the last one: of an odd number of
keys the products take nearly twice as long.
Shapes: B rows, T tokens, H heads, K head width, M = B H; L keys that a block of queries sees.
"""

from typing import Any

import torch
from torch import Tensor

from llama2.cpu import operators

BLOCK = 128  # queries; more compute more of the future, fewer make small products
ROUND = 8  # a block's length is a multiple of it


def causal_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(query key^T / sqrt(K)) value over the tokens not later, [B, T, H, K] each."""
    fits = operators.fits(query, key, value)
    function = _CompiledAttention if fits else _CausalAttention
    mixed_BTHK: Tensor = function.apply(query, key, value)
    return mixed_BTHK


class _CompiledAttention(torch.autograd.Function):
    """Weights are computed again by the backward pass, which costs less than memory for them."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        mixed, logs_BHT = operators.attend(query, key, value)
        ctx.save_for_backward(query, key, value, mixed, logs_BHT)
        return mixed

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, mixed, logs_BHT = ctx.saved_tensors
        return operators.attend_back(query, key, value, mixed, logs_BHT, gradients[0])


class _CausalAttention(torch.autograd.Function):
    """Keeps its inputs in blocks: glibc's allocator cannot place a tensor in the hole that one of
    the same size left, but smaller ones."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        mixed = torch.empty_like(query, memory_format=torch.contiguous_format)
        blocks = _blocks(query.shape[1])
        future = query.new_full((BLOCK, BLOCK), float("-inf")).triu(1)
        queries, keys, values, weights = [], [], [], []
        for start, end in blocks:
            queries.append(_flat(query, start, end, query.shape[-1] ** -0.5))
            keys.append(_flat(key, start, end))
            values.append(_flat(value, start, end))
            scores_MTL = torch.bmm(queries[-1], torch.cat(keys, 1).transpose(1, 2))
            scores_MTL[:, :, start:] += future[: end - start, : end - start]
            weights.append(torch.softmax(scores_MTL, dim=-1, out=scores_MTL))
            _put(mixed, start, torch.bmm(scores_MTL, torch.cat(values, 1)))
        ctx.save_for_backward(*queries, *keys, *values, *weights)
        return mixed

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        grad_mixed = gradients[0]
        grad_query = torch.empty_like(grad_mixed, memory_format=torch.contiguous_format)
        grad_key_MTK = grad_value_MTK = torch.empty(0)
        blocks = _blocks(grad_mixed.shape[1])
        saved, count = ctx.saved_tensors, len(blocks)
        queries, keys, values, weights = (saved[i * count : (i + 1) * count] for i in range(4))
        for i in reversed(range(count)):
            (start, end), weights_MTL = blocks[i], weights[i]
            grad_block = _flat(grad_mixed, start, end)
            grad_weights = torch.bmm(grad_block, torch.cat(values[: i + 1], 1).transpose(1, 2))
            grad_scores = torch._softmax_backward_data(
                grad_weights, weights_MTL, -1, weights_MTL.dtype
            )
            to_value = torch.bmm(weights_MTL.transpose(1, 2), grad_block)
            to_key = torch.bmm(grad_scores.transpose(1, 2), queries[i])
            if i == count - 1:
                grad_key_MTK, grad_value_MTK = to_key.float(), to_value.float()
            else:  # blocks add up in float32
                grad_key_MTK[:, :end] += to_key
                grad_value_MTK[:, :end] += to_value
            scaled = torch.bmm(grad_scores, torch.cat(keys[: i + 1], 1))
            _put(grad_query, start, scaled.mul_(grad_mixed.shape[-1] ** -0.5))
        grad_key, grad_value = torch.empty_like(grad_query), torch.empty_like(grad_query)
        _put(grad_key, 0, grad_key_MTK)
        _put(grad_value, 0, grad_value_MTK)
        return grad_query, grad_key, grad_value


def _blocks(tokens: int) -> list[tuple[int, int]]:
    last = -(-tokens // ROUND) * ROUND
    return [(start, min(start + BLOCK, last)) for start in range(0, tokens, BLOCK)]


def _flat(x_BTHK: Tensor, start: int, end: int, scale: float = 1.0) -> Tensor:
    """The tokens from `start` to `end`, [M, end - start, K], times `scale`; 0 behind the last."""
    batch, tokens, heads, width = x_BTHK.shape
    flat_BHTK = x_BTHK.new_empty(batch, heads, end - start, width)
    written = min(end, tokens) - start
    part_BHTK = x_BTHK[:, start:end].transpose(1, 2)
    torch.mul(part_BHTK, scale, out=flat_BHTK[:, :, :written])
    flat_BHTK[:, :, written:] = 0
    return flat_BHTK.view(batch * heads, end - start, width)


def _put(x_BTHK: Tensor, start: int, x_MTK: Tensor) -> None:
    """Write tokens back where they belong, from `start` on."""
    batch, _, heads, width = x_BTHK.shape
    part_BTHK = x_BTHK[:, start : start + x_MTK.shape[1]]
    x_BHTK = x_MTK.view(batch, heads, -1, width)[:, :, : part_BTHK.shape[1]]
    part_BTHK.copy_(x_BHTK.transpose(1, 2))
