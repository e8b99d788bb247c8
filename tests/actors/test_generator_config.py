"""What a generator is asked for: settings, memory, backend, and how many replicas."""

import importlib.util
from types import SimpleNamespace

import pytest
import torch

from actors.backend import cache_tokens
from actors.generator import check_backend
from actors.generator_config import GeneratorConfig
from actors.replica_load import UNFINISHED, ReplicasForRequests
from llama2.config import ModelConfig


def test_as_many_replicas_as_requests_fill_batches() -> None:
    policy = ReplicasForRequests(batch=8)

    def wanted(queued: int, *unfinished: float) -> int:
        metrics = {UNFINISHED: dict(enumerate(unfinished))} if unfinished else {}
        context = SimpleNamespace(aggregated_metrics=metrics, total_queued_requests=queued)
        return policy(context)[0]

    assert [wanted(0), wanted(0, 8.0), wanted(1, 8.0), wanted(0, 9.5, 7.0)] == [1, 1, 2, 3]


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
