"""Token batches: padding, targets and segments. Shapes: B rows, T tokens."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from llama2.losses import IGNORE

TokenArray = np.ndarray[tuple[int], np.dtype[np.integer]]
FloatArray = np.ndarray[tuple[int], np.dtype[np.float32]]
MaskArray = np.ndarray[tuple[int], np.dtype[np.bool_]]


@dataclass(frozen=True)
class TokenSequence:
    """A document: token ids, and which of them the loss asks for (never the first)."""

    tokens: TokenArray
    is_target: MaskArray


@dataclass(frozen=True)
class TokenBatch:
    """Inputs, the document of each token (0: padding) and the token to predict next (`IGNORE`:
    none)."""

    tokens_BT: Tensor
    segments_BT: Tensor
    targets_BT: Tensor

    def to(self, device: torch.device) -> "TokenBatch":
        return TokenBatch(
            self.tokens_BT.to(device), self.segments_BT.to(device), self.targets_BT.to(device)
        )


def pack(rows: Sequence[Sequence[TokenSequence]], width: int | None = None) -> TokenBatch:
    """Lay documents one behind the other in each row, padded right to `width` (default: the
    longest).

    A document of n tokens takes n - 1 places: its last token is only a target.
    """
    used = [sum(len(document.tokens) - 1 for document in row) for row in rows]
    width = max(1, *used) if width is None else width
    tokens = np.zeros((len(rows), width), dtype=np.int64)
    segments = np.zeros((len(rows), width), dtype=np.int64)
    targets = np.full((len(rows), width), IGNORE, dtype=np.int64)
    for r, row in enumerate(rows):
        start = 0
        for number, document in enumerate(row, start=1):
            end = start + len(document.tokens) - 1
            tokens[r, start:end] = document.tokens[:-1]
            segments[r, start:end] = number
            wanted = document.is_target[1:]
            targets[r, start:end][wanted] = document.tokens[1:][wanted]
            start = end
    return TokenBatch(
        torch.from_numpy(tokens), torch.from_numpy(segments), torch.from_numpy(targets)
    )


def pad_right(sequences: Sequence[TokenArray]) -> tuple[Tensor, Tensor, Tensor]:
    """One sequence a row: tokens_BT, segments_BT (1, padding 0) and a mask of the last tokens,
    [B, T]."""
    lengths = [len(tokens) for tokens in sequences]
    assert min(lengths) > 0, "a sequence without a last token"
    tokens_BT = np.zeros((len(sequences), max(lengths)), dtype=np.int64)
    for row, tokens in zip(tokens_BT, sequences, strict=True):
        row[: len(tokens)] = tokens
    index_T, lengths_B1 = torch.arange(tokens_BT.shape[1]), torch.tensor(lengths)[:, None]
    return torch.from_numpy(tokens_BT), (index_T < lengths_B1).long(), index_T == lengths_B1 - 1
