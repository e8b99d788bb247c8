"""The entropy of the next token without the probabilities of all tokens, forward and backward.

Shapes: N tokens, D model width, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor

from llama2.log_probs import WIDE_LOGITS, selected_log_probs
from llama2.model import Unembedding


class EntropyUnembedding(Unembedding):
    """A language-model head that, given targets, tells the entropy at each of them besides."""

    @classmethod
    def of(cls, head: Unembedding) -> "EntropyUnembedding":
        """With the weight of `head`."""
        made = cls(head.in_features, head.out_features, bias=False, device="meta")
        made.weight = head.weight
        return made

    def forward(self, hidden: Tensor, targets_N: Tensor | None = None) -> Tensor:
        """Logits; with `targets_N`, log-probabilities and entropies [2, N] instead, in nats."""
        if targets_N is None:
            return super().forward(hidden)
        logprobs_N = selected_log_probs(hidden, self.weight, targets_N)
        return torch.stack((logprobs_N, entropies(hidden, self.weight)))


def entropies(hidden_ND: Tensor, weight_VD: Tensor) -> Tensor:
    """-sum p log p of each softmax(hidden @ weight.T): [N], float32, in nats.

    Probabilities are held in float32 for a few tokens at a time, and computed again for the
    backward pass.
    """
    found: Tensor = _Entropies.apply(hidden_ND, weight_VD)
    return found


class _Entropies(torch.autograd.Function):
    """The gradient of the entropy H by the logits is -p (log p + H)."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight_VD: Tensor) -> Tensor:
        ctx.save_for_backward(hidden_ND, weight_VD)
        found = []
        for hidden in hidden_ND.split(_rows(weight_VD)):
            logprobs = (hidden @ weight_VD.T).float().log_softmax(-1)
            found.append(-(logprobs.exp() * logprobs).sum(-1))
        return torch.cat([*found, hidden_ND.new_empty(0, dtype=torch.float32)])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None]:
        hidden_ND, weight_VD = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden_ND)
        grad_weight = None
        if ctx.needs_input_grad[1]:  # parts add up in float32
            grad_weight = torch.zeros_like(weight_VD, dtype=torch.float32)
        size = _rows(weight_VD)
        for start in range(0, len(hidden_ND), size):
            rows = slice(start, start + size)
            logprobs = (hidden_ND[rows] @ weight_VD.T).float().log_softmax(-1)
            chance = logprobs.exp()
            entropy = -(chance * logprobs).sum(-1, keepdim=True)
            by_logits = logprobs.add_(entropy).mul_(chance).mul_(-gradients[0][rows, None])
            by_logits = by_logits.to(hidden_ND.dtype)
            grad_hidden[rows] = by_logits @ weight_VD
            if grad_weight is not None:
                grad_weight += by_logits.T @ hidden_ND[rows]
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight_VD.dtype)


def _rows(weight_VD: Tensor) -> int:
    return max(1, WIDE_LOGITS[weight_VD.device.type] // len(weight_VD))
