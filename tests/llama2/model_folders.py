"""Small random models of transformers, and how a test reads a refusal."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from llama2 import checkpoint

SMALL: dict[str, Any] = {
    "vocab_size": 67,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def randomize(module: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0 if parameter.dim() > 1 else 1, 0.2, generator=generator)


def causal(**changes: Any) -> LlamaForCausalLM:
    model = LlamaForCausalLM(LlamaConfig(**SMALL | changes)).eval()
    randomize(model)
    return model


def sequence_classifier(labels: int = 1) -> LlamaForSequenceClassification:
    config = LlamaConfig(**SMALL, pad_token_id=0, num_labels=labels)
    model = LlamaForSequenceClassification(config).eval()
    randomize(model)
    return model


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def refusal(folder: Path, error: type[Exception] = ValueError) -> str:
    """What is said of a folder: one sentence, and the same before and while loading."""
    with pytest.raises(error) as caught:
        checkpoint.check_folder(folder)
    with pytest.raises(error) as again:
        checkpoint.load(folder)
    message = str(caught.value)
    assert message == str(again.value)
    assert "\n" not in message
    assert str(folder) in message
    return message
