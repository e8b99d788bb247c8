"""The held-out report on a reward model, made by the workers that train it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed

from actors.objectives import Ranking
from actors.steps import MicroBatches
from cluster import training
from cluster.engine import Engine
from cluster.run_directory import RunDirectory, write_atomically
from llama2.encoding import RATINGS, SAFETY_LABELS
from llama2.mixing import drawn
from llama2.preference_mix import Aspect, data_sets
from llama2.reward_evaluation import ScoredPair, Table, headline, report
from llama2.sequence_parallel import SequenceParallel
from llama2.shards import Shards


@dataclass(frozen=True)
class RewardReport:
    """Tables as `llama2.reward_evaluation.report` makes them, and the figures to compare runs
    by."""

    headline: dict[str, float]
    tables: dict[str, Table]

    @staticmethod
    def of(
        engine: Engine, folders: Mapping[Aspect, Path], layout: MicroBatches, most: int
    ) -> "RewardReport":
        """On at most `most` pairs, drawn uniformly, of each of these prepared folders; the same on
        all workers (collective).

        Raises `ValueError` where a score is not finite.
        """
        pairs = []
        for aspect, folder in folders.items():
            shards = Shards(folder)
            rows = drawn([len(shards)], most, seed=0)[0]
            pairs += scored_pairs(engine, aspect, shards, rows, layout)
        tables = report(pairs)
        return RewardReport(headline(tables), tables)

    def write(self, run: RunDirectory) -> None:
        """Into the run, as `report.json`."""
        text = json.dumps({"headline": self.headline, **self.tables}, indent=1)
        write_atomically(run.path / "report.json", text + "\n")


@torch.no_grad()
def scored_pairs(
    engine: Engine, aspect: Aspect, shards: Shards, rows: Sequence[int], layout: MicroBatches
) -> list[ScoredPair]:
    """Rows of prepared comparisons with their scores, in order (collective)."""
    sequence = SequenceParallel.of(layout.sequence_parallel)
    objective = Ranking(shards, sequence, margin="none")
    mine: dict[int, tuple[float, float]] = {}
    engine.module.eval()
    for micro in layout.of(objective, rows):
        # A worker without rows keeps step with the others, as sharded weights ask for it.
        chosen_N, rejected_N = objective.scores(engine, micro or rows[:1])
        scores = zip(chosen_N.tolist(), rejected_N.tolist(), strict=True)
        mine |= dict(zip(micro, scores, strict=False))
    engine.module.train()
    found: list[dict[int, tuple[float, float]]] = [{} for _ in range(training.world_size())]
    torch.distributed.all_gather_object(found, mine)
    by_row = {row: scores for part in found for row, scores in part.items()}
    names = [one.name for one in data_sets(aspect, shards) for _ in one.rows]
    return [_scored(names[row], shards, row, *by_row[row]) for row in rows]


def _scored(name: str, shards: Shards, row: int, chosen: float, rejected: float) -> ScoredPair:
    rating, safety = shards.rating(row), shards.safety(row)
    lengths = [int(np.count_nonzero(sequence.is_target)) for sequence in shards.row(row)]
    return ScoredPair(
        data=name,
        chosen=chosen,
        rejected=rejected,
        rating=RATINGS[rating] if rating >= 0 else None,
        safety=SAFETY_LABELS[safety] if safety >= 0 else None,
        chosen_tokens=lengths[0],
        rejected_tokens=lengths[1],
    )
