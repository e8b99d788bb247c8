"""Gradients on their way into DeepSpeed's float32 buffers."""

from functools import partial
from typing import Any

from torch import nn


def gather_at_once(optimizer: Any) -> None:
    """Move each gradient into the buffer of `optimizer`, DeepSpeed's for ZeRO 1 in bfloat16 without
    offloading, as soon as it is complete, and give its memory to the next one.

    By default DeepSpeed would zero all gradients before a backward pass, add to them, and
    afterwards widen each into new memory and add that to a buffer of zeros. Its
    `immediate_grad_update`, which must be off, frees them at once as well, but widens and adds.
    """
    for group, parameters in enumerate(optimizer.bf16_groups):
        for place, parameter in enumerate(parameters):
            move = partial(_move, optimizer, group, place)
            hook = parameter.register_post_accumulate_grad_hook(move)
            # `destroy` removes these: parameter and optimizer would keep each other alive.
            optimizer._grad_acc_hooks.append(hook)


def overwrite(optimizer: Any) -> None:
    """Leave the gradients of a step in the buffers of `optimizer` until the next ones replace them,
    instead of zeroing all after each step; what is left of a parameter that gets no other is zeroed
    before it would be applied. After `gather_at_once`, in a group of one: a reduction comes before.
    """
    optimizer.fp32_groups_gradients_flat.clear()  # what DeepSpeed zeroes
    zero = partial(_zero_missing, optimizer)
    optimizer._grad_acc_hooks.append(optimizer.optimizer.register_step_pre_hook(zero))


def _zero_missing(optimizer: Any, *_: Any) -> None:
    groups = zip(optimizer.fp32_groups_gradients, optimizer.fp32_groups_has_gradients, strict=True)
    for totals, found in groups:
        for total, is_there in zip(totals, found, strict=True):
            if not is_there:
                total.zero_()


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
