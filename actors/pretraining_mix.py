"""The pretraining loss beside PPO's (PPO-ptx of InstructGPT, Ouyang et al. 2022, equation 2).

- coefficient E[log pi(token | tokens before it)] over rows of prepared pretraining data
"""

from pathlib import Path

from actors.policy import Policy
from cluster import training
from llama2.batches import pack
from llama2.losses import next_token_loss
from llama2.packing import deal, sample_order
from llama2.shards import Shards


class PretrainingMix:
    """Rows of pretraining data for each update of the policy: a function of seed and update."""

    def __init__(
        self, folder: Path, rows: int, coefficient: float, seed: int, micro_batch_size: int
    ) -> None:
        """rows: of each update, over all workers. micro_batch_size: longest rows whose activations
        a worker holds at a time."""
        self.shards = Shards(folder)
        self.rows, self.coefficient, self.seed = rows, coefficient, seed
        self._tokens = micro_batch_size * self.shards.manifest.context

    def backward(self, policy: Policy) -> float:
        """Add the gradient of the next update's rows. Returns this worker's part of the mean loss
        per token, before the coefficient (collective)."""
        rows = sample_order(policy.engine.updates, self.rows, len(self.shards), self.seed)
        lengths, total = self.shards.lengths(rows), self.shards.targets(rows)
        summed = 0.0
        for micro in deal(lengths, training.world_size(), self._tokens)[training.rank()]:
            # Workers keep step: one with fewer rows computes its share of passes in vain.
            picked = [rows[i] for i in micro] or [rows[lengths.index(min(lengths))]]
            batch = pack([self.shards.row(row) for row in picked]).to(policy.engine.device)
            logprobs_N, _ = policy.log_probabilities(batch)
            loss = next_token_loss(logprobs_N, total) * float(bool(micro))
            policy.engine.backward(self.coefficient * loss)
            summed += float(loss.detach())
        return summed
