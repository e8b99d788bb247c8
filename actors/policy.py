"""The policy in a learner's worker: log-probabilities of what was sampled, and PPO's update."""

from dataclasses import dataclass

import torch
from torch import Tensor

from actors.experience import ExperienceBatch
from cluster.engine import Engine
from llama2.batches import TokenBatch
from llama2.entropy import EntropyUnembedding
from llama2.kl import ESTIMATORS, Estimator
from llama2.losses import policy_loss
from llama2.model import Transformer


@dataclass(frozen=True)
class PolicyLoss:
    """The loss of a micro-batch and sums over its tokens, for the log."""

    loss: Tensor
    clipped: float
    approximate_kl: float
    entropy: float | None
    """None where it was not computed."""


class Policy:
    """A ZeRO-sharded `Transformer` under PPO's clipped objective."""

    def __init__(self, engine: Engine, clip_range: float, entropy_coefficient: float = 0.0) -> None:
        """An `entropy_coefficient` needs a model whose head is an `EntropyUnembedding`."""
        assert isinstance(engine.module, Transformer)
        self._tells_entropy = isinstance(engine.module.lm_head, EntropyUnembedding)
        assert self._tells_entropy or not entropy_coefficient
        self.engine, self.clip_range = engine, clip_range
        self.entropy_coefficient = entropy_coefficient

    @torch.no_grad()
    def logprobs(self, batch: ExperienceBatch) -> Tensor:
        """Log-probability of each answer token, [B, T], 0 elsewhere."""
        return batch.spread(self.log_probabilities(batch)[0])

    def log_probabilities(
        self, batch: ExperienceBatch | TokenBatch
    ) -> tuple[Tensor, Tensor | None]:
        """Log-probability of each target [N], and the entropy there [N] where the model tells
        it."""
        found: Tensor = self.engine(batch.tokens_BT, batch.segments_BT, targets_BT=batch.targets_BT)
        return (found[0], found[1]) if self._tells_entropy else (found, None)

    def loss(
        self,
        batch: ExperienceBatch,
        total: int,
        kl_coefficient: float = 0.0,
        estimator: Estimator = "k3",
    ) -> PolicyLoss:
        """This micro-batch's part of the loss of a minibatch with `total` answer tokens.

        kl_coefficient: weight of the KL from the initial policy in the loss.
        """
        mask_BT = batch.mask_BT
        logprobs_N, entropies_N = self.log_probabilities(batch)
        old_N, advantages_N = batch.old_logprobs_BT[mask_BT], batch.advantages_BT[mask_BT]
        loss = policy_loss(logprobs_N, old_N, advantages_N, self.clip_range, total)
        if kl_coefficient:
            divergence_N = ESTIMATORS[estimator](logprobs_N, batch.reference_logprobs_BT[mask_BT])
            loss = loss + kl_coefficient * divergence_N.sum() / total
        entropy = None
        if entropies_N is not None:
            loss = loss - self.entropy_coefficient * entropies_N.sum() / total
            entropy = float(entropies_N.detach().sum())
        change_N = logprobs_N.detach() - old_N
        return PolicyLoss(
            loss=loss,
            clipped=float(((change_N.exp() - 1).abs() > self.clip_range).sum()),
            approximate_kl=float((torch.expm1(change_N) - change_N).sum()),
            entropy=entropy,
        )
