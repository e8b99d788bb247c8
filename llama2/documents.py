"""Attention within the documents of a packed batch, without a mask.

Documents of like length are gathered into right-padded groups, where causal attention alone keeps
them apart: no real token looks at the padding behind it. A mask would cost the square of the row's
length, and keep the fast kernels from being used.
Shapes: B rows, T tokens, N = B T tokens, M slots of the groups, H heads, K head width, L tokens of
the longest document in a group.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor


class _Rearrange(torch.autograd.Function):
    """x[index], zero where there are holes; `inverse` undoes it, so the gradient is a gather
    too."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, index: Tensor, holes: Tensor, inverse: Tensor, inverse_holes: Tensor
    ) -> Tensor:
        ctx.save_for_backward(inverse, inverse_holes)
        return x.index_select(0, index).index_fill_(0, holes, 0)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:
        inverse, inverse_holes = ctx.saved_tensors
        gradient = gradients[0].index_select(0, inverse).index_fill_(0, inverse_holes, 0)
        return gradient, None, None, None, None


class Documents:
    """Where the documents of a batch lie: runs of one segment within a row; segment 0 is
    padding."""

    def __init__(self, segments_BT: Tensor) -> None:
        segments = segments_BT.cpu().numpy()
        starts = np.ones_like(segments, dtype=bool)
        starts[:, 1:] = segments[:, 1:] != segments[:, :-1]
        firsts = np.flatnonzero(starts)
        lengths = np.diff(firsts, append=segments.size)
        real = segments.reshape(-1)[firsts] != 0
        firsts, lengths = firsts[real], lengths[real]
        # Lengths within a factor of two share a group, so padding never more than doubles it.
        sizes = np.ceil(np.log2(np.maximum(lengths, 1))).astype(int)
        self.shapes: list[tuple[int, int]] = []
        slots, valid = [], []
        for size in np.unique(sizes):
            members = sizes == size
            longest = int(lengths[members].max())
            offsets = np.arange(longest)
            slots.append((firsts[members, None] + offsets).reshape(-1))
            valid.append((offsets < lengths[members, None]).reshape(-1))
            self.shapes.append((int(members.sum()), longest))
        begins = np.arange(0, segments.size, segments.shape[1])
        self._is_batch = self.shapes == [segments.shape] and np.array_equal(firsts, begins)
        """Whether the batch as it stands is the one group: a document a row, padding behind it."""
        if self._is_batch:
            return
        self._index(np.concatenate(slots), np.concatenate(valid), segments, segments_BT.device)

    def _index(
        self,
        slots: "np.ndarray[Any, Any]",
        valid: "np.ndarray[Any, Any]",
        segments: "np.ndarray[Any, Any]",
        device: torch.device,
    ) -> None:
        inverse = np.zeros(segments.size, dtype=np.int64)
        inverse[slots[valid]] = np.flatnonzero(valid)

        def tensor(array: "np.ndarray[Any, Any]") -> Tensor:
            return torch.from_numpy(array.astype(np.int64)).to(device)

        self._slots, self._empty = tensor(np.where(valid, slots, 0)), tensor(np.flatnonzero(~valid))
        self._tokens, self._padding = tensor(inverse), tensor(np.flatnonzero(segments == 0))

    def split(self, x_BTHK: Tensor) -> list[Tensor]:
        """The tokens of each group, [documents, L, H, K]; behind the end of a document there is
        nothing to go by."""
        if self._is_batch:
            return [x_BTHK]
        x_NHK = x_BTHK.reshape(-1, *x_BTHK.shape[2:])
        x_MHK = _Rearrange.apply(x_NHK, self._slots, self._empty, self._tokens, self._padding)
        parts = x_MHK.split([documents * longest for documents, longest in self.shapes])
        return [
            part.view(*shape, *x_MHK.shape[1:])
            for part, shape in zip(parts, self.shapes, strict=True)
        ]

    def join(self, parts: list[Tensor], rows: int) -> Tensor:
        """Back from groups to [B, T, H, K]; on padding there is nothing to go by."""
        if self._is_batch:
            return parts[0]
        x_MHK = torch.cat([part.flatten(0, 1) for part in parts])
        x_NHK = _Rearrange.apply(x_MHK, self._tokens, self._padding, self._slots, self._empty)
        return x_NHK.view(rows, -1, *x_NHK.shape[1:])
