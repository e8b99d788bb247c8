"""The engine's model on CPUs with bfloat16 instructions: `llama2/cpu/` computes it.

Shapes: R rows that draw, V vocabulary.
"""

from collections.abc import Sequence
from ctypes import CDLL
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from llama2.config import ModelConfig
from llama2.cpu.step import PAGE, Array, Step, room_for
from llama2.generation.bag_cache import zeros
from llama2.generation.decoder import Span
from llama2.generation.sampling import Settings, draw
from llama2.model import Transformer


class TileCache:
    """`pages` pages of keys and values for every layer, as `step.cpp` reads them."""

    page_size = PAGE

    def __init__(
        self, config: ModelConfig, pages: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        assert (dtype, device.type) == (torch.bfloat16, "cpu")
        layers = config.num_hidden_layers
        self.keys, self.values = (
            zeros((layers, *shape), dtype) for shape in room_for(config, pages)
        )

    def clear(self) -> None:
        """Zero all pages. Their memory, of which else each is taken when it is first written to,
        is taken at once."""
        self.keys.zero_()
        self.values.zero_()

    def copy(self, source: int, target: int) -> None:
        """Give one page the content of another."""
        self.keys[:, target] = self.keys[:, source]
        self.values[:, target] = self.values[:, source]


class CpuDecoder:
    """Turns tokens into logits of those that a next token is drawn after, and draws.

    kernels: what `kernels_for` gave for the model. What is written to the model's weights counts
    once `weights_changed` was called.
    """

    def __init__(self, model: Transformer, cache: TileCache, kernels: CDLL) -> None:
        self._vocabulary, self._draw = model.config.vocab_size, kernels.draw
        layers = [list(memory) for memory in (cache.keys, cache.values)]
        self._step = Step(model.model, model.lm_head, kernels, *layers)

    def weights_changed(self) -> None:
        """Compute with what the model's weights now are."""
        self._step.weights_changed()

    def forward(
        self, tokens: Sequence[int], spans: Sequence[Span], drawing: Sequence[int]
    ) -> Tensor:
        """Logits [R, V] behind the tokens at places `drawing`, in rising order, of `spans`."""
        logits_RV = torch.empty((len(drawing), self._vocabulary), dtype=torch.bfloat16)
        pages = np.fromiter(chain.from_iterable(span.pages for span in spans), np.int32)
        self._step(np.array(tokens), _table(spans), pages, np.array(drawing, np.int32), logits_RV)
        return logits_RV

    def draw(self, logits_RV: Tensor, uniforms_R: Tensor, rows: Settings) -> tuple[Tensor, Tensor]:
        """What `sampling.draw` gives. How a row is drawn does not depend on the others."""
        count, vocabulary = logits_RV.shape
        temperature_R = rows.temperature_B
        if temperature_R is None:
            temperature_R = torch.ones(count)
        if rows.greedy_B is not None:
            temperature_R = temperature_R.masked_fill(rows.greedy_B, 0)
        temperature_R, uniforms_R = (x.float().contiguous() for x in (temperature_R, uniforms_R))
        tokens_R = torch.empty(count, dtype=torch.int64)
        normalizer_R = torch.empty(count, dtype=torch.float32)
        self._draw(
            logits_RV.data_ptr(),
            count,
            vocabulary,
            uniforms_R.data_ptr(),
            temperature_R.data_ptr(),
            tokens_R.data_ptr(),
            normalizer_R.data_ptr(),
            torch.get_num_threads(),
        )
        if rows.top_p_B is not None and rows.top_k_B is not None:
            some_R = (rows.top_p_B < 1) | (rows.top_k_B > 0)
            some = Settings(*[None if of_B is None else of_B[some_R] for of_B in rows])
            tokens_R[some_R] = draw(logits_RV[some_R], uniforms_R[some_R], some)[0]
        drawn_R = logits_RV.gather(1, tokens_R[:, None])[:, 0]
        return tokens_R, drawn_R.float() - normalizer_R


def _table(spans: Sequence[Span]) -> Array:
    length = np.array([span.length for span in spans])
    pages = np.array([len(span.pages) for span in spans])
    past = np.array([span.past for span in spans])
    return np.stack((length.cumsum() - length, past, length, pages.cumsum() - pages), axis=1)
