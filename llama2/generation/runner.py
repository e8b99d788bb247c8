"""Runs the model over what the scheduler planned, and draws.

Shapes: R rows that draw, V vocabulary.
"""

import os
from collections.abc import Sequence
from itertools import chain
from typing import Protocol

import torch
from torch import Tensor

from llama2.config import ModelConfig
from llama2.cpu.step import kernels_for
from llama2.generation.bag_cache import BagCache
from llama2.generation.cpu_decoder import CpuDecoder, TileCache
from llama2.generation.decoder import Decoder, Span
from llama2.generation.graphs import DecodingGraphs
from llama2.generation.request import Alternatives, Request
from llama2.generation.sampling import Settings, draw, likeliest, settings
from llama2.generation.varlen_cache import VarlenCache, reads_pages
from llama2.model import Transformer


class Decoding(Protocol):
    """A model with its keys and values, in one of the ways to compute it."""

    def weights_changed(self) -> None:
        """Compute with what the model's weights now are."""

    def forward(
        self, tokens: Sequence[int], spans: Sequence[Span], drawing: Sequence[int]
    ) -> Tensor:
        """Logits [R, V] behind the tokens at places `drawing` of those of `spans`."""

    def draw(self, logits_RV: Tensor, uniforms_R: Tensor, rows: Settings) -> tuple[Tensor, Tensor]:
        """What `sampling.draw` gives."""


class _Operators:
    """By torch's operators; on a GPU in captured graphs, where all rows decode."""

    def __init__(self, model: Transformer, cache: BagCache | VarlenCache) -> None:
        self._device = model.lm_head.weight.device
        self._decoder, self._cache = Decoder(model), cache
        self.draw = torch.compile(draw, dynamic=True) if self._device.type == "cuda" else draw
        self._graphs: DecodingGraphs | None = None
        if isinstance(cache, VarlenCache):
            self._graphs = DecodingGraphs(self._decoder, cache)

    def weights_changed(self) -> None:
        self._decoder.weights_changed()

    def forward(
        self, tokens: Sequence[int], spans: Sequence[Span], drawing: Sequence[int]
    ) -> Tensor:
        if self._graphs is not None and all(span.decodes for span in spans):
            return self._graphs.forward(tokens, spans)[drawing]
        positions = list(chain.from_iterable(range(s.past, s.past + s.length) for s in spans))
        self._cache.begin(spans)
        return self._decoder.forward(
            self._tensor(tokens), self._tensor(positions), self._tensor(drawing), self._cache
        )

    def _tensor(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=self._device)


class Runner:
    """A model with a cache for `cache_tokens` tokens, on the model's device; by default for so many
    as `max_batch_size` rows may need, as far as memory goes."""

    def __init__(self, model: Transformer, max_batch_size: int, cache_tokens: int | None) -> None:
        weight, kernels = model.lm_head.weight, kernels_for(model.model)
        self._device = weight.device
        kind: type[TileCache | VarlenCache | BagCache] = BagCache
        if kernels is not None:
            kind = TileCache
        elif reads_pages(weight.dtype, weight.device):
            kind = VarlenCache
        tokens = cache_tokens or default_cache_tokens(model, max_batch_size)
        self.pages = -(-tokens // kind.page_size)
        self.cache = cache = kind(model.config, self.pages, weight.dtype, weight.device)
        if cache_tokens and not isinstance(cache, VarlenCache):
            cache.clear()  # what was asked for is there; a default is taken as needed
        self._decoding: Decoding
        if isinstance(cache, TileCache):
            assert kernels is not None
            self._decoding = CpuDecoder(model, cache, kernels)
        else:
            self._decoding = _Operators(model, cache)

    def weights_changed(self) -> None:
        """Compute with what the model's weights now are."""
        self._decoding.weights_changed()

    @torch.inference_mode()
    def run(
        self, plan: list[tuple[Request, int]]
    ) -> tuple[list[int], list[float], list[Alternatives]]:
        """Compute so many tokens of each request; the next token of those that draw one, in their
        order, its log-probability, and the alternatives to it that are asked for."""
        drawing = [request for request, _ in plan if request.draws]
        logits_RV = self._forward(plan)
        if not drawing:
            return [], [], []
        uniforms_R = torch.tensor([request.uniform for request in drawing], device=self._device)
        rows = settings([request.sampling for request in drawing], self._device)
        tokens_R, logprobs_R = self._decoding.draw(logits_RV, uniforms_R, rows)
        return tokens_R.tolist(), logprobs_R.tolist(), _alternatives(drawing, logits_RV)

    def _forward(self, plan: list[tuple[Request, int]]) -> Tensor:
        spans = [Span(r.pages, r.computed, count, r.prefix <= 0) for r, count in plan]
        tokens: list[int] = []
        drawing: list[int] = []
        for request, count in plan:
            tokens += request.tokens[request.computed : request.computed + count]
            if request.draws:
                drawing.append(len(tokens) - 1)
        return self._decoding.forward(tokens, spans, drawing)


def _alternatives(drawing: list[Request], logits_RV: Tensor) -> list[Alternatives]:
    found: list[Alternatives] = [()] * len(drawing)
    asking = [row for row, request in enumerate(drawing) if request.sampling.alternatives]
    if asking:
        counts = [drawing[row].sampling.alternatives for row in asking]
        most = min(max(counts), logits_RV.shape[1])
        tokens_RC, logprobs_RC = likeliest(logits_RV[asking], most)
        told = zip(asking, counts, tokens_RC.tolist(), logprobs_RC.tolist(), strict=True)
        for row, count, tokens, logprobs in told:
            found[row] = tuple(zip(tokens[:count], logprobs[:count], strict=True))
    return found


def bytes_per_token(config: ModelConfig, dtype: torch.dtype) -> int:
    """What the keys and values of one token take up, in all layers."""
    width = config.num_key_value_heads * config.head_width
    return 2 * config.num_hidden_layers * width * dtype.itemsize


def default_cache_tokens(model: Transformer, rows: int) -> int:
    """Tokens that `rows` full rows hold, or as many as fit into a quarter of a CPU's free memory
    or half of a GPU's."""
    config, weight = model.config, model.lm_head.weight
    if weight.device.type == "cuda":
        room = torch.cuda.mem_get_info(weight.device)[0] // 2
    else:
        room = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4
    return min(rows * config.max_position_embeddings, room // bytes_per_token(config, weight.dtype))
