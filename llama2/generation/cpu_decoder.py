"""The decoder for CPUs with bfloat16 instructions: a step is one call of `cpu/decoder.cpp`.

Shapes: N tokens, O outputs and I inputs of a matrix, L layers, G key/value heads, K head width,
P tokens of a page, R rows that draw, V vocabulary.
"""

import logging
from collections.abc import Callable, Sequence
from ctypes import POINTER, Structure, c_float, c_int, c_int32, c_void_p
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama2.config import ModelConfig
from llama2.generation.bag_cache import Array, zeros
from llama2.generation.compiled import NotCompiled, library
from llama2.generation.decoder import Span
from llama2.generation.sampling import Settings, draw
from llama2.model import FeedForward, Layer, Transformer
from llama2.rope import inverse_frequencies, rotation

PAGE = 64
PANEL = 32
LANES = 16

logger = logging.getLogger(__name__)


class _Matrix(Structure):
    _fields_ = [
        ("panels", c_void_p),
        ("bias", c_void_p),
        ("outputs", c_int32),
        ("pairs", c_int32),
    ]


class _Layer(Structure):
    _fields_ = [
        *[(name, _Matrix) for name in ("qkv", "o", "gate_up", "down")],
        *[(name, c_void_p) for name in ("attention_norm", "feed_forward_norm", "keys", "values")],
    ]


class _Model(Structure):
    _fields_ = [
        ("layers", POINTER(_Layer)),
        ("head", _Matrix),
        *[(name, c_void_p) for name in ("embeddings", "norm", "cos", "sin")],
        *[(name, c_int32) for name in ("depth", "width", "heads", "groups", "head_width")],
        ("eps", c_float),
    ]


class _Batch(Structure):
    _fields_ = [
        *[(name, c_void_p) for name in ("tokens", "spans", "pages", "drawing", "logits")],
        *[(name, c_int32) for name in ("token_count", "span_count", "drawing_count", "threads")],
    ]


class Kernels(NamedTuple):
    """Compiled functions."""

    forward: Callable[..., None]
    draw: Callable[..., None]


def kernels_for(model: Transformer) -> Kernels | None:
    """The compiled functions, where this processor runs them and `model` is one for them."""
    weight, config = model.lm_head.weight, model.config
    fits = weight.device.type == "cpu" and weight.dtype == torch.bfloat16
    if not fits or config.hidden_size % 2 or not _suits_processor():
        return None
    return _compiled()


def _suits_processor() -> bool:
    # Tiles of AMX, which oneDNN uses, do several times as much as the instructions used here.
    supported = torch.cpu._is_avx512_bf16_supported() and not torch.cpu._is_amx_tile_supported()
    return bool(supported)


@cache
def _compiled() -> Kernels | None:
    try:
        found = library(Path(__file__).with_name("cpu"))
    except NotCompiled as reason:
        logger.warning("Generation on this CPU is half as fast as it could be: %s", reason)
        return None
    found.forward.argtypes = [POINTER(_Model), POINTER(_Batch)]
    found.draw.argtypes = [c_void_p, c_int, c_int, *[c_void_p] * 4, c_int]
    found.forward.restype = found.draw.restype = None
    return Kernels(found.forward, found.draw)


class TileCache:
    """`pages` pages of keys and values for every layer, as `cpu/decoder.cpp` reads them."""

    page_size = PAGE

    def __init__(
        self, config: ModelConfig, pages: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        assert (dtype, device.type) == (torch.bfloat16, "cpu")
        layers, groups = config.num_hidden_layers, config.num_key_value_heads
        width = config.head_width
        padded = -(-width // LANES) * LANES
        keys = (layers, pages, groups, width // 2, PAGE, 2)
        values = (layers, pages, groups, PAGE // 2, padded, 2)
        self.keys, self.values = zeros(keys, torch.bfloat16), zeros(values, torch.bfloat16)

    def take_memory(self) -> None:
        """Touch all pages now, which costs as much as writing them, instead of one by one."""
        self.keys.zero_()
        self.values.zero_()

    def copy(self, source: int, target: int) -> None:
        """Give one page the content of another."""
        self.keys[:, target] = self.keys[:, source]
        self.values[:, target] = self.values[:, source]


class CpuDecoder:
    """Turns tokens into logits of those that a next token is drawn after.

    kernels: what `kernels_for` gave for `model`. What is written to the model's weights counts once
    `weights_changed` was called; they are laid out anew at the next step.
    """

    def __init__(self, model: Transformer, cache: TileCache, kernels: Kernels) -> None:
        self._model, self._cache, self._kernels = model, cache, kernels
        config = model.config
        positions = torch.arange(config.max_position_embeddings)[None]
        turns = rotation(positions, inverse_frequencies(config), 1, torch.bfloat16)
        self._cos, self._sin = (turn.contiguous() for turn in turns)
        self._panels: dict[str, Tensor] = {}
        self._arguments: _Model | None = None
        self._kept: list[Any] = []

    def weights_changed(self) -> None:
        """Compute with what the model's weights now are."""
        self._arguments = None

    def forward(
        self, tokens: Sequence[int], spans: Sequence[Span], drawing: Sequence[int]
    ) -> Tensor:
        """Logits [R, V] behind the tokens at places `drawing`, in rising order, of `spans`."""
        if self._arguments is None:
            self._arguments = self._lay_out()
        logits_RV = torch.empty((len(drawing), self._model.config.vocab_size), dtype=torch.bfloat16)
        pages = [span.pages for span in spans]
        arrays = (
            np.array(tokens, np.int64),
            _spans(spans),
            np.fromiter(chain.from_iterable(pages), np.int32),
            np.array(drawing, np.int32),
        )
        batch = _Batch(
            *[array.ctypes.data for array in arrays],
            logits_RV.data_ptr(),
            len(tokens),
            len(spans),
            len(drawing),
            torch.get_num_threads(),
        )
        self._kernels.forward(self._arguments, batch)
        return logits_RV

    def draw(self, logits_RV: Tensor, uniforms_R: Tensor, rows: Settings) -> tuple[Tensor, Tensor]:
        """What `sampling.draw` gives. How a row is drawn does not depend on the others."""
        count, vocabulary = logits_RV.shape
        temperature_R = rows.temperature_B
        if temperature_R is None:
            temperature_R = torch.ones(count)
        if rows.greedy_B is not None:
            temperature_R = temperature_R.masked_fill(rows.greedy_B, 0)
        tokens_R, normalizer_R = torch.empty(count, dtype=torch.int64), torch.empty(count)
        self._kernels.draw(
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

    @torch.no_grad()
    def _lay_out(self) -> _Model:
        config, trunk = self._model.config, self._model.model
        self._kept = []
        layers = (_Layer * config.num_hidden_layers)()
        for index, layer in enumerate(trunk.layers):
            assert isinstance(layer, Layer)
            attention, mlp = layer.self_attn, layer.mlp
            assert isinstance(mlp, FeedForward)
            layers[index] = _Layer(
                self._matrix(f"{index} qkv", attention.q_proj, attention.k_proj, attention.v_proj),
                self._matrix(f"{index} o", attention.o_proj),
                self._matrix(f"{index} gate_up", mlp.gate_proj, mlp.up_proj, alternate=True),
                self._matrix(f"{index} down", mlp.down_proj),
                self._pointer(layer.input_layernorm.weight),
                self._pointer(layer.post_attention_layernorm.weight),
                self._cache.keys[index].data_ptr(),
                self._cache.values[index].data_ptr(),
            )
        return _Model(
            layers,
            self._matrix("head", self._model.lm_head),
            self._pointer(trunk.embed_tokens.weight),
            self._pointer(trunk.norm.weight),
            self._cos.data_ptr(),
            self._sin.data_ptr(),
            config.num_hidden_layers,
            config.hidden_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_width,
            config.rms_norm_eps,
        )

    def _matrix(self, name: str, *linears: nn.Linear, alternate: bool = False) -> _Matrix:
        """The matrices one below the other; or, of two, 16 rows of either in turns."""
        unit = LANES if alternate else 1
        weight_OI = _joined([linear.weight for linear in linears], unit)
        weight_OI = F.pad(weight_OI, (0, weight_OI.shape[1] % 2, 0, -len(weight_OI) % PANEL))
        pairs = weight_OI.shape[1] // 2
        rows = weight_OI.contiguous().view(torch.int32).view(-1, PANEL, pairs)
        if name not in self._panels:
            self._panels[name] = torch.empty((len(rows), pairs, PANEL), dtype=torch.int32)
        panels = self._panels[name].copy_(rows.transpose(1, 2))
        bias = None
        if linears[0].bias is not None:
            bias_O = _joined([linear.bias.float() for linear in linears], unit)
            bias = self._pointer(F.pad(bias_O, (0, -len(bias_O) % PANEL)))
        outputs = sum(linear.out_features for linear in linears)
        return _Matrix(panels.data_ptr(), bias, outputs, pairs)

    def _pointer(self, tensor: Tensor) -> int:
        """Where the numbers lie, of memory that stays as long as they may be read."""
        kept = tensor.detach().contiguous()
        self._kept.append(kept)
        return kept.data_ptr()


def _joined(parts: list[Tensor], unit: int) -> Tensor:
    """One below the other; where `unit` is not 1, so many rows of each in turns."""
    if unit == 1:
        return parts[0] if len(parts) == 1 else torch.cat(parts)
    rest = -len(parts[0]) % unit
    filled = [F.pad(part, (*[0, 0] * (part.dim() - 1), 0, rest)) for part in parts]
    return torch.stack([part.unflatten(0, (-1, unit)) for part in filled], dim=1).flatten(0, 2)


def _spans(spans: Sequence[Span]) -> Array:
    length = np.array([span.length for span in spans])
    pages = np.array([len(span.pages) for span in spans])
    past = np.array([span.past for span in spans])
    table = np.stack((length.cumsum() - length, past, length, pages.cumsum() - pages), axis=1)
    return table.astype(np.int32)
