"""CUDA graphs of decoding steps: a small model's step is bound by launching its kernels, which a
graph does at once.

Shapes: R rows, V vocabulary.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from llama2.generation.decoder import Decoder, Span
from llama2.generation.varlen_cache import PAGE, Reading, VarlenCache, bounds


class _Memory(NamedTuple):
    """What a captured step of a fixed number of rows reads."""

    tokens_R: Tensor
    positions_R: Tensor
    reading: Reading


class _Graph(NamedTuple):
    """A captured step, and where it writes."""

    memory: _Memory
    graph: torch.cuda.CUDAGraph
    logits_RV: Tensor


class DecodingGraphs:
    """Steps of one token a row, captured for 1, 2, 4, 8, ... rows when they are first needed.

    Rows that are too many for those at hand write to the cache's spare page.
    """

    def __init__(self, decoder: Decoder, cache: VarlenCache) -> None:
        self._decoder, self._cache = decoder, cache
        self._graphs: dict[int, _Graph] = {}

    def forward(self, tokens: Sequence[int], spans: Sequence[Span]) -> Tensor:
        """Logits [R, V] behind one token of each row. They are overwritten by the next call."""
        rows = 1 << (len(spans) - 1).bit_length()
        if rows not in self._graphs:
            self._graphs[rows] = self._capture(rows)
        found = self._graphs[rows]
        tokens_R, positions_R, reading = found.memory
        pages = reading.pages.shape[1]
        spare = self._cache.keys.shape[1] - 1
        idle = rows - len(spans)
        slots = [s.pages[s.past // PAGE] * PAGE + s.past % PAGE for s in spans]
        table = [[*span.pages, *[0] * (pages - len(span.pages))] for span in spans]
        written = (
            (tokens_R, [*tokens, *[0] * idle]),
            (positions_R, [*(span.past for span in spans), *[0] * idle]),
            (reading.slots_N, [*slots, *[spare * PAGE] * idle]),
            (reading.lengths_R, [*(span.past + 1 for span in spans), *[1] * idle]),
            (reading.pages, [*table, *[[spare] * pages] * idle]),
        )
        for target, values in written:
            target.copy_(torch.tensor(values, dtype=target.dtype, device=target.device))
        found.graph.replay()
        return found.logits_RV[: len(spans)]

    def _capture(self, rows: int) -> _Graph:
        memory = self._memory(rows)
        # Libraries set themselves up in a first call, which must not be captured.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._step(memory)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits_RV = self._step(memory)
        return _Graph(memory, graph, logits_RV)

    def _memory(self, rows: int) -> _Memory:
        """Of idle rows alone."""
        device = self._cache.keys.device
        context = self._decoder.config.max_position_embeddings
        spare, most = self._cache.keys.shape[1] - 1, -(-context // PAGE)
        tokens_R, positions_R = torch.zeros((2, rows), dtype=torch.long, device=device)
        reading = Reading(
            torch.full((rows,), spare * PAGE, device=device),
            torch.arange(rows + 1, dtype=torch.int32, device=device),
            bounds(rows, most, device),
            torch.ones(rows, dtype=torch.int32, device=device),
            torch.full((rows, most), spare, dtype=torch.int32, device=device),
            1,
            context,
        )
        return _Memory(tokens_R, positions_R, reading)

    def _step(self, memory: _Memory) -> Tensor:
        self._cache.reading = memory.reading
        drawing_R = torch.arange(len(memory.tokens_R), device=memory.tokens_R.device)
        return self._decoder.forward(memory.tokens_R, memory.positions_R, drawing_R, self._cache)
