"""What is minimised: next-token prediction and the ranking of answers.

Losses and measures are sums, of which a worker computes its part: its rows', or, of rows that it
shares with others, its tokens'. Shapes: B rows, T tokens, N targets or pairs.
"""

from collections.abc import Sequence
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from cluster.engine import Engine
from llama2.batches import TokenBatch, pack, pad_right
from llama2.encoding import SAFETY_LABELS
from llama2.losses import IGNORE, next_token_loss, ranking_loss, safety_loss
from llama2.records import SAFE_ANSWERS
from llama2.sequence_parallel import SequenceParallel
from llama2.shards import Shards

Margin = Literal["none", "small", "large"]
MARGINS: dict[Margin, tuple[float, float, float, float]] = {
    "none": (0.0, 0.0, 0.0, 0.0),
    "small": (0.0, 1 / 3, 2 / 3, 1.0),
    "large": (0.0, 1.0, 2.0, 3.0),
}
"""Margin of the ranking loss by rating, negligibly to significantly better (paper, table 27)."""


class Objective(Protocol):
    """What is minimised over rows of prepared data."""

    shards: Shards

    def lengths(self, rows: Sequence[int]) -> list[int]:
        """Tokens that each row takes in a batch as long as itself."""
        ...

    def total(self, rows: Sequence[int]) -> int:
        """Terms of the loss in a global batch: what its sum is divided by."""
        ...

    def loss(self, engine: Engine, rows: Sequence[int], total: int) -> Tensor:
        """This worker's part, by these rows, of the loss of a batch with `total` terms."""
        ...

    def measure(self, engine: Engine, rows: Sequence[int]) -> dict[str, float]:
        """Sums over rows, to be added up over micro-batches and workers; "count" among them."""
        ...


class LanguageModelling:
    """Cross-entropy on target tokens: all of them in pretraining, answers only in SFT."""

    def __init__(self, shards: Shards, sequence: SequenceParallel) -> None:
        self.shards, self.sequence = shards, sequence

    def lengths(self, rows: Sequence[int]) -> list[int]:
        return self.shards.lengths(rows)

    def total(self, rows: Sequence[int]) -> int:
        return self.shards.targets(rows)

    def loss(self, engine: Engine, rows: Sequence[int], total: int) -> Tensor:
        whole = pack([self.shards.row(i) for i in rows])
        batch = self.sequence.share(whole).to(engine.device)
        logprobs_N = engine(batch.tokens_BT, batch.segments_BT, targets_BT=batch.targets_BT)
        return next_token_loss(logprobs_N, total)

    def measure(self, engine: Engine, rows: Sequence[int]) -> dict[str, float]:
        return {
            "loss": float(self.loss(engine, rows, 1)),
            "count": self.shards.targets(rows) / self.sequence.degree,
        }


class Ranking:
    """Binary ranking loss with a margin by rating, the score read at the last token, and beside it
    the auxiliary safety loss on answers with a label (paper, 3.2.2).

    The loss of a pair is its ranking loss, plus `safety_weight` times the mean of its two answers'
    safety losses; a pair without a label has no such part.
    """

    def __init__(
        self,
        shards: Shards,
        sequence: SequenceParallel,
        margin: Margin,
        safety_weight: float = 0.0,
    ) -> None:
        self.shards, self.sequence = shards, sequence
        self.margins, self.safety_weight = MARGINS[margin], safety_weight

    def lengths(self, rows: Sequence[int]) -> list[int]:
        return [2 * length for length in self.shards.lengths(rows)]

    def total(self, rows: Sequence[int]) -> int:
        return len(rows)

    def loss(self, engine: Engine, rows: Sequence[int], total: int) -> Tensor:
        chosen_N, rejected_N = self.scores(engine, rows)
        loss = self._loss(chosen_N, rejected_N, rows, total)
        return loss / self.sequence.degree  # workers that share rows all compute the same

    def measure(self, engine: Engine, rows: Sequence[int]) -> dict[str, float]:
        chosen_N, rejected_N = self.scores(engine, rows)
        right_N = (chosen_N > rejected_N).float() + 0.5 * (chosen_N == rejected_N).float()
        sums = {
            "loss": float(self._loss(chosen_N, rejected_N, rows, 1)),
            "accuracy": float(right_N.sum()),
            "score_gap": float((chosen_N - rejected_N).sum()),
            "count": float(len(rows)),
        }
        return {name: value / self.sequence.degree for name, value in sums.items()}

    def scores(self, engine: Engine, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Scores [N] of the chosen and the rejected answers, before the sigmoid."""
        pairs = [self.shards.row(i) for i in rows]
        tokens_BT, segments_BT, is_last_BT = pad_right([s.tokens for pair in pairs for s in pair])
        whole = TokenBatch(tokens_BT, segments_BT, torch.full_like(tokens_BT, IGNORE))
        batch = self.sequence.share(whole).to(engine.device)
        more = batch.segments_BT.shape[1] - is_last_BT.shape[1]
        is_last_BT = F.pad(is_last_BT, (0, more)).to(engine.device)
        mine_BT = engine(batch.tokens_BT, batch.segments_BT, self.sequence.mine(is_last_BT))
        scores_B = self.sequence.gather(mine_BT)[is_last_BT]
        return scores_B[0::2], scores_B[1::2]

    def _loss(
        self, chosen_N: Tensor, rejected_N: Tensor, rows: Sequence[int], total: int
    ) -> Tensor:
        margins = [self.margins[max(0, self.shards.rating(i))] for i in rows]
        margin_N = torch.tensor(margins).to(chosen_N)
        loss = ranking_loss(chosen_N, rejected_N, margin_N, total)
        if self.safety_weight:
            labelled = self._labelled(chosen_N, rejected_N, rows)
            loss = loss + self.safety_weight / 2 * safety_loss(*labelled, total)
        return loss

    def _labelled(
        self, chosen_N: Tensor, rejected_N: Tensor, rows: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """Scores of the answers with a safety label, and whether each is safe."""
        labels = [(place, self.shards.safety(i)) for place, i in enumerate(rows)]
        known = [(place, label) for place, label in labels if label >= 0]
        places = torch.tensor([place for place, _ in known], dtype=torch.long).to(chosen_N.device)
        safe = [SAFE_ANSWERS[SAFETY_LABELS[label]] for _, label in known]
        is_safe_2N = torch.tensor(safe, dtype=torch.bool).reshape(-1, 2).T.to(chosen_N.device)
        return torch.cat((chosen_N[places], rejected_N[places])), is_safe_2N.reshape(-1)
