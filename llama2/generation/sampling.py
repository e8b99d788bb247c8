"""How the next token is drawn. Shapes: B rows, V vocabulary."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """What a caller asks of a generation.

    temperature: 0 takes the likeliest token. top_p, top_k: keep the smallest set of likeliest
    tokens with that much probability, or that many; 1 and 0 keep all. max_new_tokens: length limit.
    stop_ids: tokens that end the answer, themselves included. seed: draws are a function of it.
    Raises `ValueError` for values that make no sense.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_new_tokens: int = 128
    stop_ids: tuple[int, ...] = (2,)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"temperature must be at least 0, not {self.temperature}.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, not {self.top_p}.")
        if self.top_k < 0:
            raise ValueError(f"top_k must be at least 0, not {self.top_k}.")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, not {self.max_new_tokens}.")


def draw(logits_BV: Tensor, sampling: Sampling, uniforms_B: Tensor) -> Tensor:
    """One token id a row, by inverting the cumulative distribution at a uniform number per row.

    One exponential, one running sum and one search over the vocabulary: several times cheaper than
    drawing noise for each entry.
    """
    if sampling.temperature == 0:
        return logits_BV.argmax(dim=-1)
    weights = torch.softmax(logits_BV.float() / sampling.temperature, dim=-1)
    if sampling.top_k or sampling.top_p < 1:
        weights = _truncate(weights, sampling)
    cumulative = weights.cumsum(dim=-1)
    # Scaled by the total, which rounding leaves a little off 1; the clamp keeps 1.0 inside.
    thresholds = uniforms_B[:, None] * cumulative[:, -1:]
    drawn = torch.searchsorted(cumulative, thresholds, right=True)[:, 0]
    return drawn.clamp(max=logits_BV.shape[-1] - 1)


def _truncate(weights_BV: Tensor, sampling: Sampling) -> Tensor:
    ordered, indices = weights_BV.sort(dim=-1, descending=True)
    before = ordered.cumsum(dim=-1) - ordered
    kept = before < sampling.top_p
    if sampling.top_k:
        kept[:, sampling.top_k :] = False
    return torch.zeros_like(weights_BV).scatter(1, indices, ordered * kept)
