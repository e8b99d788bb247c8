"""The model as the engine runs it: over a flat batch of tokens of many rows, with paged keys and
values. It reads the model's own weights.

Shapes: N tokens, D model width, H query heads, G key/value heads, K head width, L tokens of the
context, R rows that draw, V vocabulary.
"""

from collections.abc import Sequence
from itertools import pairwise, starmap
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama2.generation.product import Product
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


class _Products(NamedTuple):
    """A layer's matrices; those that are multiplied by the same input are one."""

    qkv: Product
    o: Product
    gate_up: Product
    down: Product


class Decoder:
    """Turns tokens into logits of those that a next token is drawn after.

    What is written to the model's weights counts once `weights_changed` was called.
    """

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
        self.weights_changed()

    def weights_changed(self) -> None:
        """Compute with what the model's weights now are: in the same memory or, where no graph has
        been captured, in other."""
        self._layers: list[_Products] = []  # lets go of what the old ones hold
        self._layers = [_products(layer) for layer in self.model.model.layers]
        self._head = Product(self.model.lm_head.weight, None)

    def forward(
        self, tokens_N: Tensor, positions_N: Tensor, drawing_R: Tensor, cache: Cache
    ) -> Tensor:
        """Logits [R, V] behind the tokens at places `drawing_R` of the batch that `cache` was
        prepared for. Behind the last layer's attention nothing is computed for the others."""
        trunk = self.model.model
        x_ND = trunk.embed_tokens(tokens_N)
        cos, sin = self.cos_L1K[positions_N], self.sin_L1K[positions_N]
        for index, layer in enumerate(trunk.layers):
            assert isinstance(layer, Layer)
            mixed_ND = self._attend(layer, index, x_ND, cos, sin, cache)
            if index == len(trunk.layers) - 1:
                x_ND, mixed_ND = x_ND[drawing_R], mixed_ND[drawing_R]
            x_ND = x_ND + self._layers[index].o(mixed_ND)
            x_ND = x_ND + self._feed_forward(layer, index, x_ND)
        return self._head(_normalize(trunk.norm, x_ND))

    def _attend(
        self, layer: Layer, index: int, x_ND: Tensor, cos: Tensor, sin: Tensor, cache: Cache
    ) -> Tensor:
        normal_ND = _normalize(layer.input_layernorm, x_ND)
        qkv = self._layers[index].qkv(normal_ND).unflatten(1, (-1, self.width))
        _turn(qkv[:, : self.heads + self.groups], cos, sin)
        return cache.attend(index, qkv[:, : self.heads], qkv[:, self.heads :]).flatten(1)

    def _feed_forward(self, layer: Layer, index: int, x_ND: Tensor) -> Tensor:
        products = self._layers[index]
        normal_ND = _normalize(layer.post_attention_layernorm, x_ND)
        gate, up = products.gate_up(normal_ND).chunk(2, dim=1)
        return products.down(F.silu(gate).mul_(up))


def _normalize(norm: nn.Module, x: Tensor) -> Tensor:
    assert isinstance(norm, RMSNorm)
    return F.rms_norm(x, (x.shape[-1],), norm.weight, norm.eps)


def _turn(x_NHK: Tensor, cos_N1K: Tensor, sin_N1K: Tensor) -> None:
    """Turn queries and keys to their positions, in place."""
    first, second = x_NHK.chunk(2, dim=-1)
    swapped = torch.cat((second, first), dim=-1)
    torch.addcmul(x_NHK * cos_N1K, swapped, sin_N1K, out=x_NHK)


def _products(layer: nn.Module) -> _Products:
    assert isinstance(layer, Layer)
    attention, mlp = layer.self_attn, layer.mlp
    assert isinstance(mlp, FeedForward)
    return _Products(
        Product(*_joined([attention.q_proj, attention.k_proj, attention.v_proj])),
        Product(attention.o_proj.weight, attention.o_proj.bias),
        Product(*_joined([mlp.gate_proj, mlp.up_proj])),
        Product(mlp.down_proj.weight, mlp.down_proj.bias),
    )


@torch.no_grad()
def _joined(linears: list[nn.Linear]) -> tuple[Tensor, Tensor | None]:
    """Weights and biases one below the other; the modules' own are views of them."""
    weight = _one_below_the_other([linear.weight for linear in linears])
    biases: list[Tensor] = [linear.bias for linear in linears if linear.bias is not None]
    return weight, _one_below_the_other(biases) if biases else None


def _one_below_the_other(parts: list[Tensor]) -> Tensor:
    if all(starmap(_adjacent, pairwise(parts))):
        rows = sum(len(part) for part in parts)
        return parts[0].detach().as_strided((rows, *parts[0].shape[1:]), parts[0].stride())
    joined = torch.cat(parts)
    for own, part in zip(parts, joined.split([len(part) for part in parts]), strict=True):
        own.data = part
    return joined


def _adjacent(first: Tensor, second: Tensor) -> bool:
    """Whether the second one begins where the first one ends."""
    storages = [tensor.untyped_storage().data_ptr() for tensor in (first, second)]
    end = first.data_ptr() + first.numel() * first.itemsize
    plain = first.is_contiguous() and second.is_contiguous()
    return plain and storages[0] == storages[1] and second.data_ptr() == end
