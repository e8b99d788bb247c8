"""Compiled forward passes against the models' own."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from llama2.config import ModelConfig
from llama2.cpu import models
from llama2.cpu.models import CompiledTrunk, CompiledUnembedding, compiled
from llama2.cpu.step import kernels_for
from llama2.lora import LoraConfig, apply_lora
from llama2.model import (
    ScalarModel,
    Transformer,
    Trunk,
    Unembedding,
    initialize,
    places_of,
)

CONFIG = ModelConfig(
    vocab_size=61, hidden_size=64, intermediate_size=96, num_hidden_layers=3,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=100,
    initializer_range=0.1,
)  # fmt: skip


def made(seed: int = 3) -> Transformer:
    model = Transformer(CONFIG)
    initialize(model, CONFIG, seed)
    return model.bfloat16().eval()


pytestmark = pytest.mark.skipif(
    kernels_for(made().model) is None, reason="this processor or machine has no compiled step"
)


def compiled_of(trunk: Trunk) -> CompiledTrunk:
    found = CompiledTrunk.of(trunk)
    assert found is not None
    return found


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    """Rows of documents of 1 to 130 tokens, longer than the context too, some with padding."""
    generator = torch.Generator().manual_seed(0)
    tokens_BT = torch.randint(0, 61, (5, 160), generator=generator)
    segments_BT = torch.zeros((5, 160), dtype=torch.long)
    for row, lengths in enumerate([[30, 130], [1, 64, 65], [129], [], [2, 3, 63, 1]]):
        start = 0
        for document, length in enumerate(lengths, start=1):
            segments_BT[row, start : start + length] = document
            start += length
    return tokens_BT, segments_BT


def assert_as_near(found_ND: Tensor, trunk: Trunk, arguments: tuple[Tensor | None, ...]) -> None:
    """To what float32 gives as near as bfloat16's own."""
    exact_ND = copy.deepcopy(trunk).float()(*arguments).flatten(0, -2)
    own_N = (trunk(*arguments).flatten(0, -2).float() - exact_ND).abs().mean(dim=-1)
    found_N = (found_ND.float() - exact_ND).abs().mean(dim=-1)
    real_N = torch.ones_like(own_N, dtype=torch.bool)
    if len(arguments) < 3 and arguments[1] is not None:
        real_N = arguments[1].flatten() != 0
    assert found_N[real_N].mean() < 1.15 * own_N[real_N].mean()
    assert found_N[real_N].max() < 2.5 * own_N[real_N].max()


@torch.no_grad()
@pytest.mark.parametrize("together", [40, 1024])
def test_documents_of_packed_rows(
    batch: tuple[Tensor, Tensor], together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "TOKENS", together)
    trunk = made().model
    found = compiled_of(trunk)(*batch)
    assert found.shape == (5, 160, 64)
    assert_as_near(found.flatten(0, 1), trunk, batch)
    assert not found[batch[1] == 0].any()
    whole = compiled_of(trunk)(batch[0][:1])
    assert_as_near(whole[0], trunk, (batch[0][:1], None))


@torch.no_grad()
@pytest.mark.parametrize("places", [[170, 3, 3, 159, 320, 0, 645], [170, 3, 320], [0, 5], []])
def test_places_in_any_order_and_more_than_once(
    batch: tuple[Tensor, Tensor], places: list[int]
) -> None:
    trunk = made().model
    places_N = torch.tensor(places, dtype=torch.long)
    found = compiled_of(trunk)(*batch, places_N)
    assert torch.equal(found, compiled_of(trunk)(*batch).flatten(0, 1)[places_N])
    if places:
        assert_as_near(found, trunk, (*batch, places_N))


@torch.no_grad()
def test_log_probabilities_and_scalars_of_frozen_models(batch: tuple[Tensor, Tensor]) -> None:
    model = made()
    targets_BT = batch[0].roll(-1, 1).where(batch[1] != 0, -100)
    expected = model(*batch, targets_BT)
    scalar = ScalarModel(CONFIG)
    initialize(scalar, CONFIG, seed=4)
    scalar = scalar.bfloat16().eval()
    wanted_BT = targets_BT != -100
    expected_BT = scalar(*batch, wanted_BT)
    by_hand_BT = scalar(*batch, wanted_BT, trunk=compiled_of(scalar.model))
    compiled(model)
    compiled(scalar)
    assert isinstance(model.model, CompiledTrunk)
    assert (model(*batch, targets_BT) - expected).abs().mean() < 0.02
    found_BT = scalar(*batch, wanted_BT)
    assert torch.equal(found_BT, by_hand_BT)
    assert (found_BT - expected_BT).abs().mean() < 0.1 * expected_BT.abs().mean()
    assert not found_BT[~wanted_BT].any()
    assert places_of(wanted_BT) is not None


@torch.no_grad()
def test_new_weights_count_when_told(batch: tuple[Tensor, Tensor]) -> None:
    trunk, other = made().model, made(seed=5).model
    found = compiled_of(trunk)
    before = found(*batch)
    trunk.load_state_dict(other.state_dict())
    found.weights_changed()
    assert torch.equal(found(*batch), compiled_of(other)(*batch))
    assert not torch.equal(found(*batch), before)


@torch.no_grad()
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


def test_tokens_outside_the_vocabulary_are_refused() -> None:
    for token in (61, -1):
        with pytest.raises(IndexError, match="tokens outside the vocabulary of 61"):
            compiled_of(made().model)(torch.tensor([[1, token]]))


def test_what_it_does_not_compute() -> None:
    assert CompiledTrunk.of(made().float().model) is None
    adapted = made()
    apply_lora(adapted, LoraConfig(rank=2), seed=0)
    assert CompiledTrunk.of(adapted.model) is None
    mixed = made().model
    mixed.norm.float()
    assert CompiledTrunk.of(mixed) is None
    sharded = made().model
    layer: Any = sharded.layers[1]
    layer.mlp.gate_proj.weight = torch.nn.Parameter(torch.zeros(0, dtype=torch.bfloat16))
    assert CompiledTrunk.of(sharded) is None
    part = made().model
    part.embed_tokens.weight = torch.nn.Parameter(torch.zeros(0, dtype=torch.bfloat16))
    assert CompiledTrunk.of(part) is None
