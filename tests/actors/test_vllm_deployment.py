"""vLLM with other models and precisions, several workers, and as a replica on Serve; in the
environment of `make vllm-test`."""

import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from ray import serve

from actors.backend import PRECISIONS
from actors.generator import deploy
from actors.records import Request
from actors.vllm_backend import VllmBackend
from cluster import publishing
from cluster.session import WORKER_ENVIRONMENT
from cluster.weights import Version, WeightStore
from llama2 import checkpoint
from llama2.config import ModelConfig
from llama2.generation import Engine
from tests.actors.small_vllm import (
    CONFIG,
    GENERATOR,
    GREEDY,
    PROMPTS,
    answers,
    forward_logprobs,
    published,
    random_model,
)

pytestmark = pytest.mark.vllm
if find_spec("vllm") is None:
    pytest.skip("vLLM is not installed here: make vllm-test", allow_module_level=True)

VARIANTS = {
    "tied": replace(CONFIG, tie_word_embeddings=True),
    "biases": replace(CONFIG, attention_bias=True, mlp_bias=True),
    "bfloat16": CONFIG,
}


@pytest.mark.parametrize("name", VARIANTS)
def test_other_models_and_precisions(name: str, tmp_path: Path) -> None:
    precision = "bfloat16" if name == "bfloat16" else "float32"
    check(VARIANTS[name], precision, 1, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("heads", [2, 1])
def test_two_workers(heads: int, tmp_path: Path) -> None:
    """With one key/value head both have a copy of it; with two, one each.

    In a process of its own, since vLLM reads its environment once.
    """
    config = replace(CONFIG, num_key_value_heads=heads, attention_bias=True)
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        pool.submit(check, config, "float32", 2, tmp_path).result()


def check(config: ModelConfig, precision: str, workers: int, folder: Path) -> None:
    """Checksums, log-probabilities and greedy tokens, before and after new weights."""
    models = [random_model(seed, config).to(PRECISIONS[precision]) for seed in (2, 3)]
    checkpoint.save(models[0], folder)
    backend = VllmBackend(folder, replace(GENERATOR, tensor_parallel=workers), precision)
    for number, model in enumerate(models):
        if number:
            snapshot = published(model, number)
            assert backend.load(snapshot) == snapshot.version
        tolerance = 0.15 if precision == "bfloat16" else 1e-4
        found = answers(backend, PROMPTS, GREEDY)
        for prompt, completion in zip(PROMPTS, found, strict=True):
            expected = forward_logprobs(model.float(), prompt, completion.tokens)
            assert completion.logprobs == pytest.approx(expected, abs=tolerance)
        if precision == "float32":
            for completion, ours in zip(
                found, Engine(model).generate(PROMPTS, GREEDY), strict=True
            ):
                assert completion.tokens == ours.tokens


def test_models_that_vllm_cannot_take(tmp_path: Path) -> None:
    config = replace(CONFIG, head_dim=16)
    checkpoint.save(random_model(0, config), tmp_path)
    with pytest.raises(ValueError, match="no attention for heads 16 wide on a CPU"):
        VllmBackend(tmp_path, GENERATOR, "float32")
    with pytest.raises(ValueError, match="tensor_parallel 3 does not divide the model's 4"):
        VllmBackend(tmp_path, replace(GENERATOR, tensor_parallel=3), "float32")


@ray.remote(num_cpus=0, max_concurrency=2)
class Learner:
    """Publishes random weights."""

    def publish(self, store: Any, number: int) -> Version:
        named = [list(random_model(number).named_parameters())]
        return publishing.put(named, number, publishing.enter(store, 30), store, 30)


def test_a_replica_on_serve(tmp_path: Path) -> None:
    """It starts with the newest weights, loads those that are published later, and streams."""
    checkpoint.save(random_model(0), tmp_path)
    root = str(Path(__file__).resolve().parents[2])
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        _temp_dir=tempfile.mkdtemp(prefix="r-", dir="/tmp"),
        runtime_env={"env_vars": WORKER_ENVIRONMENT | {"PYTHONPATH": root}},
    )
    try:
        store, learner = WeightStore.remote(), Learner.remote()  # type: ignore[attr-defined]
        versions = [ray.get(learner.publish.remote(store, 1))]
        handle = deploy("vllm", tmp_path, store, "float32", replace(GENERATOR, cpus=0.5))
        requests = [Request(f"r-{i}", np.array(p), i) for i, p in enumerate(PROMPTS)]
        for number in (1, 2):
            if number == 2:
                versions.append(ray.get(learner.publish.remote(store, 2)))
                assert handle.refresh.remote().result(timeout_s=120).version == versions[1]
            rollout = handle.generate.remote(requests, GREEDY).result(timeout_s=120)
            expected = Engine(random_model(number)).generate(PROMPTS, GREEDY)
            for sample, ours in zip(rollout.samples, expected, strict=True):
                assert sample.response.tolist() == ours.tokens
                assert sample.logprobs.tolist() == pytest.approx(ours.logprobs, abs=1e-4)
                assert sample.version == versions[-1]
        streaming = handle.options(stream=True)
        abandoned = streaming.stream.remote(replace(requests[1], id="s"), GREEDY)
        next(iter(abandoned))
        abandoned.cancel()
        pieces = list(streaming.stream.remote(replace(requests[0], id="t"), GREEDY))
        assert [token for piece in pieces for token in piece.tokens] == expected[0].tokens
        assert pieces[-1].finish_reason == "length"
    finally:
        serve.shutdown()
        ray.shutdown()
