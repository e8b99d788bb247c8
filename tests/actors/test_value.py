"""The critic's values before an update, which compiled code may compute."""

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from actors.value import Value
from llama2.config import ModelConfig
from llama2.cpu.step import kernels_for
from llama2.model import ScalarModel, initialize

CONFIG = ModelConfig(
    vocab_size=61, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
)  # fmt: skip


class StandIn:
    """A learner's engine as far as values ask for it."""

    def __init__(self, module: ScalarModel) -> None:
        self.module, self.updates = module, 0

    def __call__(self, *arguments: Any) -> Any:
        return self.module(*arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_are_those_of_the_weights_as_they_are(dtype: torch.dtype) -> None:
    model, other = ScalarModel(CONFIG), ScalarModel(CONFIG)
    initialize(model, CONFIG, seed=0)
    initialize(other, CONFIG, seed=1)
    model, other = model.to(dtype), other.to(dtype)
    engine: Any = StandIn(model)
    value = Value(engine, None)
    assert (value._trunk is not None) == (kernels_for(model.model) is not None)
    tokens_BT = torch.randint(0, 61, (3, 20), generator=torch.Generator().manual_seed(2))
    mask_BT = torch.arange(20).expand(3, 20) > 8
    batch: Any = SimpleNamespace(
        tokens_BT=tokens_BT, segments_BT=torch.ones_like(tokens_BT), mask_BT=mask_BT
    )
    before = copy.deepcopy(model)
    for current in (before, other):
        expected_BT = current(batch.tokens_BT, batch.segments_BT, mask_BT)
        found_BT = value.values(batch)
        near = 0.1 * expected_BT.abs().mean().item()
        torch.testing.assert_close(found_BT, expected_BT.detach(), atol=near, rtol=0.05)
        model.load_state_dict(other.state_dict())
        engine.updates += 1
