"""Keys and values in pages, and attention over them by batched products: for CPUs.

A row that decodes has one query token, for which torch's fused kernel is slow, and gathering a
row's pages would copy the whole cache at each step. So the products walk over the pages where they
lie, each with the query of the row that owns it, and the pages' results are put together as those
of split keys are in flash decoding. A page that several rows share is read once for all of them.
Shapes: N tokens, H query heads, G key/value heads, Q query heads a key/value head, K head width,
R rows that decode, M pages (or pairs of page and row), P tokens of a page, U shared pages, S rows
that share one.
"""

import math
from collections.abc import Sequence
from itertools import chain, groupby
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from llama2.config import ModelConfig
from llama2.generation.decoder import Span

PAGE = 64
HIDDEN = -1e30
BITS = 1.4426950408889634
"""log2(e): torch's exp2 is several times as fast as its exp, which slows down where it gives 0."""
WINDOWS = 2
"""Runs of pages that are read where they lie; further ones are copied together."""
GAP = 64
"""Pages that nobody wants between two runs; fewer are read besides, which costs less than to treat
the two apart."""


Array = np.ndarray[Any, Any]


class _Own(NamedTuple):
    """Pages of one row each. pages: which, of other rows among them; row_M: whose; mask_MP: 0, or
    `HIDDEN` beyond the row."""

    pages: slice | Tensor
    row_M: Tensor
    mask_MP: Tensor

    def scores(self, query_RGQK: Tensor, keys: Tensor) -> Tensor:
        """Products of queries and keys in bits, [M, G, Q, P], float32."""
        query_MGQK = query_RGQK.index_select(0, self.row_M)
        products = _product(query_MGQK, keys[self.pages].transpose(2, 3))
        return torch.add(self.mask_MP[:, None, None], products, alpha=_scale(keys))

    def mix(self, weights_MGQP: Tensor, values: Tensor) -> Tensor:
        """Weighted sums of values, [M, G, Q, K]."""
        return _product(weights_MGQP, values[self.pages])


class _Shared(NamedTuple):
    """Pages of several rows: M pairs, U pages of S rows each. mask_M: `HIDDEN` where fewer rows
    share the page."""

    pages_U: Tensor
    row_M: Tensor
    mask_M: Tensor

    def scores(self, query_RGQK: Tensor, keys: Tensor) -> Tensor:
        """Products of queries and keys in bits, [M, G, Q, P], float32."""
        query_MGQK = query_RGQK.index_select(0, self.row_M)
        products = _product(self._by_page(query_MGQK), keys[self.pages_U].transpose(2, 3))
        mask = self.mask_M[:, None, None, None]
        return torch.add(mask, self._by_pair(products), alpha=_scale(keys))

    def mix(self, weights_MGQP: Tensor, values: Tensor) -> Tensor:
        """Weighted sums of values, [M, G, Q, K]."""
        return self._by_pair(_product(self._by_page(weights_MGQP), values[self.pages_U]))

    def _by_page(self, x_MGQK: Tensor) -> Tensor:
        return x_MGQK.unflatten(0, (len(self.pages_U), -1)).transpose(1, 2).flatten(2, 3)

    def _by_pair(self, x: Tensor) -> Tensor:
        rows = len(self.row_M) // len(self.pages_U)
        return x.unflatten(2, (rows, -1)).transpose(1, 2).flatten(0, 1)


class _Decoding(NamedTuple):
    """Rows with one query token. tile_M: where the pages of each row, in their order, are found
    among the results of the own and the shared pages; row_M: the row."""

    rows: int
    parts: "list[_Own | _Shared]"
    tile_M: Tensor
    row_M: Tensor


class _Chunks(NamedTuple):
    """Rows with as many query tokens, and as many before them in `pages` pages, from token `start`
    of the batch. past: whole pages."""

    start: int
    rows: int
    past: int
    length: int
    pages: Tensor | None


class ProductCache:
    """`pages` pages of keys and values for every layer."""

    page_size = PAGE

    def __init__(
        self, config: ModelConfig, pages: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.groups, self.width = config.num_key_value_heads, config.head_width
        self._device = device
        shape = (config.num_hidden_layers, 2, pages, self.groups, PAGE, self.width)
        self._pool = _zeros(shape, dtype).to(device)
        self._layers = [(*layer, layer.view(-1, self.width)) for layer in self._pool]
        self._rows_NG = torch.empty(0, 0, dtype=torch.long)
        self._decoding: _Decoding | None = None
        self._chunks: list[_Chunks] = []

    def copy(self, source: int, target: int) -> None:
        """Give one page the content of another."""
        self._pool[:, :, target] = self._pool[:, :, source]

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
        page, offset = np.divmod(slots, PAGE)
        rows = (page[:, None] * self.groups + np.arange(self.groups)) * PAGE + offset[:, None]
        values = self._pool.shape[2] * self.groups * PAGE  # rows of keys before those of values
        self._rows_NG = self._tensor(np.concatenate((rows, rows + values), axis=1))
        self._decoding = self._decode(singles) if singles else None
        self._chunks = self._alike(chunks, len(singles))

    def attend(self, layer: int, query_NHK: Tensor, key_value_NGK: Tensor) -> Tensor:
        """Store keys and values, [N, 2 G, K], of the batch's tokens and return what their queries
        see, [N, H, K]."""
        keys, values, rows = self._layers[layer]
        rows.index_put_((self._rows_NG,), key_value_NGK)
        parts = []
        if self._decoding is not None:
            decoding = query_NHK[: self._decoding.rows]
            parts.append(_attend_pages(decoding, keys, values, self._decoding))
        for chunk in self._chunks:
            tokens = slice(chunk.start, chunk.start + chunk.rows * chunk.length)
            query_BTHK, key_BTGK, value_BTGK = (
                x[tokens].unflatten(0, (chunk.rows, chunk.length))
                for x in (query_NHK, *key_value_NGK.chunk(2, dim=1))
            )
            key_BGSK = _behind(chunk.pages, keys, key_BTGK)
            value_BGSK = _behind(chunk.pages, values, value_BTGK)
            parts.append(_attend_chunk(query_BTHK, key_BGSK, value_BGSK).flatten(0, 1))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _decode(self, singles: Sequence[Span]) -> _Decoding:
        counts = np.array([len(span.pages) for span in singles])
        lengths = np.array([span.past + 1 for span in singles])
        page_M = np.fromiter(chain.from_iterable(span.pages for span in singles), np.int64)
        row_M = np.repeat(np.arange(len(singles)), counts)
        rank_M = np.arange(len(page_M)) - np.repeat(np.cumsum(counts) - counts, counts)
        filled_M = np.minimum(lengths[row_M] - rank_M * PAGE, PAGE)
        users_M = np.bincount(page_M)[page_M]
        single_M = users_M == 1
        parts: list[_Own | _Shared] = []
        tile_M, tiles = np.empty_like(page_M), 0
        for chosen_M, window in _windows(page_M, single_M):
            own, place = self._own(page_M[chosen_M], row_M[chosen_M], filled_M[chosen_M], window)
            tile_M[chosen_M] = tiles + place
            parts.append(own)
            tiles += len(own.row_M)
        # Pages with like numbers of users go together, so that little is padded.
        classes_M = np.ceil(np.log2(users_M))
        for size in np.unique(classes_M[~single_M]):
            chosen_M = classes_M == size
            shared, place = self._shared(page_M[chosen_M], row_M[chosen_M])
            tile_M[chosen_M] = tiles + place
            parts.append(shared)
            tiles += len(shared.row_M)
        return _Decoding(len(singles), parts, self._tensor(tile_M), self._tensor(row_M))

    def _own(
        self, page_M: Array, row_M: Array, filled_M: Array, window: slice | None
    ) -> tuple[_Own, Array]:
        """Pages, and where each is found among them."""
        if window is None:
            place_M, rows, filled = np.arange(len(page_M)), row_M, filled_M
            pages: slice | Tensor = self._tensor(page_M)
        else:
            place_M, pages = page_M - window.start, window
            rows, filled = np.zeros((2, window.stop - window.start), np.int64)
            rows[place_M], filled[place_M] = row_M, filled_M
        hidden = np.arange(PAGE) >= filled[:, None]
        mask_MP = np.where(hidden, np.float32(HIDDEN), np.float32(0))
        return _Own(pages, self._tensor(rows), self._tensor(mask_MP)), place_M

    def _shared(self, page_M: Array, row_M: Array) -> tuple[_Shared, Array]:
        """Pages with all their rows, and where each pair is found among [U, S]."""
        order = np.argsort(page_M, kind="stable")
        pages_U, first, counts = np.unique(page_M[order], return_index=True, return_counts=True)
        place_M = np.arange(len(page_M)) - np.repeat(first, counts)
        which_M = np.repeat(np.arange(len(pages_U)), counts)
        widest = int(counts.max())
        row_US = np.zeros((len(pages_U), widest), np.int64)
        row_US[which_M, place_M] = row_M[order]
        mask_US = np.where(np.arange(widest) < counts[:, None], np.float32(0), np.float32(HIDDEN))
        tiles = np.empty_like(page_M)
        tiles[order] = which_M * widest + place_M
        return _Shared(
            self._tensor(pages_U),
            self._tensor(row_US.reshape(-1)),
            self._tensor(mask_US.reshape(-1)),
        ), tiles

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


def _scale(keys: Tensor) -> float:
    return keys.shape[-1] ** -0.5 * BITS


def _windows(page_M: Array, single_M: Array) -> list[tuple[Array, slice | None]]:
    """Pages of one row each, in groups: those of a run of pages of which at least half are wanted,
    where reading those in between costs less than a copy, and last the rest."""
    pages = np.sort(page_M[single_M])
    runs = [pages]
    if len(pages) and not _dense(pages):
        runs = np.split(pages, np.flatnonzero(np.diff(pages) > GAP) + 1)
    found: list[tuple[Array, slice | None]] = []
    left_M = single_M.copy()
    for run in sorted(filter(_dense, runs), key=len, reverse=True)[:WINDOWS]:
        chosen_M = single_M & (page_M >= run[0]) & (page_M <= run[-1])
        found.append((chosen_M, slice(int(run[0]), int(run[-1]) + 1)))
        left_M &= ~chosen_M
    if left_M.any():
        found.append((left_M, None))
    return found


def _dense(pages: Array) -> bool:
    return len(pages) > GAP // 4 and 2 * len(pages) > int(pages[-1] - pages[0])


def _zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros that take up memory once they are written to; torch's own take it at once."""
    data = np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)
    return torch.from_numpy(data).view(dtype).view(shape)


def _slots(span: Span) -> Array:
    """Where the tokens of a span lie, counted in tokens."""
    positions = np.arange(span.past, span.past + span.length)
    return np.asarray(span.pages)[positions // PAGE] * PAGE + positions % PAGE


def _attend_pages(query_RHK: Tensor, keys: Tensor, values: Tensor, plan: _Decoding) -> Tensor:
    """Attention of one query token a row over the row's pages, [R, H, K]."""
    query_RGQK = query_RHK.unflatten(1, (keys.shape[1], -1))
    scores = [part.scores(query_RGQK, keys) for part in plan.parts]
    highest = query_RGQK.new_full(query_RGQK.shape[:-1], HIDDEN, dtype=torch.float32)
    for part, score_MGQP in zip(plan.parts, scores, strict=True):
        peak_MGQ = score_MGQP.amax(dim=-1)
        rows = part.row_M[:, None, None].expand_as(peak_MGQ)
        highest.scatter_reduce_(0, rows, peak_MGQ, "amax")
    mixed = []
    for part, score_MGQP in zip(plan.parts, scores, strict=True):
        weights = score_MGQP.sub_(highest.index_select(0, part.row_M)[..., None]).exp2_()
        parts = (part.mix(weights.to(values.dtype), values), weights.sum(dim=-1, keepdim=True))
        mixed.append(torch.cat(parts, dim=-1))  # in float32, with their sum as one more column
    every = mixed[0] if len(mixed) == 1 else torch.cat(mixed)
    # In the order of a row's pages, so that the sum is the same wherever they lie.
    total = every.new_zeros((plan.rows, *every.shape[1:]))
    total.index_add_(0, plan.row_M, every.index_select(0, plan.tile_M))
    mixed_RGQK = total[..., :-1] / total[..., -1:]
    return mixed_RGQK.to(values.dtype).view(query_RHK.shape)


def _product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right over two dimensions of a batch, without matmul's detours."""
    return torch.bmm(left.flatten(0, 1), right.flatten(0, 1)).unflatten(0, left.shape[:2])


def _behind(pages_BU: Tensor | None, pool: Tensor, x_BTGK: Tensor) -> Tensor:
    """What lies in a row's pages, and the chunk's own tokens behind it, [B, G, S, K]."""
    x_BGTK = x_BTGK.transpose(1, 2)
    if pages_BU is None:
        return x_BGTK.contiguous()
    past_BGSK = pool[pages_BU].transpose(1, 2).flatten(2, 3)
    return torch.cat((past_BGSK, x_BGTK), dim=2)


def _attend_chunk(query_BTHK: Tensor, key_BGSK: Tensor, value_BGSK: Tensor) -> Tensor:
    """Causal attention of the last T of S tokens, [B, T, H, K], a page of queries at a time: how
    a page is computed does not depend on which others are computed with it."""
    length, width = query_BTHK.shape[1], query_BTHK.shape[3]
    groups, past = key_BGSK.shape[1], key_BGSK.shape[2] - length
    scaled = (query_BTHK * width**-0.5).unflatten(2, (groups, -1))  # B T G Q K
    mixed_BTHK = torch.empty_like(query_BTHK)
    future = query_BTHK.new_full((PAGE, PAGE), float("-inf")).triu(1)
    for start in range(0, length, PAGE):
        end = min(start + PAGE, length)
        seen, size = past + end, end - start
        query = scaled[:, start:end].permute(0, 2, 3, 1, 4).flatten(2, 3)  # B G QT K
        scores = (query @ key_BGSK[:, :, :seen].transpose(2, 3)).unflatten(2, (-1, size))
        scores[..., past + start :] += future[:size, :size]
        weights = scores.softmax(dim=-1).flatten(2, 3)
        mixed = (weights @ value_BGSK[:, :, :seen]).unflatten(2, (-1, size))  # B G Q T K
        mixed_BTHK[:, start:end] = mixed.permute(0, 3, 1, 2, 4).flatten(2, 3)
    return mixed_BTHK
