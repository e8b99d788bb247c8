"""Compiled log-probabilities of a frozen head, against float64, and which models compiled code is
for."""

from typing import Any

import pytest
import torch

from llama2.config import ModelConfig
from llama2.cpu.head import CompiledUnembedding, with_compiled_head
from llama2.cpu.step import kernels_for
from llama2.lora import LoraConfig, apply_lora
from llama2.model import Transformer, Unembedding, initialize

CONFIG = ModelConfig(
    vocab_size=61, hidden_size=64, intermediate_size=96, num_hidden_layers=3,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=100,
    initializer_range=0.1,
)  # fmt: skip


def made(seed: int = 3) -> Transformer:
    model = Transformer(CONFIG)
    initialize(model, CONFIG, seed)
    return model.bfloat16().eval()


needed = pytest.mark.skipif(
    kernels_for(made().model) is None, reason="this processor or machine has no compiled step"
)


@torch.no_grad()
@needed
@pytest.mark.parametrize("vocabulary", [7, 61, 1000, 32_000])
@pytest.mark.parametrize("rows", [0, 1, 13, 300])
def test_log_probabilities_of_targets(vocabulary: int, rows: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    head = Unembedding(64, vocabulary, bias=False).bfloat16()
    head.weight.normal_(0, 1, generator=generator)
    kernels = kernels_for(made().model)
    assert kernels is not None
    hidden_ND = torch.randn((rows, 64), generator=generator).bfloat16()
    targets_N = torch.randint(0, vocabulary, (rows,), generator=generator)
    found_N = CompiledUnembedding(head, kernels)(hidden_ND, targets_N)
    logits_NV = (hidden_ND.double() @ head.weight.double().T).bfloat16().double()
    expected_N = logits_NV.log_softmax(-1).gather(1, targets_N[:, None])[:, 0]
    # A logit that lies between two bfloat16 numbers may be rounded to either.
    assert found_N.shape == (rows,)
    if rows:
        for wrong in (-100, vocabulary):
            with pytest.raises(IndexError, match="targets outside the vocabulary"):
                CompiledUnembedding(head, kernels)(hidden_ND, torch.full((rows,), wrong))
        assert (found_N - expected_N).abs().max() < 0.26
        assert (found_N - expected_N).abs().median() < 1e-3
        hidden_ND[0, 0] = float("nan")
        damaged_N = CompiledUnembedding(head, kernels)(hidden_ND, targets_N)
        assert damaged_N[0].isnan()
        assert torch.equal(damaged_N[1:], found_N[1:])


@torch.no_grad()
@needed
def test_a_frozen_model_with_that_head() -> None:
    tokens_BT = torch.randint(0, 61, (3, 50), generator=torch.Generator().manual_seed(0))
    targets_BT = tokens_BT.roll(-1, 1)
    targets_BT[:, :20] = -100
    own_N, own_BTV = made()(tokens_BT, targets_BT=targets_BT), made()(tokens_BT)
    model = with_compiled_head(made())
    assert isinstance(model.lm_head, CompiledUnembedding)
    found_N = model(tokens_BT, targets_BT=targets_BT)
    assert found_N.shape == own_N.shape
    assert (found_N - own_N).abs().mean() < 0.01
    assert torch.equal(model(tokens_BT), own_BTV)


@needed
def test_what_compiled_code_does_not_compute() -> None:
    assert kernels_for(made().float().model) is None
    assert not isinstance(with_compiled_head(made().float()).lm_head, CompiledUnembedding)
    adapted = made()
    apply_lora(adapted, LoraConfig(rank=2), seed=0)
    assert kernels_for(adapted.model) is None
    mixed = made().model
    mixed.norm.float()
    assert kernels_for(mixed) is None
    sharded = made().model
    layer: Any = sharded.layers[1]
    layer.mlp.gate_proj.weight = torch.nn.Parameter(torch.zeros(0, dtype=torch.bfloat16))
    assert kernels_for(sharded) is None
    part = made().model
    part.embed_tokens.weight = torch.nn.Parameter(torch.zeros(0, dtype=torch.bfloat16))
    assert kernels_for(part) is None
