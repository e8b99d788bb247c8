"""Keys and values in pages, and attention over them where they lie: for CPUs.

A row that decodes has one query token: its scores and its result are weighted sums of vectors that
lie scattered over pages. That is what `embedding_bag` computes, several times as fast as batched
products of one row, or torch's fused attention, and without a copy of what it reads. For this a
page holds keys as K vectors over its tokens, and values as a vector for each token.
Shapes: N tokens, B rows of a chunk, T tokens of each, H query heads, G key/value heads, Q query
heads a key/value head, K head width, R rows that decode, U pages of the row with the most, P tokens
of a page, M pairs of head and page, of all rows.
"""

import math
from collections.abc import Sequence
from itertools import chain, groupby
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from llama2.config import ModelConfig
from llama2.generation.decoder import Span

PAGE = 64

Array = np.ndarray[Any, Any]


class _Tiles(NamedTuple):
    """Where the pages of the rows that decode lie, in the order of row, head, page.

    head_M: row and head of each, counted in heads. keys_MK, values_MP: its vectors in the pool.
    starts: first of its vectors for each of [R, H, U], which are none where a row has fewer pages.
    place_M: its place among [R, H, U]; None where all rows have U pages. bags: first value of each
    row and head.
    """

    most: int
    head_M: Tensor
    keys_MK: Tensor
    starts: Tensor
    place_M: Tensor | None
    values_MP: Tensor
    bags: Tensor


class _Chunks(NamedTuple):
    """Rows with as many query tokens, and as many before them in `pages` pages, from token `start`
    of the batch. past: whole pages."""

    start: int
    rows: int
    past: int
    length: int
    pages: Tensor | None


class BagCache:
    """`pages` pages of keys and values for every layer."""

    page_size = PAGE

    def __init__(
        self, config: ModelConfig, pages: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.heads, self.groups = config.num_attention_heads, config.num_key_value_heads
        self.width = config.head_width
        self._device = device
        layers, groups, width = config.num_hidden_layers, self.groups, self.width
        self._keys = zeros((layers, pages, groups, width, PAGE), dtype).to(device)
        self._values = zeros((layers, pages, groups, PAGE, width), dtype).to(device)
        self._page_N = self._offset_N = torch.empty(0, dtype=torch.long)
        self._decoding: list[tuple[int, ...]] = []
        self._tiles: _Tiles | None = None
        self._hidden = torch.empty(0)
        self._chunks: list[_Chunks] = []

    def clear(self) -> None:
        """Zero all pages. Their memory, of which else each is taken when it is first written to,
        is taken at once."""
        self._keys.zero_()
        self._values.zero_()

    def copy(self, source: int, target: int) -> None:
        """Give one page the content of another."""
        self._keys[:, target] = self._keys[:, source]
        self._values[:, target] = self._values[:, source]

    def begin(self, spans: Sequence[Span]) -> None:
        """Prepare a forward pass over the tokens of `spans`, those that decode first."""
        singles = [span for span in spans if span.decodes]
        chunks = spans[len(singles) :]
        slots = np.concatenate(
            (
                np.array([s.pages[s.past // PAGE] * PAGE + s.past % PAGE for s in singles], int),
                *(_slots(span) for span in chunks),
            )
        )
        page_N, offset_N = np.divmod(slots, PAGE)
        self._page_N, self._offset_N = self._tensor(page_N), self._tensor(offset_N)
        decoding = [tuple(span.pages) for span in singles]
        if decoding != self._decoding:  # not in most steps, since a page lasts for many
            self._decoding, self._tiles = decoding, self._lay(decoding) if decoding else None
        if self._tiles is not None:
            length_R = np.array([span.past + 1 for span in singles])
            hidden = np.arange(self._tiles.most * PAGE) >= length_R[:, None]
            self._hidden = self._tensor(hidden)[:, None]
        self._chunks = self._alike(chunks, len(singles))

    def attend(self, layer: int, query_NHK: Tensor, key_value_NGK: Tensor) -> Tensor:
        """Store keys and values, [N, 2 G, K], of the batch's tokens and return what their queries
        see, [N, H, K]."""
        keys, values = self._keys[layer], self._values[layer]
        key_NGK, value_NGK = key_value_NGK.split(self.groups, dim=1)
        keys[self._page_N, :, :, self._offset_N] = key_NGK
        values[self._page_N, :, self._offset_N] = value_NGK
        parts = []
        scaled_NHK = query_NHK * self.width**-0.5
        if self._tiles is not None:
            decoding = scaled_NHK[: len(self._decoding)]
            parts.append(_attend_pages(decoding, keys, values, self._tiles, self._hidden))
        for chunk in self._chunks:
            tokens = slice(chunk.start, chunk.start + chunk.rows * chunk.length)
            query_BTHK, key_BTGK, value_BTGK = (
                x[tokens].unflatten(0, (chunk.rows, chunk.length))
                for x in (scaled_NHK, key_NGK, value_NGK)
            )
            key_BGTK = key_BTGK.transpose(1, 2).contiguous()
            value_BGTK = value_BTGK.transpose(1, 2).contiguous()
            if chunk.pages is not None:
                key_BGTK = _behind(keys[chunk.pages].transpose(3, 4), key_BGTK)
                value_BGTK = _behind(values[chunk.pages], value_BGTK)
            parts.append(_attend_chunk(query_BTHK, key_BGTK, value_BGTK).flatten(0, 1))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _lay(self, pages: list[tuple[int, ...]]) -> _Tiles:
        heads, width = self.heads, self.width
        count_R = np.array([len(row) for row in pages])
        most = int(count_R.max())
        flat = np.fromiter(chain.from_iterable(pages), np.int64)
        first_R = np.cumsum(count_R) - count_R
        counts = np.repeat(count_R, heads)  # of each row and head
        firsts = np.cumsum(counts) - counts
        head_M = np.repeat(np.arange(len(counts)), counts)
        row_M, rank_M = head_M // heads, np.arange(len(head_M)) - np.repeat(firsts, counts)
        page_M = flat[first_R[row_M] + rank_M]
        group_M = page_M * self.groups + head_M % heads // (heads // self.groups)
        place_M = head_M * most + rank_M
        vectors = np.zeros(len(counts) * most, np.int32)
        vectors[place_M] = width
        ragged = len(place_M) < len(vectors)
        return _Tiles(
            most,
            self._tensor(head_M),
            self._tensor((group_M[:, None] * width + np.arange(width)).astype(np.int32)),
            self._tensor(np.cumsum(vectors, dtype=np.int32) - vectors),
            self._tensor(place_M) if ragged else None,
            self._tensor((group_M[:, None] * PAGE + np.arange(PAGE)).astype(np.int32)),
            self._tensor((firsts * PAGE).astype(np.int32)),
        )

    def _alike(self, spans: Sequence[Span], start: int) -> list[_Chunks]:
        """Neighbours that are alike are computed together."""
        found = []
        for (past, length), alike in groupby(spans, key=lambda span: (span.past, span.length)):
            members = list(alike)
            before = [span.pages[: past // PAGE] for span in members]
            pages = self._tensor(np.array(before)) if past else None
            found.append(_Chunks(start, len(members), past, length, pages))
            start += len(members) * length
        return found

    def _tensor(self, array: Array) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self._device)


def zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros that take up memory once they are written to; torch's own take it at once."""
    data = np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)
    return torch.from_numpy(data).view(dtype).view(shape)


def _slots(span: Span) -> Array:
    """Where the tokens of a span lie, counted in tokens."""
    positions = np.arange(span.past, span.past + span.length)
    return np.asarray(span.pages)[positions // PAGE] * PAGE + positions % PAGE


def _attend_pages(
    query_RHK: Tensor, keys: Tensor, values: Tensor, tiles: _Tiles, hidden_R1S: Tensor
) -> Tensor:
    """Attention of one query token a row over the row's pages, [R, H, K]."""
    rows, heads, width = query_RHK.shape
    query_MK = query_RHK.reshape(-1, width).index_select(0, tiles.head_M)
    scores = _sums(keys.flatten(0, 2), tiles.keys_MK, tiles.starts, query_MK)
    scores_RHS = scores.view(rows, heads, -1).masked_fill_(hidden_R1S, float("-inf"))
    weights_MP = scores_RHS.softmax(dim=-1).view(-1, PAGE)
    if tiles.place_M is not None:
        weights_MP = weights_MP.index_select(0, tiles.place_M)
    mixed = _sums(values.flatten(0, 2), tiles.values_MP, tiles.bags, weights_MP)
    return mixed.view(rows, heads, width)


def _sums(vectors: Tensor, indices: Tensor, starts: Tensor, weights: Tensor) -> Tensor:
    """Weighted sums of some of `vectors`: one from each start to the next."""
    return F.embedding_bag(
        indices.view(-1), vectors, starts, mode="sum", per_sample_weights=weights.view(-1)
    )


def _behind(past_BUGPK: Tensor, x_BGTK: Tensor) -> Tensor:
    """What lies in a row's pages, and the chunk's own tokens behind it, [B, G, S, K]."""
    return torch.cat((past_BUGPK.transpose(1, 2).flatten(2, 3), x_BGTK), dim=2)


def _attend_chunk(query_BTHK: Tensor, key_BGSK: Tensor, value_BGSK: Tensor) -> Tensor:
    """Causal attention of the last T of S tokens, [B, T, H, K], a page of queries at a time: how
    a page is computed does not depend on which others are computed with it. Queries are scaled."""
    length = query_BTHK.shape[1]
    groups, past = key_BGSK.shape[1], key_BGSK.shape[2] - length
    grouped = query_BTHK.unflatten(2, (groups, -1))  # B T G Q K
    mixed_BTHK = torch.empty_like(query_BTHK)
    future = query_BTHK.new_full((PAGE, PAGE), float("-inf")).triu(1)
    for start in range(0, length, PAGE):
        end = min(start + PAGE, length)
        seen, size = past + end, end - start
        query = grouped[:, start:end].permute(0, 2, 3, 1, 4).flatten(2, 3)  # B G QT K
        scores = (query @ key_BGSK[:, :, :seen].transpose(2, 3)).unflatten(2, (-1, size))
        scores[..., past + start :] += future[:size, :size]
        weights = scores.softmax(dim=-1).flatten(2, 3)
        mixed = (weights @ value_BGSK[:, :, :seen]).unflatten(2, (-1, size))  # B G Q T K
        mixed_BTHK[:, start:end] = mixed.permute(0, 3, 1, 2, 4).flatten(2, 3)
    return mixed_BTHK
