"""Models whose forward passes are computed by compiled code, where nothing learns from them.

Shapes: B batch, T tokens, D model width, N tokens that are asked for.
"""

import ctypes
from ctypes import byref
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from llama2.cpu.step import PAGE, Array, Matrices, Step, kernels_for, room_for
from llama2.model import ScalarModel, Transformer, Trunk, Unembedding

AnyModel = TypeVar("AnyModel", Transformer, ScalarModel)

TOKENS = 1024
"""Tokens of whole documents that go through the layers together: what lies between two layers then
stays in a processor's caches."""


class CompiledTrunk(nn.Module):
    """Does what `trunk` does, without a gradient. kernels: what `kernels_for` gave for it."""

    def __init__(self, trunk: Trunk, kernels: ctypes.CDLL) -> None:
        super().__init__()
        self.trunk, self._kernels = trunk, kernels
        self._pages = 0
        self._step: Step | None = None

    @classmethod
    def of(cls, trunk: Trunk) -> "CompiledTrunk | None":
        """That of `trunk`, where this machine can compute it so."""
        kernels = kernels_for(trunk)
        return None if kernels is None else cls(trunk, kernels)

    def weights_changed(self) -> None:
        """Compute with what the weights now are."""
        if self._step is not None:
            self._step.weights_changed()

    @torch.no_grad()
    def forward(
        self,
        tokens_BT: Tensor,
        segments_BT: Tensor | None = None,
        places_N: Tensor | None = None,
    ) -> Tensor:
        """Hidden states [B, T, D], 0 on padding; with `places_N`, [N, D] of these tokens of the
        flattened batch."""
        shape, width = tokens_BT.shape, self.trunk.config.hidden_size
        segments = np.ones(shape) if segments_BT is None else segments_BT.numpy()
        documents = _documents(segments)
        places = np.arange(tokens_BT.numel()) if places_N is None else places_N.numpy()
        asked, which = np.unique(places, return_inverse=True)
        hidden = torch.zeros((len(asked), width), dtype=torch.bfloat16)
        tokens = tokens_BT.numpy().reshape(-1)
        for part in _parts(documents):
            self._compute(tokens, part, asked, hidden)
        found = hidden if np.array_equal(asked, places) else hidden[which]
        return found.view(*shape, width) if places_N is None else found

    def _compute(self, tokens: Array, documents: Array, asked: Array, hidden: Tensor) -> None:
        """Fill in the hidden states that are asked for of some documents."""
        start, length = documents.T
        pages = -(-length // PAGE)
        first = length.cumsum() - length
        spans = np.stack((first, np.zeros_like(first), length, pages.cumsum() - pages), axis=1)
        flat = np.repeat(start - first, length) + np.arange(length.sum())
        wanted = np.isin(flat, asked)
        rows = torch.from_numpy(np.searchsorted(asked, flat[wanted]))
        output = torch.empty((len(rows), hidden.shape[1]), dtype=torch.bfloat16)
        step = self._with_room(int(pages.sum()))
        step(tokens[flat], spans, np.arange(pages.sum()), np.flatnonzero(wanted), output)
        hidden[rows] = output

    def _with_room(self, pages: int) -> Step:
        if self._step is None or pages > self._pages:
            self._pages = max(pages, TOKENS // PAGE)
            keys, values = room_for(self.trunk.config, self._pages)
            layers = self.trunk.config.num_hidden_layers
            memory = [torch.empty(shape, dtype=torch.bfloat16) for shape in (keys, values)]
            self._step = Step(self.trunk, None, self._kernels, *[[m] * layers for m in memory])
        return self._step


class CompiledUnembedding(Unembedding):
    """The head of a frozen model, of its weight."""

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
def compiled(model: AnyModel) -> AnyModel:
    """A frozen model that compiled code computes from now on, where this machine can."""
    kernels = kernels_for(model.model)
    if kernels is not None:
        model.model = CompiledTrunk(model.model, kernels)  # type: ignore[assignment]
        if isinstance(model, Transformer):
            model.lm_head = CompiledUnembedding(model.lm_head, kernels)
    return model


def _documents(segments_BT: Array) -> Array:
    """Place of the first token in the flattened batch, and length, of each document: [.., 2]."""
    begins = np.ones(segments_BT.shape, bool)
    begins[:, 1:] = segments_BT[:, 1:] != segments_BT[:, :-1]
    starts = np.flatnonzero(begins)
    lengths = np.diff(starts, append=segments_BT.size)
    return np.stack((starts, lengths), axis=1)[segments_BT.reshape(-1)[starts] != 0]


def _parts(documents: Array) -> list[Array]:
    """Neighbours, the last of which begins before `TOKENS` tokens."""
    before = np.cumsum(documents[:, 1]) - documents[:, 1]
    return [p for p in np.split(documents, np.flatnonzero(np.diff(before // TOKENS)) + 1) if len(p)]
