"""The reward workers: one reads helpfulness, another safety."""

from pathlib import Path

import ray
import torch

from actors.records import Rollout, Scores
from actors.reference import by_length
from llama2 import checkpoint
from llama2.batches import pad_right


@ray.remote(max_restarts=-1, max_task_retries=3)
class Reward:
    """Stateless: a restarted worker reads the same folder and gives the same scores."""

    def __init__(self, folder: Path, dtype: torch.dtype, threads: int) -> None:
        torch.set_num_threads(threads)
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._model = checkpoint.load_scalar(folder, dtype=dtype, device=str(self._device)).eval()

    @torch.inference_mode()
    def score(self, rollout: Rollout) -> Scores:
        """The score read at the last token of each answer, before the sigmoid."""
        samples = rollout.samples
        tokens = [sample.tokens for sample in samples]
        scores = [0.0] * len(samples)
        for rows in by_length([len(sequence) for sequence in tokens]):
            tokens_BT, segments_BT, last_B = pad_right([tokens[i] for i in rows])
            scores_BT = self._model(tokens_BT.to(self._device), segments_BT.to(self._device))
            picked = scores_BT.cpu().gather(1, last_B[:, None])[:, 0]
            for i, score in zip(rows, picked.tolist(), strict=True):
                scores[i] = score
        return Scores(
            ids=tuple(sample.id for sample in samples),
            scores=tuple(scores),
            lengths=tuple(len(sequence) for sequence in tokens),
            written=tuple(len(sample.response) for sample in samples),
            versions=tuple(sample.version for sample in samples),
            finished=tuple(sample.finished for sample in samples),
            generation_seconds=rollout.seconds,
        )
