"""Gradients on their way into DeepSpeed's float32 buffers."""

from functools import partial
from typing import Any

from torch import nn


def gather_at_once(optimizer: Any) -> None:
    """Move each gradient into the buffer of `optimizer`, DeepSpeed's for ZeRO 1 in bfloat16, as
    soon as it is complete.

    By itself DeepSpeed would zero all gradients before a backward pass, add to them, and afterwards
    widen each into new memory and add that to a buffer of zeros. Here the first one is copied, and
    the next parameter's takes its memory.
    """
    for group, parameters in enumerate(optimizer.bf16_groups):
        for place, parameter in enumerate(parameters):
            parameter.register_post_accumulate_grad_hook(partial(_move, optimizer, group, place))


def _move(optimizer: Any, group: int, place: int, parameter: nn.Parameter) -> None:
    assert parameter.grad is not None
    total = optimizer.fp32_groups_gradients[group][place]
    gradient = parameter.grad.view(total.shape)
    if optimizer.fp32_groups_has_gradients[group][place]:
        total.add_(gradient)
    else:
        total.copy_(gradient)
    optimizer.fp32_groups_has_gradients[group][place] = True
    parameter._hp_grad = total  # type: ignore[attr-defined]
    parameter.grad = None
