"""The reference: the frozen policy that PPO started from."""

from pathlib import Path

import numpy as np
import ray
import torch

from actors.records import ReferenceLogprobs, Rollout
from llama2 import checkpoint
from llama2.batches import pack
from llama2.cpu.models import compiled

MAX_TOKENS = 16_384  # of activations held at a time


@ray.remote(max_restarts=-1, max_task_retries=3)
class Reference:
    """Stateless: a restarted worker reads the same folder and gives the same numbers."""

    def __init__(self, folder: Path, dtype: torch.dtype, threads: int) -> None:
        torch.set_num_threads(threads)
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model = checkpoint.load(folder, dtype=dtype, device=str(self._device)).eval()
        self._model = compiled(model)

    @torch.inference_mode()
    def score(self, rollout: Rollout) -> ReferenceLogprobs:
        """Log-probability of each response token given all before it, at temperature 1."""
        samples = rollout.samples
        found: dict[int, np.ndarray[tuple[int], np.dtype[np.float32]]] = {}
        for rows in by_length([len(sample.tokens) for sample in samples]):
            batch = pack([[samples[i].sequence] for i in rows]).to(self._device)
            logprobs_N = self._model(
                batch.tokens_BT, batch.segments_BT, targets_BT=batch.targets_BT
            )
            lengths = [len(samples[i].response) for i in rows]
            parts = logprobs_N.cpu().split(lengths)
            found.update({i: part.numpy() for i, part in zip(rows, parts, strict=True)})
        ids = tuple(sample.id for sample in samples)
        return ReferenceLogprobs(ids, tuple(found[i] for i in range(len(samples))))


def by_length(lengths: list[int], max_tokens: int = MAX_TOKENS) -> list[list[int]]:
    """Indices in batches of like length, each at most `max_tokens` when padded to its longest."""
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if batches and (len(batches[-1]) + 1) * lengths[index] <= max_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches
