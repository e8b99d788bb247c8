"""The entropy without all probabilities, against torch's own."""

import math

import pytest
import torch

from llama2 import entropy
from llama2.config import ModelConfig
from llama2.entropy import EntropyUnembedding, entropies
from llama2.losses import IGNORE
from llama2.model import Transformer, initialize

TOKENS, WIDTH, VOCABULARY = 9, 12, 31


@pytest.mark.parametrize("rows", [1, 4, 1000])
def test_they_are_those_of_torch(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(entropy, "WIDE_LOGITS", {"cpu": rows * VOCABULARY})
    torch.manual_seed(0)
    hidden = torch.randn(TOKENS, WIDTH, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(VOCABULARY, WIDTH, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(TOKENS)
    plain = torch.distributions.Categorical(logits=hidden @ weight.T).entropy()
    expected = torch.autograd.grad(plain, (hidden, weight), upstream.double())
    found = entropies(hidden, weight)
    torch.testing.assert_close(found.double(), plain, atol=1e-5, rtol=1e-5)
    gradients = torch.autograd.grad(found, (hidden, weight), upstream)
    torch.testing.assert_close(gradients, expected, atol=1e-5, rtol=1e-4)


def test_equal_logits_and_a_certain_token() -> None:
    weight = torch.tensor([[0.0, 500.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]], requires_grad=True)
    found = entropies(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), weight)
    assert found.tolist() == pytest.approx([math.log(4), 0.0], abs=1e-6)
    found.sum().backward()
    assert weight.grad is not None
    assert weight.grad.abs().max() < 1e-6  # the highest there is, and the lowest


def test_a_model_with_it_gives_the_same_log_probabilities() -> None:
    config = ModelConfig(
        vocab_size=VOCABULARY, hidden_size=8, intermediate_size=12, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=16,
    )  # fmt: skip
    model = Transformer(config)
    initialize(model, config, seed=0)
    tokens_BT = torch.randint(VOCABULARY, (2, 6))
    targets_BT = tokens_BT.roll(-1, dims=1)
    targets_BT[0, :3] = IGNORE
    names = list(model.state_dict())
    plain_N, logits_BTV = model(tokens_BT, targets_BT=targets_BT), model(tokens_BT)
    model.lm_head = EntropyUnembedding.of(model.lm_head)
    assert list(model.state_dict()) == names
    found_N, entropies_N = model(tokens_BT, targets_BT=targets_BT)
    torch.testing.assert_close(found_N, plain_N)
    torch.testing.assert_close(model(tokens_BT), logits_BTV)
    expected = torch.distributions.Categorical(logits=logits_BTV[targets_BT != IGNORE]).entropy()
    torch.testing.assert_close(entropies_N, expected)
