"""The value model (critic) in a learner's worker, started from the helpfulness reward model."""

import torch
from torch import Tensor

from actors.experience import ExperienceBatch
from cluster.engine import Engine
from llama2.losses import value_loss
from llama2.model import ScalarModel


class Value:
    """A ZeRO-sharded `ScalarModel`: what is still to come, seen from before each answer token."""

    def __init__(self, engine: Engine, clip_range: float | None) -> None:
        assert isinstance(engine.module, ScalarModel)
        self.engine, self.clip_range = engine, clip_range

    @torch.no_grad()
    def values(self, batch: ExperienceBatch) -> Tensor:
        """Value of the state before each answer token, [B, T], 0 elsewhere."""
        values_BT: Tensor = self.engine(batch.tokens_BT, batch.segments_BT, batch.mask_BT)
        return values_BT

    def loss(self, batch: ExperienceBatch, total: int) -> Tensor:
        """This micro-batch's part of the loss of a minibatch with `total` answer tokens."""
        mask_BT = batch.mask_BT
        values_N = self.engine(batch.tokens_BT, batch.segments_BT, mask_BT)[mask_BT]
        old_N, returns_N = batch.values_BT[mask_BT], batch.returns_BT[mask_BT]
        return value_loss(values_N, old_N, returns_N, self.clip_range, total)
