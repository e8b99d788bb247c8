"""Grouped-query attention over packed documents.

Shapes: B batch, T tokens, N tokens that are asked for, D model width, H query heads, G key/value
heads, K head width. A token belongs to a segment (a document); 0 marks padding. No token sees
another segment.
"""

from typing import NamedTuple, cast

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

    cos, sin: rotary angles, [B, T, H K]. documents: of a packed batch; None where every row is one
    document. parallel: ranks that share the rows' tokens.
    """

    cos: Tensor
    sin: Tensor
    documents: Documents | None
    parallel: SequenceParallel


def positions_in_segments(segments_BT: Tensor) -> Tensor:
    """Position of each token counted from the start of its own segment."""
    index = torch.arange(segments_BT.shape[1], device=segments_BT.device).expand_as(segments_BT)
    starts = torch.ones_like(segments_BT, dtype=torch.bool)
    starts[:, 1:] = segments_BT[:, 1:] != segments_BT[:, :-1]
    return index - torch.where(starts, index, 0).cummax(dim=1).values


def at(places_N: Tensor | None, x_BTD: Tensor) -> Tensor:
    """[N, D] at these places of the flattened batch; everything, [B, T, D], where they are None."""
    return x_BTD if places_N is None else x_BTD.flatten(0, 1).index_select(0, places_N)


def attend(query_BTHK: Tensor, key_BTGK: Tensor, value_BTGK: Tensor) -> Tensor:
    """Causal scaled dot-product attention of rows that are one document each, [B, T, H, K]."""
    repeats = query_BTHK.shape[2] // key_BTGK.shape[2]
    if repeats > 1:
        key_BTGK, value_BTGK = (x.repeat_interleave(repeats, dim=2) for x in (key_BTGK, value_BTGK))
    if query_BTHK.device.type == "cpu" and query_BTHK.dtype == torch.bfloat16:
        return causal_attention(query_BTHK, key_BTGK, value_BTGK)
    query, key, value = (x.transpose(1, 2) for x in (query_BTHK, key_BTGK, value_BTGK))
    return F.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions (paper, section 2.2)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.width = config.head_width
        wide, narrow = (
            config.num_attention_heads * self.width,
            config.num_key_value_heads * self.width,
        )
        self.q_proj = nn.Linear(config.hidden_size, wide, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, narrow, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, narrow, bias=config.attention_bias)
        self.o_proj = nn.Linear(wide, config.hidden_size, bias=config.attention_bias)

    def forward(self, x_BTD: Tensor, layout: Layout, places_N: Tensor | None = None) -> Tensor:
        """[B, T, D]; with `places_N`, [N, D] of these tokens of the flattened batch alone."""
        batch, tokens, _ = x_BTD.shape

        def heads(x: Tensor) -> Tensor:
            return x.view(batch, tokens, -1, self.width)

        query_BTHK = rotate(heads(self.q_proj(x_BTD)), layout.cos, layout.sin)
        key_BTGK = rotate(heads(self.k_proj(x_BTD)), layout.cos, layout.sin)
        value_BTGK = heads(self.v_proj(x_BTD))
        if layout.documents is not None:
            parallel, documents = layout.parallel, layout.documents
            parts = [documents.split(parallel.heads(x)) for x in (query_BTHK, key_BTGK, value_BTGK)]
            mixed = [attend(*group) for group in zip(*parts, strict=True)]
            mixed_BTHK = parallel.tokens(documents.join(mixed, batch))
        else:
            mixed_BTHK = attend(query_BTHK, key_BTGK, value_BTGK)
        return cast(Tensor, self.o_proj(at(places_N, mixed_BTHK.reshape(batch, tokens, -1))))
