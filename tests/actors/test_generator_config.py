"""What a generator is asked for: settings, memory, backend, and how many replicas."""

import asyncio
import gc
import importlib.util
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from actors.backend import cache_tokens
from actors.generator import check_backend
from actors.generator_config import GeneratorConfig
from actors.replica_load import UNFINISHED, FewestExpectedTokens, ReplicasForRequests
from llama2.config import ModelConfig


def test_as_many_replicas_as_requests_fill_batches() -> None:
    policy = ReplicasForRequests(batch=8)

    def wanted(queued: int, *unfinished: float) -> int:
        metrics = {UNFINISHED: dict(enumerate(unfinished))} if unfinished else {}
        context = SimpleNamespace(aggregated_metrics=metrics, total_queued_requests=queued)
        return policy(context)[0]

    assert [wanted(0), wanted(0, 8.0), wanted(1, 8.0), wanted(0, 9.5, 7.0)] == [1, 1, 2, 3]


@dataclass
class Call:
    """What Serve tells a router of a call."""

    metadata: SimpleNamespace
    args: list[Any]
    kwargs: dict[str, Any]


def test_charges_end_with_their_calls() -> None:
    """Whether a replica took the call, another did, or it was given up before any did."""
    router = FewestExpectedTokens.__new__(FewestExpectedTokens)
    router.initialize_state()
    first, second = (SimpleNamespace(replica_id=name) for name in ("first", "second"))

    def call(name: str, tokens: int) -> Any:
        asked = [SimpleNamespace(prompt=[1] * tokens)]
        return Call(SimpleNamespace(internal_request_id=name), [asked], {})

    def preferred(asked: Any) -> str:
        ranked: Any = asyncio.run(router.choose_replicas([first, second], asked))  # type: ignore[list-item]
        return str(ranked[0][0].replica_id)

    taken, turned_away, given_up = call("a", 10), call("b", 20), call("c", 30)
    assert [preferred(one) for one in (taken, turned_away, given_up)] == [
        "first",
        "second",
        "first",
    ]
    router.on_request_routed(taken, "first", None)  # type: ignore[arg-type]
    router.on_request_completed("second", "b")  # type: ignore[arg-type]
    router.on_request_routed(turned_away, "first", None)  # type: ignore[arg-type]
    assert preferred(None) == "second"  # nothing against 60 tokens
    del given_up
    gc.collect()
    assert router._sought == {}
    for name in ("a", "b"):
        router.on_request_completed("first", name)  # type: ignore[arg-type]
    assert router._charges == {}


def test_a_generator_config_that_makes_no_sense_is_refused() -> None:
    for changes, said in (
        ({"count": 3, "max_count": 2}, "max_count 2 is below count 3"),
        ({"max_batch_size": 0}, "max_batch_size must be at least 1, not 0"),
        ({"cache_gib": -1}, "cache_gib must not be negative"),
        ({"stuck_after": 0}, "stuck_after must be positive"),
        ({"tensor_parallel": 2}, "tensor_parallel 2 needs the backend vllm"),
        ({"threads": 0}, "threads at least 1"),
    ):
        with pytest.raises(ValueError, match=said):
            GeneratorConfig(**changes)  # type: ignore[arg-type]
    assert GeneratorConfig(count=2).most == 2
    assert GeneratorConfig(count=2, max_count=5).most == 5


def test_the_cache_takes_as_many_tokens_as_fit() -> None:
    config = ModelConfig(
        vocab_size=67, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1024,
    )  # fmt: skip
    # A token has 2 layers x 2 heads x 8 numbers of keys and of values: 64 numbers.
    assert cache_tokens(config, 0.0, torch.float32) is None
    assert cache_tokens(config, 1.0, torch.float32) == 2**30 // 256
    assert cache_tokens(config, 1.0, torch.bfloat16) == 2**30 // 128
    with pytest.raises(ValueError, match="less than one context of 1024 tokens takes"):
        cache_tokens(config, 0.0001, torch.float32)


def test_a_backend_that_is_not_installed_is_named_before_anything_starts() -> None:
    if importlib.util.find_spec("vllm") is None:
        with pytest.raises(ValueError, match="backend is vllm, which is not installed here"):
            check_backend(GeneratorConfig(backend="vllm"))
    check_backend(GeneratorConfig())
