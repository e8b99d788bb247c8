"""The head of a frozen model in compiled code (`head.cpp`), for CPUs with bfloat16 instructions.

Shapes: D model width, V vocabulary, N tokens whose targets are asked for.
"""

import ctypes
from ctypes import byref

import torch
from torch import Tensor, nn

from llama2.cpu.step import Matrices, kernels_for
from llama2.model import Transformer, Unembedding


class CompiledUnembedding(Unembedding):
    """Log-probabilities of targets without a logit in memory, of weights that do not change."""

    def __init__(self, head: nn.Linear, kernels: ctypes.CDLL) -> None:
        super().__init__(head.in_features, head.out_features, bias=False, device="meta")
        self.weight, self._logprobs = head.weight, kernels.logprobs
        self._matrices = Matrices()
        self._matrix = self._matrices.matrix("head", head)

    def forward(self, hidden: Tensor, targets_N: Tensor | None = None) -> Tensor:
        """Logits [..., V]; with `targets_N`, log-probabilities [N] of `hidden` [N, D] instead.

        Raises `IndexError` for targets outside the vocabulary.
        """
        if targets_N is None:
            return super().forward(hidden)
        if not len(targets_N):
            return torch.empty(0, dtype=torch.float32)
        if not 0 <= targets_N.min() <= targets_N.max() < self.out_features:
            raise IndexError(f"There are targets outside the vocabulary of {self.out_features}.")
        hidden, targets_N = hidden.contiguous(), targets_N.contiguous()
        found_N = torch.empty(len(targets_N), dtype=torch.float32)
        self._logprobs(
            byref(self._matrix),
            hidden.data_ptr(),
            targets_N.data_ptr(),
            len(targets_N),
            found_N.data_ptr(),
            torch.get_num_threads(),
        )
        return found_N


@torch.no_grad()
def with_compiled_head(model: Transformer) -> Transformer:
    """A frozen model whose head compiled code computes from now on, where this machine can."""
    kernels = kernels_for(model.model)
    if kernels is not None:
        model.lm_head = CompiledUnembedding(model.lm_head, kernels)
    return model
