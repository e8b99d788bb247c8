"""Log-probabilities of chosen tokens without the logits of all tokens, forward and backward.

Shapes: N tokens, D model width, V vocabulary; K tokens of which something is kept.
"""

from typing import Any

import torch
from torch import Tensor

from llama2.cpu import operators

KEPT_BYTES = 1 << 29
"""Most that the forward pass keeps for the backward pass, in bytes; beyond it is computed again."""
CHUNK_LOGITS = {"cpu": 1 << 24, "cuda": 1 << 25}
"""Logits that are computed at a time."""
WIDE_LOGITS = {"cpu": 1 << 20, "cuda": 1 << 26}
"""Logits that are held in float32 at a time; a CPU's cache should hold them."""


def selected_log_probs(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
    """Log-probability of each target under softmax(hidden @ weight.T): [N], float32, in nats.

    For the backward pass softmax minus one-hot is kept, in the precision of `hidden_ND`, of as many
    tokens as fit into `KEPT_BYTES`; the others' logits are computed again, a chunk at a time.
    """
    keep = torch.is_grad_enabled() and (hidden_ND.requires_grad or weight_VD.requires_grad)
    logprobs_N: Tensor = _SelectedLogProbs.apply(hidden_ND, weight_VD, targets_N, keep)
    return logprobs_N


class _SelectedLogProbs(torch.autograd.Function):
    """With the error E = softmax(logits) - onehot(targets), the gradient by the logits is -g E for
    the gradient g of each log-probability. g is multiplied into the narrow matrices of the two
    products, so that the backward pass walks over [N, V] in these products only."""

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, keep: bool
    ) -> Tensor:
        room = KEPT_BYTES // (len(weight_VD) * hidden_ND.element_size()) if keep else 0
        kept = min(len(hidden_ND), room)
        error_KV = hidden_ND.new_empty(kept, len(weight_VD))
        logprobs = []
        for rows in _pieces(0, kept, weight_VD):
            torch.mm(hidden_ND[rows], weight_VD.T, out=error_KV[rows])
            logprobs.append(_log_probs(error_KV[rows], targets_N[rows], becomes_error=True))
        for rows in _pieces(kept, len(hidden_ND), weight_VD):
            logprobs.append(_log_probs(hidden_ND[rows] @ weight_VD.T, targets_N[rows]))
        ctx.save_for_backward(hidden_ND, weight_VD, targets_N, error_KV)
        return torch.cat([*logprobs, hidden_ND.new_empty(0, dtype=torch.float32)])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        hidden_ND, weight_VD, targets_N, error_KV = ctx.saved_tensors
        kept = len(error_KV)
        less_N1 = -gradients[0][:, None]
        # In float32 throughout: torch is slow at products of two precisions.
        weighted_ND = (hidden_ND.float() * less_N1).to(hidden_ND.dtype)
        grad_hidden = torch.empty_like(hidden_ND)
        grad_hidden[:kept] = (error_KV @ weight_VD).float() * less_N1[:kept]
        trained = ctx.needs_input_grad[1]
        grad_weight = error_KV.T @ weighted_ND[:kept] if trained else None
        for rows in _pieces(kept, len(hidden_ND), weight_VD):
            error = hidden_ND[rows] @ weight_VD.T
            _log_probs(error, targets_N[rows], becomes_error=True)
            grad_hidden[rows] = (error @ weight_VD).float() * less_N1[rows]
            if grad_weight is not None:  # parts add up in float32
                grad_weight = grad_weight.float().add_(error.T @ weighted_ND[rows])
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight_VD.dtype)
        return grad_hidden, grad_weight, None, None


def _log_probs(logits_NV: Tensor, targets_N: Tensor, becomes_error: bool = False) -> Tensor:
    """The targets' log-probabilities [N]. With `becomes_error` softmax - onehot takes the place of
    the logits."""
    if operators.fits(logits_NV):
        return operators.softmax(logits_NV, targets_N, becomes_error)
    tokens, vocabulary = logits_NV.shape
    size = max(1, WIDE_LOGITS[logits_NV.device.type] // vocabulary)
    wide_NV = logits_NV.new_empty(min(size, tokens), vocabulary, dtype=torch.float32)
    chosen_N = logits_NV.new_empty(tokens, dtype=torch.float32)
    exact = []
    for rows in _chunks(0, tokens, size):
        logits, chosen = logits_NV[rows], chosen_N[rows, None]
        wide = wide_NV[: len(logits)].copy_(logits)
        torch.softmax(wide, -1, out=wide)
        torch.gather(wide, 1, targets_N[rows, None], out=chosen)
        if chosen.min().item() < 1e-30:  # float32 is about to run out of digits
            every = logits.float().log_softmax(-1)
            exact.append((rows, every.gather(1, targets_N[rows, None])[:, 0]))
        if becomes_error:
            logits.copy_(wide)
    logprobs_N = chosen_N.log()
    for rows, found in exact:
        logprobs_N[rows] = found
    if not becomes_error:
        return logprobs_N
    # As an index of two: of scatter_ torch's bfloat16 kernel walks over everything.
    index = torch.arange(tokens, device=targets_N.device), targets_N
    logits_NV[index] = chosen_N.sub_(1).to(logits_NV.dtype)
    return logprobs_N


def _pieces(start: int, end: int, weight_VD: Tensor) -> list[slice]:
    """Tokens whose logits are computed together."""
    return _chunks(start, end, CHUNK_LOGITS[weight_VD.device.type] // len(weight_VD))


def _chunks(start: int, end: int, size: int) -> list[slice]:
    size = max(1, size)
    return [slice(first, min(first + size, end)) for first in range(start, end, size)]
