"""The model as the engine runs it: over a flat batch of tokens of many rows, with paged keys and
values. It reads the model's own weights, so what is written to them counts from the next step on.

Shapes: N tokens, D model width, H query heads, G key/value heads, K head width, L tokens of the
context, R rows that draw, V vocabulary.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama2.model import FeedForward, Layer, RMSNorm, Transformer
from llama2.rope import inverse_frequencies, rotation


class Span(NamedTuple):
    """Tokens of one row to compute: `length` of them behind `past`, all in `pages`.

    decodes: whether it is the one token that the next is drawn after, or was.
    """

    pages: Sequence[int]
    past: int
    length: int
    decodes: bool


class Cache(Protocol):
    """Keys and values in pages, on whichever device."""

    page_size: int

    def copy(self, source: int, target: int) -> None:
        """Give one page the content of another."""

    def begin(self, spans: Sequence[Span]) -> None:
        """Prepare a forward pass over the tokens of `spans`, those that decode first."""

    def attend(self, layer: int, query_NHK: Tensor, key_value_NGK: Tensor) -> Tensor:
        """Store keys and values, [N, 2 G, K], of the batch's tokens and return what their queries
        see, [N, H, K]."""


class _Fused(NamedTuple):
    """A layer's matrices that are multiplied by the same input, in one piece of memory."""

    qkv: Tensor
    qkv_bias: Tensor | None
    gate_up: Tensor
    gate_up_bias: Tensor | None


class Decoder:
    """Turns tokens into logits of those that a next token is drawn after."""

    def __init__(self, model: Transformer) -> None:
        config = model.config
        self.model, self.config = model, config
        self.heads, self.groups = config.num_attention_heads, config.num_key_value_heads
        self.width = config.head_width
        weight = model.lm_head.weight
        positions = torch.arange(config.max_position_embeddings, device=weight.device)[None]
        frequencies = inverse_frequencies(config).to(weight.device)
        cos, sin = rotation(positions, frequencies, 1, weight.dtype)
        self.cos_L1K, self.sin_L1K = cos.transpose(0, 1), sin.transpose(0, 1)
        self._fused = [_fuse(layer) for layer in model.model.layers]

    def forward(
        self, tokens_N: Tensor, positions_N: Tensor, drawing_R: Tensor, cache: Cache
    ) -> Tensor:
        """Logits [R, V] behind the tokens at places `drawing_R` of the batch that `cache` was
        prepared for."""
        trunk = self.model.model
        x_ND = trunk.embed_tokens(tokens_N)
        cos, sin = self.cos_L1K[positions_N], self.sin_L1K[positions_N]
        for index, layer in enumerate(trunk.layers):
            assert isinstance(layer, Layer)
            x_ND = x_ND + self._attend(layer, index, x_ND, cos, sin, cache)
            x_ND = x_ND + self._feed_forward(layer, index, x_ND)
        return cast(Tensor, self.model.lm_head(_normalize(trunk.norm, x_ND[drawing_R])))

    def _attend(
        self, layer: Layer, index: int, x_ND: Tensor, cos: Tensor, sin: Tensor, cache: Cache
    ) -> Tensor:
        fused = self._fused[index]
        normal_ND = _normalize(layer.input_layernorm, x_ND)
        qkv = F.linear(normal_ND, fused.qkv, fused.qkv_bias).unflatten(1, (-1, self.width))
        _turn(qkv[:, : self.heads + self.groups], cos, sin)
        mixed_NHK = cache.attend(index, qkv[:, : self.heads], qkv[:, self.heads :])
        return cast(Tensor, layer.self_attn.o_proj(mixed_NHK.flatten(1)))

    def _feed_forward(self, layer: Layer, index: int, x_ND: Tensor) -> Tensor:
        fused = self._fused[index]
        normal_ND = _normalize(layer.post_attention_layernorm, x_ND)
        gate, up = F.linear(normal_ND, fused.gate_up, fused.gate_up_bias).chunk(2, dim=1)
        down = layer.mlp.down_proj
        return F.linear(F.silu(gate).mul_(up), down.weight, down.bias)


def _normalize(norm: nn.Module, x: Tensor) -> Tensor:
    assert isinstance(norm, RMSNorm)
    return F.rms_norm(x, (x.shape[-1],), norm.weight, norm.eps)


def _turn(x_NHK: Tensor, cos_N1K: Tensor, sin_N1K: Tensor) -> None:
    """Turn queries and keys to their positions, in place."""
    first, second = x_NHK.chunk(2, dim=-1)
    swapped = torch.cat((second, first), dim=-1)
    torch.addcmul(x_NHK * cos_N1K, swapped, sin_N1K, out=x_NHK)


def _fuse(layer: nn.Module) -> _Fused:
    assert isinstance(layer, Layer)
    attention, mlp = layer.self_attn, layer.mlp
    assert isinstance(mlp, FeedForward)
    qkv, qkv_bias = _joined([attention.q_proj, attention.k_proj, attention.v_proj])
    gate_up, gate_up_bias = _joined([mlp.gate_proj, mlp.up_proj])
    return _Fused(qkv, qkv_bias, gate_up, gate_up_bias)


@torch.no_grad()
def _joined(linears: list[nn.Linear]) -> tuple[Tensor, Tensor | None]:
    """Weights and biases one below the other; the modules' own become views of them."""
    weight = torch.cat([linear.weight for linear in linears])
    sizes = [linear.out_features for linear in linears]
    for linear, part in zip(linears, weight.split(sizes), strict=True):
        linear.weight.data = part
    if linears[0].bias is None:
        return weight, None
    bias = torch.cat([linear.bias for linear in linears])
    for linear, part in zip(linears, bias.split(sizes), strict=True):
        linear.bias.data = part
    return weight, bias
