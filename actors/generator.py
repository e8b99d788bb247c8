"""The generators: a Ray Serve deployment that answers prompts with the policy's newest weights."""

import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from ray import serve
from ray.serve.schema import LoggingConfig

from actors.records import Request, Rollout, Sample
from cluster import weights
from cluster.placement import Workers
from cluster.weights import Receipt, Version, WeightStore
from llama2 import checkpoint
from llama2.generation import Engine, Sampling

QUIET = LoggingConfig(log_level="WARNING", enable_access_log=False)
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@serve.deployment(max_ongoing_requests=1, health_check_period_s=2)
class Generator:
    """One replica: a model, an engine, and the version of the weights that it serves."""

    def __init__(
        self,
        folder: Path,
        store: "ray.actor.ActorHandle[WeightStore]",
        precision: str,
        threads: int,
    ) -> None:
        torch.set_num_threads(threads)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = checkpoint.load(folder, dtype=PRECISIONS[precision], device=device)
        self._engine = Engine(model.eval())
        self._store = store
        self._lock = threading.Lock()
        self._version = Version(-1, weights.checksum(model.state_dict().items()))
        if ray.get(store.latest.remote()):
            self.refresh()  # a replica that starts late must not serve the initial weights

    def refresh(self) -> Receipt:
        """Load the newest published weights; what is returned is summed up from the model
        itself."""
        (reference,) = ray.get(self._store.latest.remote())
        with self._lock:
            self._version = weights.load(self._engine.model, ray.get(reference))
            return Receipt(serve.get_replica_context().replica_id.unique_id, self._version)

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> Rollout:
        """Answer every request. Each sample carries the version of the weights that drew it."""
        started = time.perf_counter()
        with self._lock:
            completions = self._engine.generate(
                [request.prompt.tolist() for request in requests],
                sampling,
                seeds=[request.seed for request in requests],
            )
            version = self._version
        samples = tuple(
            Sample(
                id=request.id,
                prompt=request.prompt,
                response=np.array(completion.tokens, dtype=np.int64),
                logprobs=np.array(completion.logprobs, dtype=np.float32),
                version=version,
                finished=completion.finish_reason == "stop",
            )
            for request, completion in zip(requests, completions, strict=True)
        )
        return Rollout(samples, time.perf_counter() - started)


def deploy(
    name: str,
    folder: Path,
    store: "ray.actor.ActorHandle[WeightStore]",
    precision: str,
    workers: Workers,
) -> Any:
    """Start the replicas as the application `name` and return their handle.

    `serve.delete(name)` ends them, and leaves alone what others serve on the same cluster.
    """
    serve.start(proxy_location="Disabled", logging_config=QUIET)
    deployment = Generator.options(  # type: ignore[attr-defined]
        num_replicas=workers.count,
        ray_actor_options=workers.actor_options(),
        logging_config=QUIET,
    )
    return serve.run(
        deployment.bind(folder, store, precision, workers.threads),
        name=name,
        route_prefix=None,
    )
