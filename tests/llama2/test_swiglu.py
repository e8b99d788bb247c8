"""SwiGLU with a backward pass of its own against autograd's through the plain formula."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama2.swiglu import SwiGLULinear, swiglu


def inputs(*shape: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    gate, up = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for _ in range(2))
    return gate, up


def test_it_is_the_formula() -> None:
    gate, up = torch.tensor([0.0, 1.0, -2.0]), torch.tensor([5.0, 3.0, 4.0])
    # silu(1) = 1 / (1 + e^-1), silu(-2) = -2 / (1 + e^2)
    torch.testing.assert_close(swiglu(gate, up), torch.tensor([0.0, 2.1931758, -0.9536235]))


def test_its_gradients_are_the_slopes() -> None:
    assert torch.autograd.gradcheck(swiglu, inputs(2, 3, 5))


@pytest.mark.parametrize("bias", [False, True])
def test_with_a_linear_layer_gradients_are_those_of_the_two_apart(bias: bool) -> None:
    gate, up = inputs(2, 3, 5)
    linear = SwiGLULinear(5, 4, bias=bias).double()
    wanted = [gate, up, *linear.parameters()]
    upstream = torch.randn(2, 3, 4, dtype=torch.float64)
    plain = F.linear(F.silu(gate) * up, linear.weight, linear.bias)
    expected = torch.autograd.grad(plain, wanted, upstream)
    found = linear(gate, up)
    torch.testing.assert_close(found, plain)
    torch.testing.assert_close(torch.autograd.grad(found, wanted, upstream), expected)


def test_a_frozen_layer_passes_gradients_on() -> None:
    gate, up = inputs(3, 5)
    linear = SwiGLULinear(5, 4, bias=True).double().requires_grad_(False)
    expected = torch.autograd.grad(
        F.linear(F.silu(gate) * up, linear.weight, linear.bias).sum(), (gate, up)
    )
    torch.testing.assert_close(torch.autograd.grad(linear(gate, up).sum(), (gate, up)), expected)
    assert linear.weight.grad is None


def test_the_layer_keeps_its_two_inputs_and_no_product() -> None:
    gate, up = inputs(7, 5)
    linear: nn.Linear = SwiGLULinear(5, 4, bias=False).double()
    kept: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        linear(gate, up)
    places = {tensor.data_ptr() for tensor in kept}
    assert places == {tensor.data_ptr() for tensor in (gate, up, linear.weight)}
