"""A forward pass in one call of compiled code (`step.cpp`), for CPUs with bfloat16 instructions.

Shapes: N tokens, O outputs and I inputs of a matrix, R tokens that are asked for, V vocabulary.
"""

import ctypes
from collections.abc import Sequence
from ctypes import POINTER, Structure, byref, c_float, c_int32, c_void_p
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama2.config import ModelConfig
from llama2.cpu.kernels import kernels
from llama2.model import FeedForward, Layer, Trunk
from llama2.rope import inverse_frequencies, rotation
from llama2.swiglu import SwiGLULinear

PAGE = 64
PANEL = 32
LANES = 16

Array = np.ndarray[Any, Any]


class Matrix(Structure):
    _fields_ = [
        ("panels", c_void_p),
        ("bias", c_void_p),
        ("outputs", c_int32),
        ("pairs", c_int32),
    ]


class _Layer(Structure):
    _fields_ = [
        *[(name, Matrix) for name in ("qkv", "o", "gate_up", "down")],
        *[(name, c_void_p) for name in ("attention_norm", "feed_forward_norm", "keys", "values")],
    ]


class _Model(Structure):
    _fields_ = [
        ("layers", POINTER(_Layer)),
        ("head", Matrix),
        *[(name, c_void_p) for name in ("embeddings", "norm", "cos", "sin")],
        *[(name, c_int32) for name in ("depth", "width", "heads", "groups", "head_width")],
        ("eps", c_float),
    ]


class _Batch(Structure):
    _fields_ = [
        *[(name, c_void_p) for name in ("tokens", "spans", "pages", "asked", "output")],
        *[(name, c_int32) for name in ("token_count", "span_count", "asked_count", "threads")],
    ]


def kernels_for(trunk: Trunk) -> ctypes.CDLL | None:
    """The compiled functions, where this machine runs them and `trunk` is one for them."""
    weight = trunk.embed_tokens.weight
    fits = weight.device.type == "cpu" and weight.dtype == torch.bfloat16
    if not fits or trunk.config.hidden_size % 2:
        return None
    # ZeRO 3 leaves some weights or all empty here; adapters have products of their own.
    whole = weight.shape == (trunk.config.vocab_size, trunk.config.hidden_size) and all(
        type(x) in (nn.Linear, SwiGLULinear) and x.weight.shape == (x.out_features, x.in_features)
        for x in _linears(trunk)
    )
    whole = whole and all(x.dtype == torch.bfloat16 for x in trunk.parameters())
    return kernels() if whole and trunk.sequence_parallel.degree == 1 else None


def _linears(trunk: Trunk) -> list[Any]:
    names = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    return [x for name, x in trunk.named_modules() if name.endswith(names)]


def room_for(config: ModelConfig, pages: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of the keys and values of a layer."""
    groups, width = config.num_key_value_heads, config.head_width
    padded = -(-width // LANES) * LANES
    return (pages, groups, width // 2, PAGE, 2), (pages, groups, PAGE // 2, padded, 2)


class Matrices:
    """Weights laid out for compiled code, in memory of their own."""

    def __init__(self) -> None:
        self._panels: dict[str, Tensor] = {}
        self._kept: list[Tensor] = []

    def forget(self) -> None:
        """Let go of what `pointer` keeps; memory for matrices is kept for the next ones."""
        self._kept = []

    def matrix(self, name: str, *linears: nn.Linear, turns: Sequence[int] = ()) -> Matrix:
        """The matrices one below the other; or in turns, so many rows of each."""
        weight_OI = _joined([linear.weight for linear in linears], turns)
        weight_OI = F.pad(weight_OI, (0, weight_OI.shape[1] % 2, 0, -len(weight_OI) % PANEL))
        pairs = weight_OI.shape[1] // 2
        rows = weight_OI.contiguous().view(torch.int32).view(-1, PANEL, pairs)
        if name not in self._panels:
            self._panels[name] = torch.empty((len(rows), pairs, PANEL), dtype=torch.int32)
        panels = self._panels[name].copy_(rows.transpose(1, 2))
        bias = None
        if linears[0].bias is not None:
            bias_O = _joined([linear.bias.float() for linear in linears], turns)
            bias = self.pointer(F.pad(bias_O, (0, -len(bias_O) % PANEL)))
        outputs = sum(linear.out_features for linear in linears)
        return Matrix(panels.data_ptr(), bias, outputs, pairs)

    def pointer(self, tensor: Tensor) -> int:
        """Where the numbers lie, of memory that stays as long as they may be read."""
        kept = tensor.detach().contiguous()
        self._kept.append(kept)
        return kept.data_ptr()


class Step:
    """A trunk and a head on it, with memory for the keys and values of each layer.

    What is written to the weights counts once `weights_changed` was called; they are laid out anew
    at the next call.
    """

    def __init__(
        self,
        trunk: Trunk,
        head: nn.Linear,
        kernels: ctypes.CDLL,
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
    ) -> None:
        self._trunk, self._head, self._kernels = trunk, head, kernels
        self._keys, self._values = keys, values
        self._matrices = Matrices()
        self._model: _Model | None = None
        self._turn(trunk.config.max_position_embeddings)

    def weights_changed(self) -> None:
        """Compute with what the weights now are."""
        self._model = None
        self._matrices.forget()

    def __call__(
        self, tokens_N: Array, spans: Array, pages: Array, asked_R: Array, output: Tensor
    ) -> None:
        """Fill `output` with the logits [R, V] behind the tokens at places `asked_R`, which rise.

        spans: of each, one behind the other in the batch: its first token's place, how many tokens
        of its row were computed before, how many are now, and where its row's pages begin in
        `pages`. Raises `IndexError` for tokens outside the vocabulary.
        """
        vocabulary = self._trunk.config.vocab_size
        if len(tokens_N) and not 0 <= tokens_N.min() <= tokens_N.max() < vocabulary:
            raise IndexError(f"There are tokens outside the vocabulary of {vocabulary}.")
        longest = int((spans[:, 1] + spans[:, 2]).max())
        if longest > len(self._cos):
            self._turn(longest)
            self._model = None
        if self._model is None:
            self._model = self._lay_out()
        arrays = (
            tokens_N.astype(np.int64, copy=False),
            np.ascontiguousarray(spans, np.int32),
            pages.astype(np.int32, copy=False),
            asked_R.astype(np.int32, copy=False),
        )
        batch = _Batch(
            *[array.ctypes.data for array in arrays],
            output.data_ptr(),
            len(tokens_N),
            len(spans),
            len(asked_R),
            torch.get_num_threads(),
        )
        self._kernels.forward(byref(self._model), byref(batch))

    def _turn(self, length: int) -> None:
        positions = torch.arange(length)[None]
        frequencies = inverse_frequencies(self._trunk.config)
        cos, sin = rotation(positions, frequencies, 1, torch.bfloat16)
        self._cos, self._sin = cos[0].contiguous(), sin[0].contiguous()

    @torch.no_grad()
    def _lay_out(self) -> _Model:
        trunk, config = self._trunk, self._trunk.config
        laid = self._matrices
        laid.forget()
        layers = (_Layer * config.num_hidden_layers)()
        group = config.num_attention_heads // config.num_key_value_heads * config.head_width
        heads = (group, config.head_width, config.head_width)  # queries, key and value of a group
        for index, layer in enumerate(trunk.layers):
            assert isinstance(layer, Layer)
            attention, mlp = layer.self_attn, layer.mlp
            assert isinstance(mlp, FeedForward)
            layers[index] = _Layer(
                laid.matrix(
                    f"{index} qkv",
                    *(attention.q_proj, attention.k_proj, attention.v_proj),
                    turns=heads,
                ),
                laid.matrix(f"{index} o", attention.o_proj),
                laid.matrix(f"{index} gate_up", mlp.gate_proj, mlp.up_proj, turns=(LANES, LANES)),
                laid.matrix(f"{index} down", mlp.down_proj),
                laid.pointer(layer.input_layernorm.weight),
                laid.pointer(layer.post_attention_layernorm.weight),
                self._keys[index].data_ptr(),
                self._values[index].data_ptr(),
            )
        return _Model(
            layers,
            laid.matrix("head", self._head),
            laid.pointer(trunk.embed_tokens.weight),
            laid.pointer(trunk.norm.weight),
            self._cos.data_ptr(),
            self._sin.data_ptr(),
            config.num_hidden_layers,
            config.hidden_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_width,
            config.rms_norm_eps,
        )


def _joined(parts: list[Tensor], turns: Sequence[int]) -> Tensor:
    """One below the other, or in turns so many rows of each; the last ones filled up with zeros."""
    if not turns:
        return parts[0] if len(parts) == 1 else torch.cat(parts)
    filled = [
        F.pad(part, (*[0, 0] * (part.dim() - 1), 0, -len(part) % rows)).unflatten(0, (-1, rows))
        for part, rows in zip(parts, turns, strict=True)
    ]
    return torch.cat(filled, dim=1).flatten(0, 1)
