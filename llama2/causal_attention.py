"""Causal attention in bfloat16 on a CPU, where torch's fused kernel has a slow backward pass.

Queries are taken in blocks, each with the keys up to its own end, so that the half of the scores
that lies in the future is mostly never computed. The rest is plain batched products.
Shapes: B rows, T tokens, H heads, K head width, M = B H; L keys that a block of queries sees.
"""

from typing import Any

import torch
from torch import Tensor

BLOCK = 128  # queries; more compute more of the future, fewer make small products


def causal_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(query key^T / sqrt(K)) value over the tokens not later, [B, T, H, K] each."""
    mixed_BTHK: Tensor = _CausalAttention.apply(query, key, value)
    return mixed_BTHK


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        mixed = torch.empty_like(query, memory_format=torch.contiguous_format)
        query_MTK = _flat(query * query.shape[-1] ** -0.5)
        key_MTK, value_MTK = _flat(key), _flat(value)
        future = query.new_full((BLOCK, BLOCK), float("-inf")).triu(1)
        weights = []
        for start, end in _blocks(query.shape[1]):
            scores_MTL = torch.bmm(query_MTK[:, start:end], key_MTK[:, :end].transpose(1, 2))
            scores_MTL[:, :, start:] += future[: end - start, : end - start]
            weights.append(torch.softmax(scores_MTL, dim=-1, out=scores_MTL))
            _put(mixed, start, torch.bmm(scores_MTL, value_MTK[:, :end]))
        ctx.save_for_backward(query_MTK, key_MTK, value_MTK, *weights)
        return mixed

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query_MTK, key_MTK, value_MTK, *weights = ctx.saved_tensors
        grad_mixed_MTK = _flat(gradients[0])
        grad_query = torch.empty_like(gradients[0], memory_format=torch.contiguous_format)
        grad_key_MTK = grad_value_MTK = torch.empty(0)
        blocks = list(zip(_blocks(key_MTK.shape[1]), weights, strict=True))
        for (start, end), weights_MTL in reversed(blocks):
            grad_block = grad_mixed_MTK[:, start:end]
            grad_weights = torch.bmm(grad_block, value_MTK[:, :end].transpose(1, 2))
            grad_scores = torch._softmax_backward_data(
                grad_weights, weights_MTL, -1, weights_MTL.dtype
            )
            to_value = torch.bmm(weights_MTL.transpose(1, 2), grad_block)
            to_key = torch.bmm(grad_scores.transpose(1, 2), query_MTK[:, start:end])
            if end == key_MTK.shape[1]:
                grad_key_MTK, grad_value_MTK = to_key.float(), to_value.float()
            else:  # blocks add up in float32
                grad_key_MTK[:, :end] += to_key
                grad_value_MTK[:, :end] += to_value
            scaled = torch.bmm(grad_scores, key_MTK[:, :end]).mul_(key_MTK.shape[-1] ** -0.5)
            _put(grad_query, start, scaled)
        grad_key, grad_value = torch.empty_like(grad_query), torch.empty_like(grad_query)
        _put(grad_key, 0, grad_key_MTK)
        _put(grad_value, 0, grad_value_MTK)
        return grad_query, grad_key, grad_value


def _blocks(tokens: int) -> list[tuple[int, int]]:
    return [(start, min(start + BLOCK, tokens)) for start in range(0, tokens, BLOCK)]


def _flat(x_BTHK: Tensor) -> Tensor:
    batch, tokens, heads, width = x_BTHK.shape
    return x_BTHK.transpose(1, 2).reshape(batch * heads, tokens, width)


def _put(x_BTHK: Tensor, start: int, block_MTK: Tensor) -> None:
    """Write a block of tokens back where it belongs."""
    batch, _, heads, width = x_BTHK.shape
    tokens = block_MTK.shape[1]
    block_BHTK = block_MTK.view(batch, heads, tokens, width)
    x_BTHK[:, start : start + tokens] = block_BHTK.transpose(1, 2)
