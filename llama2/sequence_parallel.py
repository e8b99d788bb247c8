"""Sequence parallelism (DeepSpeed-Ulysses; Jacobs et al. 2023): ranks share the tokens of rows.

Every rank of a group holds one slice of the tokens and all weights. Around attention, slices of
tokens with all heads are exchanged for slices of heads with all tokens, so that attention itself
is as without. Losses are sums: each rank's, over its own slice, is its part of the whole, and its
gradients are added to those of the other ranks.
Shapes: B rows, T tokens of whole rows, P ranks of the group, H heads, K head width.
"""

from math import gcd
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from llama2.batches import TokenBatch
from llama2.config import ModelConfig
from llama2.losses import IGNORE


def groups(world_size: int, degree: int) -> list[list[int]]:
    """The ranks of each sequence group: `degree` consecutive ones, which a node's links join.

    Raises `ValueError` where they do not come out even.
    """
    if degree < 1 or world_size % degree:
        raise ValueError(
            f"{world_size} workers cannot form sequence groups of {degree}; set sequence_parallel "
            "to a number that divides the workers."
        )
    return [list(range(first, first + degree)) for first in range(0, world_size, degree)]


def check_degree(config: ModelConfig, degree: int) -> None:
    """Raise `ValueError` where `degree` ranks cannot share the model's query heads equally.

    Key/value heads need not divide: too few are repeated.
    """
    heads = config.num_attention_heads
    if degree < 1 or heads % degree:
        fitting = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
        raise ValueError(
            f"sequence_parallel {degree} does not divide the model's {heads} attention heads; set "
            f"it to one of {fitting}."
        )


class SequenceParallel:
    """This rank's place in its sequence group. All ranks of a group call the same in order."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        """`group` holds the ranks that share rows, in the order of their tokens; None: only me."""
        self.group = group
        self.degree = 1 if group is None else dist.get_world_size(group)
        self.rank = 0 if group is None else dist.get_rank(group)

    @classmethod
    def of(cls, degree: int) -> "SequenceParallel":
        """This rank's place among all, in groups of `degree`. Collective over all ranks.

        Raises `ValueError` as `groups` does.
        """
        ranks = groups(dist.get_world_size(), degree)
        return cls(dist.new_subgroups_by_enumeration(ranks)[0] if degree > 1 else None)

    def share(self, batch: TokenBatch) -> TokenBatch:
        """My slice of a batch's tokens and targets, with the segments of the whole rows.

        Rows are padded to a multiple of P first, so [B, T/P], [B, T] and [B, T/P].
        """
        more = -batch.tokens_BT.shape[1] % self.degree
        return TokenBatch(
            self.mine(F.pad(batch.tokens_BT, (0, more))),
            F.pad(batch.segments_BT, (0, more)),
            self.mine(F.pad(batch.targets_BT, (0, more), value=IGNORE)),
        )

    def mine(self, x_BT: Tensor) -> Tensor:
        """My contiguous slice of what there is of every token: [B, T, ...] -> [B, T/P, ...]."""
        assert x_BT.shape[1] % self.degree == 0, "rows come padded from `share`"
        return x_BT.chunk(self.degree, dim=1)[self.rank]

    def heads(self, x_BTHK: Tensor) -> Tensor:
        """From my tokens to all tokens of my heads: [B, T/P, H, K] -> [B, T, H/P, K].

        Where P does not divide H, as with few key/value heads, each is repeated just often enough;
        the ratio to query heads stays whole where P divides those.
        """
        if self.degree == 1:
            return x_BTHK
        repeats = self.degree // gcd(x_BTHK.shape[2], self.degree)
        if repeats > 1:
            x_BTHK = x_BTHK.repeat_interleave(repeats, dim=2)
        parts = self._exchange(torch.stack(x_BTHK.chunk(self.degree, dim=2)))
        return parts.transpose(0, 1).flatten(1, 2)

    def tokens(self, x_BTHK: Tensor) -> Tensor:
        """The way back, from all tokens of my heads: [B, T, H/P, K] -> [B, T/P, H, K]."""
        if self.degree == 1:
            return x_BTHK
        parts = self._exchange(torch.stack(x_BTHK.chunk(self.degree, dim=1)))
        return parts.permute(1, 2, 0, 3, 4).flatten(2, 3)

    def gather(self, x_BT: Tensor) -> Tensor:
        """What all ranks hold of their tokens, on each: [B, T/P, ...] -> [B, T, ...].

        For a loss that needs whole rows, such as a score at the last token. All ranks then compute
        the same loss, so each must divide it by P: gradients of all of them come back.
        """
        if self.degree == 1:
            return x_BT
        parts = self._exchange(x_BT.expand(self.degree, *x_BT.shape))
        return parts.transpose(0, 1).flatten(1, 2)

    def _exchange(self, parts: Tensor) -> Tensor:
        return cast(Tensor, _Exchange.apply(parts, self.group))


class _Exchange(torch.autograd.Function):
    """parts[q] goes to rank q; the result's [p] is what rank p had for me. Its own adjoint."""

    @staticmethod
    def forward(ctx: Any, parts: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        received = torch.empty(parts.shape, dtype=parts.dtype, device=parts.device)
        dist.all_to_all_single(received, parts.contiguous(), group=group)
        return received

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return cast(Tensor, _Exchange.apply(gradients[0], ctx.group)), None
