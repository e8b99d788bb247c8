"""Log-probabilities without all logits, against torch's cross-entropy."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llama2 import log_probs
from llama2.cpu import operators
from llama2.log_probs import selected_log_probs

TOKENS, WIDTH, VOCABULARY = 9, 12, 31


def draw(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    hidden = torch.randn(TOKENS, WIDTH, dtype=dtype, requires_grad=True)
    weight = torch.randn(VOCABULARY, WIDTH, dtype=dtype, requires_grad=True)
    return hidden, weight, torch.randint(VOCABULARY, (TOKENS,)), torch.randn(TOKENS)


@pytest.mark.parametrize("kept", [0, 1, 5, TOKENS])
@pytest.mark.parametrize("chunk", [1, 4, 1000])
def test_they_are_those_of_cross_entropy(
    kept: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_probs, "KEPT_BYTES", kept * VOCABULARY * 4)
    monkeypatch.setitem(log_probs.CHUNK_LOGITS, "cpu", chunk * VOCABULARY)
    monkeypatch.setattr(log_probs, "WIDE_LOGITS", {"cpu": 2 * VOCABULARY})
    hidden, weight, targets, upstream = draw()
    plain = -F.cross_entropy(hidden @ weight.T, targets, reduction="none")
    expected = torch.autograd.grad(plain, (hidden, weight), upstream)
    found = selected_log_probs(hidden, weight, targets)
    torch.testing.assert_close(found, plain, atol=1e-5, rtol=1e-5)
    gradients = torch.autograd.grad(found, (hidden, weight), upstream)
    torch.testing.assert_close(gradients, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("kept", [0, TOKENS])
def test_bfloat16_loses_no_more_than_its_rounding(
    kept: int, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not compiled:
        monkeypatch.setattr(operators, "fits", lambda *tensors: False)
    monkeypatch.setattr(log_probs, "KEPT_BYTES", kept * VOCABULARY * 2)
    hidden, weight, targets, upstream = draw(torch.bfloat16)
    wide = [x.detach().float().requires_grad_() for x in (hidden, weight)]
    plain = -F.cross_entropy(wide[0] @ wide[1].T, targets, reduction="none")
    expected = torch.autograd.grad(plain, wide, upstream)
    found = selected_log_probs(hidden, weight, targets)
    # Logits of up to 10 are rounded to 8 bits, their log-probabilities not once more.
    torch.testing.assert_close(found, plain, atol=0.05, rtol=0)
    for mine, theirs in zip(
        torch.autograd.grad(found, (hidden, weight), upstream), expected, strict=True
    ):
        assert (mine.float() - theirs).norm() < 0.02 * theirs.norm()


def test_a_most_improbable_token_keeps_its_exact_log_probability() -> None:
    """softmax of -200 is zero in float32, its logarithm is not minus infinity."""
    hidden = torch.tensor([[1.0, 0.0]], requires_grad=True)
    weight = torch.tensor([[200.0, 0.0], [0.0, 1.0]], requires_grad=True)
    found = selected_log_probs(hidden, weight, torch.tensor([1]))
    assert found.item() == -200.0
    (gradient,) = torch.autograd.grad(found.sum(), hidden)
    torch.testing.assert_close(gradient, torch.tensor([[-200.0, 1.0]]))


def test_of_no_token() -> None:
    """A micro-batch may hold no target; its gradient is then zero, not an error."""
    hidden, weight = torch.zeros(0, 4, requires_grad=True), torch.ones(7, 4, requires_grad=True)
    found = selected_log_probs(hidden, weight, torch.zeros(0, dtype=torch.long))
    found.sum().backward()
    assert found.shape == (0,)
    assert weight.grad is not None and not weight.grad.any()
