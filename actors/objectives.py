"""What is minimised: next-token prediction and the ranking of answers.

Losses and measures are sums, of which a worker computes its part: its rows', or, of rows that it
shares with others, its tokens'. Shapes: B rows, T tokens, N targets or pairs.
"""

from collections.abc import Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor

from cluster.engine import Engine
from llama2.batches import TokenBatch, pack, pad_right
from llama2.losses import IGNORE, next_token_loss, ranking_loss
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
    """Binary ranking loss with a margin by rating, the score read at the last token (paper,
    3.2.2)."""

    def __init__(self, shards: Shards, sequence: SequenceParallel, margin: Margin) -> None:
        self.shards, self.sequence = shards, sequence
        self.margins = MARGINS[margin]

    def lengths(self, rows: Sequence[int]) -> list[int]:
        return [2 * length for length in self.shards.lengths(rows)]

    def total(self, rows: Sequence[int]) -> int:
        return len(rows)

    def loss(self, engine: Engine, rows: Sequence[int], total: int) -> Tensor:
        chosen_N, rejected_N = self._scores(engine, rows)
        loss = ranking_loss(chosen_N, rejected_N, self._margins(rows).to(chosen_N), total)
        return loss / self.sequence.degree  # workers that share rows all compute the same

    def measure(self, engine: Engine, rows: Sequence[int]) -> dict[str, float]:
        chosen_N, rejected_N = self._scores(engine, rows)
        margin_N = self._margins(rows).to(chosen_N)
        right = (chosen_N > rejected_N).float() + 0.5 * (chosen_N == rejected_N).float()
        sums = {
            "loss": float(ranking_loss(chosen_N, rejected_N, margin_N, 1)),
            "accuracy": float(right.sum()),
            "score_gap": float((chosen_N - rejected_N).sum()),
            "count": float(len(rows)),
        }
        return {name: value / self.sequence.degree for name, value in sums.items()}

    def _margins(self, rows: Sequence[int]) -> Tensor:
        return torch.tensor([self.margins[max(0, self.shards.rating(i))] for i in rows])

    def _scores(self, engine: Engine, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        pairs = [self.shards.row(i) for i in rows]
        tokens_BT, segments_BT, last_B = pad_right([s.tokens for pair in pairs for s in pair])
        whole = TokenBatch(tokens_BT, segments_BT, torch.full_like(tokens_BT, IGNORE))
        batch = self.sequence.share(whole).to(engine.device)
        scores_BT = self.sequence.gather(engine(batch.tokens_BT, batch.segments_BT))
        scores_B = scores_BT.gather(1, last_B.to(engine.device)[:, None])[:, 0]
        return scores_B[0::2], scores_B[1::2]
