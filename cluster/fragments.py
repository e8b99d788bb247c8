"""The training state that a rank holds, cut along parameters.

DeepSpeed keeps float32 master weights and Adam's moments in flat buffers, cut in a way that depends
on the ZeRO stage and the number of ranks. A fragment names the parameter and the elements that a
piece of such a buffer belongs to, so that another group, cut otherwise, can read it.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

KINDS = ("weight", "exp_avg", "exp_avg_sq")
"""What is kept of each element: the float32 weight and Adam's two running means."""


@dataclass(frozen=True)
class Fragment:
    """Elements `start` and on of a parameter that is flattened and has `numel` elements."""

    name: str
    numel: int
    start: int
    tensors: Mapping[str, Tensor]
    """By kind: 1-D float32 views of the optimizer's own memory, all of one length."""

    def share(self, rank: int, world_size: int) -> "Fragment":
        """The `rank`-th of `world_size` nearly equal parts."""
        length = len(self.tensors["weight"])
        first, last = rank * length // world_size, (rank + 1) * length // world_size
        tensors = {kind: tensor[first:last] for kind, tensor in self.tensors.items()}
        return Fragment(self.name, self.numel, self.start + first, tensors)


def held(
    module: nn.Module, optimizer: Any, zero_stage: int, writing: bool = False
) -> Iterator[Fragment]:
    """All state of trainable parameters that this rank holds; without ZeRO, that of all of them.

    optimizer: DeepSpeed's, or torch's own without ZeRO. The views of a fragment are valid until the
    next one is drawn, since state on NVMe is in memory for that long. `writing` takes what was
    written into them over, also into the low-precision weights; then all ranks must exhaust the
    iterator (collective).
    """
    names = {parameter: name for name, parameter in module.named_parameters()}
    if zero_stage == 0:
        yield from _whole(optimizer, names)
    elif zero_stage == 3:
        yield from _sharded(optimizer, names, writing)
    else:
        yield from _partitioned(optimizer, names)
        if writing:
            optimizer.update_lp_params()


def sizes(module: nn.Module) -> dict[str, int]:
    """Number of elements of each trainable parameter."""
    return {
        # Under ZeRO 3 a parameter is empty while it is not in use.
        name: getattr(parameter, "ds_numel", parameter.numel())
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
    }


def set_steps(optimizer: Any, zero_stage: int, steps: int) -> None:
    """Set Adam's own count of updates, which its bias correction goes by."""
    adam = optimizer if zero_stage == 0 else optimizer.optimizer
    for state in adam.state.values():
        state["step"].fill_(float(steps))


def _state(adam: Any, flat: Tensor) -> dict[str, Tensor]:
    """Adam's state of `flat`, which torch makes as late as the first update."""
    state: dict[str, Tensor] = adam.state[flat]
    if not state:
        state["step"] = torch.zeros((), device=flat.device)  # where a fused update looks for it
        state["exp_avg"] = torch.zeros_like(flat)
        state["exp_avg_sq"] = torch.zeros_like(flat)
    return state


def _views(flat: Tensor, state: dict[str, Tensor], start: int, length: int) -> dict[str, Tensor]:
    tensors = {"weight": flat.detach(), "exp_avg": state["exp_avg"]}
    tensors["exp_avg_sq"] = state["exp_avg_sq"]
    return {kind: tensor.view(-1)[start : start + length] for kind, tensor in tensors.items()}


def _whole(adam: Any, names: Mapping[nn.Parameter, str]) -> Iterator[Fragment]:
    for group in adam.param_groups:
        for parameter in group["params"]:
            assert parameter.is_contiguous()
            views = _views(parameter, _state(adam, parameter), 0, parameter.numel())
            yield Fragment(names[parameter], parameter.numel(), 0, views)


def _partitioned(optimizer: Any, names: Mapping[nn.Parameter, str]) -> Iterator[Fragment]:
    """ZeRO 1 and 2: parameters lie end to end in a buffer of which each rank has one stretch."""
    if hasattr(optimizer, "bf16_groups"):  # ZeRO 1 in bfloat16 has an optimizer of its own
        flats, groups = optimizer.fp32_groups_flat_partition, optimizer.bf16_groups
    else:
        flats, groups = optimizer.single_partition_of_fp32_groups, optimizer.bit16_groups
    for flat, parameters in zip(flats, groups, strict=True):
        state = _state(optimizer.optimizer, flat)
        for parameter in parameters:
            mapping = parameter._hp_mapping
            if mapping is not None:
                place = mapping.get_hp_fragment_address()
                start = mapping.lp_fragment_address.start
                views = _views(flat, state, place.start, place.numel)
                yield Fragment(names[parameter], parameter.numel(), start, views)


def _sharded(
    optimizer: Any, names: Mapping[nn.Parameter, str], writing: bool
) -> Iterator[Fragment]:
    """ZeRO 3: each parameter is cut into equal parts, padded at the end, and each rank has one."""
    if writing:
        optimizer._partition_all_parameters()
    for index, parameters in enumerate(optimizer.fp16_groups):
        flat = optimizer.fp32_partitioned_groups_flat[index]
        on_nvme = optimizer._swappable_optimizer_subgroup(index)
        if on_nvme:
            optimizer._optimizer_states_and_gradient_swap_in(index)
        is_new = not optimizer.optimizer.state[flat]
        state = _state(optimizer.optimizer, flat)
        for parameter in parameters:
            _, place, length = optimizer.grad_position[optimizer.get_param_id(parameter)]
            start = optimizer._get_param_partition_rank(parameter) * length
            length = min(length, parameter.ds_numel - start)
            if length > 0:
                views = _views(flat, state, place, length)
                yield Fragment(names[parameter], parameter.ds_numel, start, views)
        if writing:
            optimizer._reassign_or_swap_out_partitioned_parameters(index)
        if on_nvme and (writing or is_new):
            optimizer._optimizer_states_and_gradient_swap_out(index)
        elif on_nvme:
            optimizer._release_swap_buffers(index)
    if writing and optimizer.persistent_parameters:
        # Small weights are kept whole on every rank.
        optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
