"""The policy in a learner's worker: log-probabilities of what was sampled, and PPO's update."""

from dataclasses import dataclass

import torch
from torch import Tensor

from actors.experience import ExperienceBatch
from cluster.engine import Engine
from llama2.losses import policy_loss
from llama2.model import Transformer


@dataclass(frozen=True)
class PolicyLoss:
    """The loss of a micro-batch and sums over its tokens, for the log."""

    loss: Tensor
    clipped: float
    approximate_kl: float


class Policy:
    """A ZeRO-sharded `Transformer` under PPO's clipped objective."""

    def __init__(self, engine: Engine, clip_range: float) -> None:
        assert isinstance(engine.module, Transformer)
        self.engine, self.clip_range = engine, clip_range

    @torch.no_grad()
    def logprobs(self, batch: ExperienceBatch) -> Tensor:
        """Log-probability of each answer token, [B, T], 0 elsewhere."""
        return batch.spread(self._logprobs(batch))

    def _logprobs(self, batch: ExperienceBatch) -> Tensor:
        logprobs_N: Tensor = self.engine(
            batch.tokens_BT, batch.segments_BT, targets_BT=batch.targets_BT
        )
        return logprobs_N

    def loss(self, batch: ExperienceBatch, total: int) -> PolicyLoss:
        """This micro-batch's part of the loss of a minibatch with `total` answer tokens."""
        logprobs_N = self._logprobs(batch)
        old_N, advantages_N = (
            batch.old_logprobs_BT[batch.mask_BT],
            batch.advantages_BT[batch.mask_BT],
        )
        loss = policy_loss(logprobs_N, old_N, advantages_N, self.clip_range, total)
        change_N = logprobs_N.detach() - old_N
        return PolicyLoss(
            loss=loss,
            clipped=float(((change_N.exp() - 1).abs() > self.clip_range).sum()),
            approximate_kl=float((torch.expm1(change_N) - change_N).sum()),
        )
