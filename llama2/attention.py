"""Grouped-query attention over packed documents, with an optional key/value cache.

Shapes: B batch, T query tokens, S key tokens, D model width, H query heads, G key/value heads,
K head width. A token belongs to a segment (a document); 0 marks padding. No token sees another
segment.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama2.causal_attention import causal_attention
from llama2.config import ModelConfig
from llama2.documents import Documents
from llama2.rope import rotate
from llama2.sequence_parallel import SequenceParallel


class Layout(NamedTuple):
    """Where tokens stand and what they see, the same for every layer.

    cos, sin: rotary angles, [B, T, H K]. documents: of a packed batch. mask: [B, 1, T, S], with
    a cache. With neither, every row is one document. parallel: ranks that share the rows' tokens.
    """

    cos: Tensor
    sin: Tensor
    documents: Documents | None
    mask: Tensor | None
    parallel: SequenceParallel


class KeyValueCache:
    """Keys and values of the tokens so far, for `batch_size` rows of at most `capacity` tokens."""

    def __init__(
        self,
        config: ModelConfig,
        batch_size: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        groups, width = config.num_key_value_heads, config.head_width
        shape = (config.num_hidden_layers, batch_size, groups, capacity, width)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.segments = torch.zeros(batch_size, capacity, dtype=torch.long, device=device)
        self.length = 0

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store [B, G, T, K] behind what layer `layer` holds and return all its keys and values."""
        end = self.length + keys.shape[2]
        self.keys[layer, :, :, self.length : end] = keys
        self.values[layer, :, :, self.length : end] = values
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def advance(self, segments_BT: Tensor) -> Tensor:
        """Note the segments of the tokens that come next and return those of all tokens, [B, S]."""
        end = self.length + segments_BT.shape[1]
        if end > self.segments.shape[1]:
            raise ValueError(
                f"The cache holds {self.segments.shape[1]} tokens; {end} were asked for."
            )
        self.segments[:, self.length : end] = segments_BT
        return self.segments[:, :end]

    def keep(self, rows: Tensor) -> None:
        """Drop every row but `rows`, so that finished sequences cost nothing more."""
        self.keys, self.values = self.keys[:, rows], self.values[:, rows]
        self.segments = self.segments[rows]


def positions_in_segments(segments_BT: Tensor) -> Tensor:
    """Position of each token counted from the start of its own segment."""
    index = torch.arange(segments_BT.shape[1], device=segments_BT.device).expand_as(segments_BT)
    starts = torch.ones_like(segments_BT, dtype=torch.bool)
    starts[:, 1:] = segments_BT[:, 1:] != segments_BT[:, :-1]
    return index - torch.where(starts, index, 0).cummax(dim=1).values


def attention_mask(segments_BT: Tensor, segments_BS: Tensor) -> Tensor:
    """True where a query may look: the same segment, not later. [B, 1, T, S].

    The queries are the last T of the S keys.
    """
    queries, keys = segments_BT.shape[1], segments_BS.shape[1]
    index = torch.arange(keys, device=segments_BS.device)
    causal = index[None, :] <= index[keys - queries :, None]
    return ((segments_BT[:, :, None] == segments_BS[:, None, :]) & causal)[:, None]


def attend(query_BTHK: Tensor, key_BTGK: Tensor, value_BTGK: Tensor) -> Tensor:
    """Causal scaled dot-product attention of rows that are one document each, [B, T, H, K]."""
    repeats = query_BTHK.shape[2] // key_BTGK.shape[2]
    if repeats > 1:
        key_BTGK, value_BTGK = (x.repeat_interleave(repeats, dim=2) for x in (key_BTGK, value_BTGK))
    if query_BTHK.device.type == "cpu" and query_BTHK.dtype == torch.bfloat16:
        return causal_attention(query_BTHK, key_BTGK, value_BTGK)
    query, key, value = (x.transpose(1, 2) for x in (query_BTHK, key_BTGK, value_BTGK))
    return F.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2)


def attend_cached(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """Attention of new tokens [B, H, T, K] over all [B, G, S, K] so far that `mask` shows them."""
    batch, heads, tokens, width = query.shape
    groups = key.shape[1]
    if tokens > 1:
        key, value = (x.repeat_interleave(heads // groups, dim=1) for x in (key, value))
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    # One query token: on a CPU two batched products over the groups are several times as fast as
    # the fused kernel.
    grouped = query.view(batch, groups, heads // groups, width)
    scores = grouped @ key.transpose(2, 3) * width**-0.5
    weights = scores.float().masked_fill(~mask, float("-inf")).softmax(dim=-1).to(value.dtype)
    return (weights @ value).view(batch, heads, 1, width)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions (paper, section 2.2)."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.width = layer, config.head_width
        wide, narrow = (
            config.num_attention_heads * self.width,
            config.num_key_value_heads * self.width,
        )
        self.q_proj = nn.Linear(config.hidden_size, wide, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, narrow, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, narrow, bias=config.attention_bias)
        self.o_proj = nn.Linear(wide, config.hidden_size, bias=config.attention_bias)

    def forward(self, x_BTD: Tensor, layout: Layout, cache: KeyValueCache | None) -> Tensor:
        batch, tokens, _ = x_BTD.shape

        def heads(x: Tensor) -> Tensor:
            return x.view(batch, tokens, -1, self.width)

        query_BTHK = rotate(heads(self.q_proj(x_BTD)), layout.cos, layout.sin)
        key_BTGK = rotate(heads(self.k_proj(x_BTD)), layout.cos, layout.sin)
        value_BTGK = heads(self.v_proj(x_BTD))
        if cache is not None:
            assert layout.mask is not None
            query, key, value = (x.transpose(1, 2) for x in (query_BTHK, key_BTGK, value_BTGK))
            key, value = cache.append(self.layer, key, value)
            mixed_BTHK = attend_cached(query, key, value, layout.mask).transpose(1, 2)
        elif layout.documents is not None:
            parallel, documents = layout.parallel, layout.documents
            parts = [documents.split(parallel.heads(x)) for x in (query_BTHK, key_BTGK, value_BTGK)]
            mixed = [attend(*group) for group in zip(*parts, strict=True)]
            mixed_BTHK = parallel.tokens(documents.join(mixed, batch))
        else:
            mixed_BTHK = attend(query_BTHK, key_BTGK, value_BTGK)
        return self.o_proj(mixed_BTHK.reshape(batch, tokens, -1))
