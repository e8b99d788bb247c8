"""How the next token is drawn. Shapes: B rows, V vocabulary, C candidates."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

CANDIDATES = 128
"""Likeliest tokens among which truncated draws are looked for before a whole row is sorted."""
MOST_TOP_K = (1 << 31) - 1
"""More than any vocabulary holds."""
BLOCK = 128
"""Tokens whose probability is summed up first, so that no running sum over all is needed."""


@dataclass(frozen=True)
class Sampling:
    """What a caller asks of a generation.

    temperature: 0 takes the likeliest token. top_k: draw among that many likeliest tokens; 0 means
    all. top_p: of these, keep the smallest set of likeliest tokens with that much of their
    probability. max_new_tokens: length limit. stop_ids: tokens that end the answer, themselves
    included. seed: draws are a function of it. alternatives: how many of the likeliest tokens are
    told, with their log-probabilities, beside each one that is drawn. Raises `ValueError` for
    values that make no sense.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_new_tokens: int = 128
    stop_ids: tuple[int, ...] = (2,)
    seed: int = 0
    alternatives: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be at least 0, not {self.temperature}.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, not {self.top_p}.")
        if not 0 <= self.top_k <= MOST_TOP_K:
            raise ValueError(f"top_k must be from 0 to {MOST_TOP_K}, not {self.top_k}.")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, not {self.max_new_tokens}.")
        if self.alternatives < 0:
            raise ValueError(f"alternatives must be at least 0, not {self.alternatives}.")


class Settings(NamedTuple):
    """`Sampling` of every row. None where it is the same as none: 1, 1 and 0."""

    greedy_B: Tensor | None
    temperature_B: Tensor | None
    top_p_B: Tensor | None
    top_k_B: Tensor | None


def settings(rows: Sequence[Sampling], device: torch.device) -> Settings:
    """Gather what the rows of a batch ask for."""
    distinct = set(rows)

    def tensor(wanted: bool, values: list[float]) -> Tensor | None:
        return torch.tensor(values, device=device) if wanted else None

    truncated = any(row.top_p < 1 or row.top_k for row in distinct)
    return Settings(
        tensor(any(row.temperature == 0 for row in distinct), [r.temperature == 0 for r in rows]),
        tensor(
            any(row.temperature not in (0, 1) for row in distinct),
            [row.temperature or 1.0 for row in rows],
        ),
        tensor(truncated, [row.top_p for row in rows]),
        tensor(truncated, [row.top_k for row in rows]),
    )


def draw(logits_BV: Tensor, uniforms_B: Tensor, rows: Settings) -> tuple[Tensor, Tensor]:
    """One token id a row, and its log-probability at temperature 1 without truncation, in nats.

    A token is found by inverting the cumulative distribution at one uniform number, in two steps:
    the block of tokens, then the token. So a draw costs little more than the softmax.
    """
    probabilities_BV = _softmax(logits_BV)
    if rows.temperature_B is None:
        weights_BV = probabilities_BV
    else:
        # The likeliest token's is 0: the smallest temperature leaves it, and finite ones below.
        below_BV = logits_BV.float() - logits_BV.amax(dim=-1, keepdim=True)
        weights_BV = _softmax(below_BV / rows.temperature_B[:, None].clamp(min=1e-30))
    if rows.top_p_B is None or rows.top_k_B is None:
        tokens_B = _invert(weights_BV, uniforms_B)
    else:
        tokens_B = _truncated(weights_BV, uniforms_B, rows.top_p_B, rows.top_k_B)
    if rows.greedy_B is not None:
        tokens_B = torch.where(rows.greedy_B, logits_BV.argmax(dim=-1), tokens_B)
    chosen_B = probabilities_BV.gather(1, tokens_B[:, None])[:, 0]
    return tokens_B, _log(chosen_B, logits_BV, tokens_B)


def likeliest(logits_BV: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` likeliest token ids of each row, best first, and their log-probabilities at
    temperature 1, in nats: [B, count] each."""
    wide_BV = logits_BV.float()
    found = wide_BV.topk(count)
    return found.indices, found.values - wide_BV.logsumexp(dim=-1, keepdim=True)


def _softmax(logits_BV: Tensor) -> Tensor:
    """In float32."""
    if logits_BV.device.type == "cpu":  # in place: a pass over memory costs as much as the numbers
        wide_BV = logits_BV.to(torch.float32, copy=True)
        return torch.softmax(wide_BV, dim=-1, out=wide_BV)
    return torch.softmax(logits_BV, dim=-1, dtype=torch.float32)


def _invert(weights_BV: Tensor, uniforms_B: Tensor) -> Tensor:
    rows, vocabulary = weights_BV.shape
    if vocabulary % BLOCK:
        weights_BV = F.pad(weights_BV, (0, BLOCK - vocabulary % BLOCK))
    blocks = weights_BV.view(rows, -1, BLOCK)
    block_B, rest_B = _search(blocks.sum(dim=-1), uniforms_B)
    inside = blocks[torch.arange(rows, device=block_B.device), block_B]
    token_B, _ = _search(inside, rest_B)
    return (block_B * BLOCK + token_B).clamp(max=vocabulary - 1)  # beyond only of NaN


def _search(weights_BC: Tensor, uniforms_B: Tensor) -> tuple[Tensor, Tensor]:
    """The entry at which the running sum passes `uniforms_B` of the total, and how far into that
    entry it does, from 0 to 1. An entry of weight 0 is never found."""
    cumulative = weights_BC.cumsum(dim=-1)
    total = cumulative[:, -1:]
    below = torch.nextafter(total, torch.zeros_like(total))  # rounding must not pass the end
    threshold = torch.minimum(uniforms_B[:, None] * total, below)
    found = torch.searchsorted(cumulative, threshold, right=True)
    found = found.clamp(max=cumulative.shape[1] - 1)
    weight = weights_BC.gather(1, found)
    into = (threshold - (cumulative.gather(1, found) - weight)) / weight
    return found[:, 0], into[:, 0].clamp(0, 1)


def _truncated(weights_BV: Tensor, uniforms_B: Tensor, top_p_B: Tensor, top_k_B: Tensor) -> Tensor:
    vocabulary = weights_BV.shape[1]
    whole_B = (top_k_B == 0) & (top_p_B == 1)
    top_k_B = torch.where(top_k_B == 0, vocabulary, top_k_B)
    candidates = min(CANDIDATES, vocabulary)
    ordered, indices = weights_BV.topk(candidates)
    found = _nucleus(ordered, weights_BV, uniforms_B, top_p_B, top_k_B)
    tokens_B = indices.gather(1, found[:, None])[:, 0]
    tokens_B = torch.where(whole_B, _invert(weights_BV, uniforms_B), tokens_B)
    # top_p is a share of what top_k leaves, which the candidates tell of the whole row alone.
    unknown_B = ((top_k_B < vocabulary) & (top_p_B < 1)) | (ordered.sum(dim=-1) < top_p_B)
    beyond = (top_k_B > candidates) & unknown_B & ~whole_B
    if candidates < vocabulary and beyond.any():
        wide = weights_BV[beyond]
        ordered, indices = wide.sort(dim=-1, descending=True)
        found = _nucleus(ordered, wide, uniforms_B[beyond], top_p_B[beyond], top_k_B[beyond])
        tokens_B[beyond] = indices.gather(1, found[:, None])[:, 0]
    return tokens_B


def _nucleus(
    ordered_BC: Tensor, weights_BV: Tensor, uniforms_B: Tensor, top_p_B: Tensor, top_k_B: Tensor
) -> Tensor:
    """Place of the drawn token among candidates in falling order."""
    places = torch.arange(ordered_BC.shape[1], device=ordered_BC.device)
    kept_BC = torch.where(places < top_k_B[:, None], ordered_BC, 0)
    every = top_k_B >= weights_BV.shape[1]
    total_B = torch.where(every, weights_BV.sum(dim=-1), kept_BC.sum(dim=-1))
    before = kept_BC.cumsum(dim=-1) - kept_BC
    kept_BC = torch.where((before < (top_p_B * total_B)[:, None]) | (places == 0), kept_BC, 0)
    return _search(kept_BC, uniforms_B)[0]


def _log(chosen_B: Tensor, logits_BV: Tensor, tokens_B: Tensor) -> Tensor:
    # On a GPU another pass is cheaper than to ask it whether float32 runs out of digits.
    if chosen_B.device.type == "cpu" and not (chosen_B < 1e-30).any():
        return chosen_B.log()
    logits_BV = logits_BV.float()
    return logits_BV.gather(1, tokens_B[:, None])[:, 0] - logits_BV.logsumexp(dim=-1)
