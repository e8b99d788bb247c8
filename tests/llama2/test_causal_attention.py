"""Attention in blocks of queries against torch's fused kernel."""

import pytest
import torch
import torch.nn.functional as F

from llama2 import causal_attention as module
from llama2.causal_attention import causal_attention
from llama2.cpu import operators


@pytest.mark.parametrize("tokens", [1, 8, 9, 31])
@pytest.mark.parametrize("block", [1, 4, 9, 128])
def test_it_is_that_of_the_fused_kernel(
    block: int, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BLOCK", block)
    torch.manual_seed(0)
    inputs = [torch.randn(2, tokens, 3, 8, requires_grad=True) for _ in range(3)]
    upstream = torch.randn(2, tokens, 3, 8)
    fused = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in inputs), is_causal=True)
    expected = torch.autograd.grad(fused.transpose(1, 2), inputs, upstream)
    found = causal_attention(*inputs)
    torch.testing.assert_close(found, fused.transpose(1, 2))
    torch.testing.assert_close(torch.autograd.grad(found, inputs, upstream), expected)


@pytest.mark.parametrize("compiled", [False, True])
def test_bfloat16_loses_no_more_than_its_rounding(
    compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not compiled:
        monkeypatch.setattr(operators, "fits", lambda *tensors: False)
    torch.manual_seed(0)
    inputs = [torch.randn(2, 200, 3, 16).bfloat16().requires_grad_() for _ in range(3)]
    upstream = torch.randn(2, 200, 3, 16).bfloat16()
    wide = [x.detach().float().requires_grad_() for x in inputs]
    plain = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in wide), is_causal=True)
    expected = torch.autograd.grad(plain.transpose(1, 2), wide, upstream.float())
    found = torch.autograd.grad(causal_attention(*inputs), inputs, upstream)
    for mine, theirs in zip(found, expected, strict=True):
        assert (mine.float() - theirs).norm() < 0.01 * theirs.norm()


def test_the_models_attention_takes_it_in_bfloat16_with_grouped_heads() -> None:
    from llama2.attention import attend

    torch.manual_seed(0)
    query = torch.randn(2, 20, 4, 8).bfloat16()
    key, value = torch.randn(2, 2, 20, 2, 8).bfloat16().unbind()
    expected = attend(query.float(), key.float(), value.float())
    assert (attend(query, key, value).float() - expected).norm() < 0.01 * expected.norm()
