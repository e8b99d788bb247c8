"""The reference: the frozen policy that PPO started from."""

from pathlib import Path

import ray
import torch

from actors.records import ReferenceLogprobs, Rollout
from llama2 import checkpoint
from llama2.cpu.head import with_compiled_head
from llama2.scoring import target_logprobs


@ray.remote(max_restarts=-1, max_task_retries=3)
class Reference:
    """Stateless: a restarted worker reads the same folder and gives the same numbers."""

    def __init__(self, folder: Path, dtype: torch.dtype, threads: int) -> None:
        torch.set_num_threads(threads)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = checkpoint.load(folder, dtype=dtype, device=device).eval()
        self._model = with_compiled_head(model)

    def score(self, rollout: Rollout) -> ReferenceLogprobs:
        """Log-probability of each response token given all before it, at temperature 1."""
        found = target_logprobs(self._model, [sample.sequence for sample in rollout.samples])
        return ReferenceLogprobs(tuple(sample.id for sample in rollout.samples), tuple(found))
