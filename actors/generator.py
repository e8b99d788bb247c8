"""The generators: a Ray Serve deployment that answers prompts with the policy's newest weights."""

import importlib.util
import time
from collections.abc import AsyncGenerator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, RequestRouterConfig
from ray.serve.schema import LoggingConfig

from actors.backend import Backend, OwnBackend
from actors.engine_loop import EngineFailed, EngineLoop
from actors.generator_config import GeneratorConfig
from actors.records import Piece, Request, Rollout
from actors.replica_load import UNFINISHED, FewestExpectedTokens, ReplicasForRequests
from cluster import loading
from cluster.weights import Receipt, Version, WeightStore
from llama2.generation import Sampling

QUIET = LoggingConfig(log_level="WARNING", enable_access_log=False)
# Callers are told of every error; of each refused prompt, Serve would show a traceback besides.
SILENT = LoggingConfig(log_level="CRITICAL", enable_access_log=False)
FROM_FOLDER = Version(-1, "")
"""The version of weights that were never published."""
DRAIN_SECONDS = 120.0
"""How long a replica that is stopped may go on answering what it has taken."""


class Generator:
    """One replica: an engine, and the version of the weights that it serves.

    A call that fails with `EngineFailed` or is lost with its replica can be made again: a request's
    answer follows from the request and the weights.
    """

    def __init__(
        self,
        folder: Path,
        store: "ray.actor.ActorHandle[WeightStore] | None",
        precision: str,
        config: GeneratorConfig,
    ) -> None:
        self._store = store
        # Where a process has more OpenMP threads than CPUs, GNU's OpenMP lets them sleep after each
        # operation, and the engine's thread would take half as long again. A thread that ends takes
        # its own along.
        with ThreadPoolExecutor(1) as apart:
            backend, version = apart.submit(prepare, folder, store, precision, config).result()
        self._engine = EngineLoop(backend, version, config.stuck_after)

    async def generate(
        self, requests: Sequence[Request], sampling: Sampling, wanted: Version | None = None
    ) -> Rollout:
        """Answer every request. Each sample carries the version of the weights that drew it.

        wanted: the weights that the caller means; a replica with others loads the newest first,
        which may still be others. Raises `ValueError` for a prompt that cannot be answered.
        """
        started = time.perf_counter()
        await self._catch_up(wanted)
        samples = await self._engine.answer(requests, sampling)
        return Rollout(tuple(samples), time.perf_counter() - started)

    async def stream(self, request: Request, sampling: Sampling) -> AsyncGenerator[Piece, None]:
        """The answer to a request as it is written. Raises as `generate` does."""
        pieces = self._engine.stream(request, sampling)
        try:
            async for piece in pieces:
                yield piece
        finally:
            await pieces.aclose()

    async def refresh(self) -> Receipt:
        """Load the newest published weights, once what is being answered has been; what is returned
        is summed up from the model itself."""
        assert self._store is not None, "nothing is published to this deployment"
        store = self._store
        version = await self._engine.load(lambda: loading.fetch(store))
        return Receipt(serve.get_replica_context().replica_id.unique_id, version)

    async def _catch_up(self, wanted: Version | None) -> None:
        """A replica that started while weights were published has missed them."""
        if wanted is None or wanted == self._engine.version or self._store is None:
            return
        store = self._store
        await self._engine.load(lambda: loading.fetch(store, unless=self._engine.version))

    def check_health(self) -> None:
        """Serve asks this every few seconds, and replaces a replica that raises three times."""
        try:
            self._engine.check()
        except EngineFailed as error:
            raise RuntimeError(str(error)) from None  # Serve's controller knows no class of ours

    def record_autoscaling_stats(self) -> dict[str, float]:
        """What the number of replicas follows from."""
        return {UNFINISHED: float(self._engine.unfinished)}


def prepare(
    folder: Path,
    store: "ray.actor.ActorHandle[WeightStore] | None",
    precision: str,
    config: GeneratorConfig,
) -> tuple[Backend, Version]:
    """An engine with the newest weights. Raises as `make_backend` does."""
    backend = make_backend(folder, config, precision)
    # A replica that starts late, or again, must not serve the initial weights.
    newest = None if store is None else loading.fetch(store)
    return backend, FROM_FOLDER if newest is None else backend.load(newest)


def make_backend(folder: Path, config: GeneratorConfig, precision: str) -> Backend:
    """The engine that the config names, with the folder's model. Raises `ValueError` for a folder
    or a setting that it cannot take."""
    if config.backend == "own":
        return OwnBackend(folder, config, precision)
    from actors.vllm_backend import VllmBackend  # an extra that need not be installed

    return VllmBackend(folder, config, precision)


def check_backend(config: GeneratorConfig) -> None:
    """Raise `ValueError` where the engine that the config names is not installed."""
    if config.backend == "vllm" and importlib.util.find_spec("vllm") is None:
        raise ValueError(
            "The generator's backend is vllm, which is not installed here; install this project "
            "with its extra vllm, or choose --generator.backend own."
        )


def deploy(
    name: str,
    folder: Path,
    store: "ray.actor.ActorHandle[WeightStore] | None",
    precision: str,
    config: GeneratorConfig,
) -> Any:
    """Start the replicas as the application `name` and return their Serve handle.

    store: where weights are published; without one the replicas serve the folder's. The handle's
    methods are `generate`, `stream` (of a handle with `stream=True`) and `refresh`. A call that
    finds `config.max_queued_requests` others waiting raises Ray Serve's `BackPressureError`.
    `serve.delete(name)` ends the replicas, once they have answered what they have, and leaves alone
    what others serve on the same cluster. Raises as `check_backend` does.
    """
    check_backend(config)
    serve.start(proxy_location="Disabled", logging_config=QUIET)
    return serve.run(
        deployment(config).bind(folder, store, precision, config), name=name, route_prefix=None
    )


def deployment(config: GeneratorConfig) -> serve.Deployment:
    """The generators as a Serve deployment, for an application of one's own.

    Its arguments to `bind` are those of `Generator`.
    """
    scale: dict[str, Any] = {"num_replicas": config.count}
    if config.most > config.count:
        policy = AutoscalingPolicy(
            policy_function=f"{ReplicasForRequests.__module__}:{ReplicasForRequests.__name__}",
            policy_kwargs={"batch": config.max_batch_size},
        )
        scale = {
            "autoscaling_config": AutoscalingConfig(
                min_replicas=config.count, max_replicas=config.most, policy=policy
            )
        }
    return serve.deployment(
        Generator,
        name="Generator",
        ray_actor_options=config.actor_options(),
        # Calls of one request each can fill a batch; while it computes, the next one gathers.
        max_ongoing_requests=2 * config.max_batch_size,
        max_queued_requests=config.max_queued_requests,
        request_router_config=RequestRouterConfig(request_router_class=FewestExpectedTokens),
        health_check_period_s=1,
        graceful_shutdown_timeout_s=DRAIN_SECONDS,
        graceful_shutdown_wait_loop_s=0.1,
        logging_config=SILENT,
        **scale,
    )
