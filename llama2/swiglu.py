"""SwiGLU (Shazeer 2020), silu(gate) * up, alone and within the linear layer that follows it.

For the backward pass gate and up are kept: silu and the product again cost less than the memory to
hold them. Shapes: I inner width, O outputs.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama2.cpu import operators


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, in the shape of both."""
    mixed: Tensor = _SwiGLU.apply(gate, up)
    return mixed


class SwiGLULinear(nn.Linear):
    """A linear layer of silu(gate) * up."""

    def forward(self, gate: Tensor, up: Tensor) -> Tensor:  # type: ignore[override]
        """gate, up: [..., I]. Returns [..., O]."""
        output: Tensor = _SwiGLULinear.apply(gate, up, self.weight, self.bias)
        return output


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return _mixed(gate, up)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        grad_gate, grad_up, _ = _gradients(gradients[0], gate, up, wants_mixed=False)
        return grad_gate, grad_up


class _SwiGLULinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, gate: Tensor, up: Tensor, weight_OI: Tensor, bias_O: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(gate, up, weight_OI)
        return F.linear(_mixed(gate, up), weight_OI, bias_O)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        gate, up, weight_OI = ctx.saved_tensors
        gradient = gradients[0]
        learns = ctx.needs_input_grad[2]
        grad_gate, grad_up, mixed = _gradients(gradient @ weight_OI, gate, up, learns)
        flat_NO = gradient.flatten(0, -2)
        grad_weight = flat_NO.T @ mixed.flatten(0, -2) if mixed is not None else None
        grad_bias = None
        if ctx.needs_input_grad[3]:
            grad_bias = flat_NO.sum(0)
        return grad_gate, grad_up, grad_weight, grad_bias


def _mixed(gate: Tensor, up: Tensor) -> Tensor:
    return operators.swiglu(gate, up) if operators.fits(gate, up) else F.silu(gate).mul_(up)


def _gradients(
    gradient: Tensor, gate: Tensor, up: Tensor, wants_mixed: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """By gate and up; and silu(gate) * up again, if wanted."""
    if operators.fits(gradient, gate, up):
        grad_gate, grad_up, mixed = operators.swiglu_back(gate, up, gradient)
        return grad_gate, grad_up, mixed if wants_mixed else None
    activated = F.silu(gate)
    grad_gate = torch.ops.aten.silu_backward(gradient * up, gate)
    mixed_or_none = activated * up if wants_mixed else None
    return grad_gate, activated.mul_(gradient), mixed_or_none
