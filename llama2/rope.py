"""Rotary position embeddings, in the half-split layout of Hugging Face weights.

Shapes: B batch, T tokens, H heads, K head width.
"""

import math

import torch
from torch import Tensor

from llama2.config import ModelConfig, RopeScaling


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
    positions_BT: Tensor, frequencies: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cosines and sines [B, T, 1, K] that turn queries and keys to their positions."""
    angles = positions_BT[:, :, None, None].float() * frequencies
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x_BTHK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x[i], x[i + K/2]) by its angle (RoFormer, equation 34)."""
    first, second = x_BTHK.chunk(2, dim=-1)
    return x_BTHK * cos + torch.cat((-second, first), dim=-1) * sin
