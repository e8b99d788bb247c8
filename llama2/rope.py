"""Rotary position embeddings, in the half-split layout of Hugging Face weights.

Shapes: B batch, T tokens, H heads, K head width.
"""

import math
from typing import Any

import torch
from torch import Tensor

from llama2.config import ModelConfig, RopeScaling
from llama2.cpu import operators


def inverse_frequencies(config: ModelConfig) -> Tensor:
    """Angular frequency of each of the K/2 pairs, in radians per token, float32."""
    exponents = torch.arange(0, config.head_width, 2, dtype=torch.int64).float() / config.head_width
    frequencies = 1.0 / config.rope_theta**exponents
    return frequencies if config.rope_scaling is None else _scale(frequencies, config.rope_scaling)


def _scale(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    wavelengths = 2 * math.pi / frequencies
    turns = scaling.original_max_position_embeddings / wavelengths
    span = scaling.high_freq_factor - scaling.low_freq_factor
    smooth = ((turns - scaling.low_freq_factor) / span).clamp(0, 1)
    return (1 - smooth) * frequencies / scaling.factor + smooth * frequencies


def rotation(
    positions_BT: Tensor, frequencies: Tensor, heads: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cosines and sines [B, T, H K] that turn queries and keys to their positions.

    They lie there once for every head, and sines of the first half of a head with a minus: in this
    form turning takes two products over contiguous memory.
    """
    angles = positions_BT[:, :, None].float() * frequencies
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    cos, sin = torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)
    return cos.repeat(1, 1, heads), sin.repeat(1, 1, heads)


class _Rotate(torch.autograd.Function):
    """The gradient of a rotation is the rotation back."""

    @staticmethod
    def forward(ctx: Any, x_BTHK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x_BTHK, cos, sin, 1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turned(gradients[0], cos, sin, -1), None, None


def _turned(x_BTHK: Tensor, cos: Tensor, sin: Tensor, direction: int) -> Tensor:
    if operators.fits(x_BTHK, cos, sin):
        return operators.turn(x_BTHK, cos, sin, direction)
    first, second = x_BTHK.chunk(2, dim=-1)
    swapped = torch.cat((second, first), dim=-1).flatten(2)
    return (x_BTHK.flatten(2) * cos).addcmul_(swapped, sin, value=direction).view(x_BTHK.shape)


def rotate(x_BTHK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x[i], x[i + K/2]) by its angle (RoFormer, equation 34).

    cos, sin: of `rotation`, for as many heads as there are, or more.
    """
    width = x_BTHK.shape[2] * x_BTHK.shape[3]
    turned_BTHK: Tensor = _Rotate.apply(x_BTHK, cos[..., :width], sin[..., :width])
    return turned_BTHK
