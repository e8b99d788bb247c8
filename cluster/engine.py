"""DeepSpeed behind a small interface: the only file that imports it.

An `Engine` owns a module, its ZeRO-sharded optimizer and its learning-rate schedule. Losses are
sums divided by counts of the whole global batch, so gradients are added over ranks and micro-
batches, never averaged, and any split of a batch gives the same update.
"""

import gc
import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed
from torch import Tensor, nn

from cluster import fragments, gradients
from cluster.fragments import Fragment


@dataclass(frozen=True)
class EngineConfig:
    """How a module is trained. Optimizer settings are the paper's (sections 2.2 and 3.4.3)."""

    zero_stage: Literal[0, 1, 2, 3] = 1
    """DeepSpeed ZeRO: 1 shards optimizer state, 2 gradients too, 3 weights too."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of weights and activations; the optimizer keeps float32 master weights."""
    beta1: float = 0.9
    """AdamW: decay of the gradient's running mean."""
    beta2: float = 0.95
    """AdamW: decay of the squared gradient's running mean."""
    epsilon: float = 1e-5
    """AdamW: added to the denominator."""
    weight_decay: float = 0.1
    """AdamW: applied to matrices, not to norms."""
    clip_grad_norm: float = 1.0
    """Largest global norm of the gradient; 0 leaves it as it is."""
    offload_optimizer: Literal["none", "cpu", "nvme"] = "none"
    """Keep the optimizer state, and update it, in the host's memory (ZeRO 1 to 3) or on NVMe
    (ZeRO 3)."""
    offload_parameters: Literal["none", "cpu", "nvme"] = "none"
    """Keep the sharded weights in the host's memory (ZeRO 3) or on NVMe (ZeRO 3, bfloat16)."""
    nvme_path: Path | None = None
    """Folder on each node's NVMe disk, for what is kept there."""

    def __post_init__(self) -> None:
        if self.offload_parameters != "none" and self.zero_stage != 3:
            raise ValueError("offload_parameters needs zero_stage 3; set it, or do not offload.")
        if self.offload_optimizer == "nvme" and self.zero_stage != 3:
            raise ValueError(
                "offload_optimizer 'nvme' needs zero_stage 3; set it, or offload to 'cpu'."
            )
        if self.offload_optimizer != "none" and self.zero_stage == 0:
            raise ValueError("offload_optimizer needs zero_stage 1, 2 or 3; set one of them.")
        if self.offload_parameters == "nvme" and self.precision == "float32":
            # DeepSpeed would write them there with 16 bits.
            raise ValueError(
                "offload_parameters 'nvme' needs precision bfloat16; set it, or offload to 'cpu'."
            )
        if "nvme" in (self.offload_optimizer, self.offload_parameters) and self.nvme_path is None:
            raise ValueError(
                "Offloading to 'nvme' needs nvme_path; name a folder on an NVMe disk, or offload "
                "to 'cpu'."
            )
        if self.precision == "bfloat16" and self.zero_stage == 0:
            # Without ZeRO DeepSpeed would accumulate gradients in bfloat16.
            raise ValueError("bfloat16 needs zero_stage 1, 2 or 3; set one, or take float32.")


def _import_deepspeed() -> Any:
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")
    import deepspeed

    if not torch.cuda.is_available():
        # Its CPU backend would compile a shared-memory all-reduce, for inference only, with a C++
        # compiler that a user's machine may lack; gloo does all that training asks for.
        deepspeed.ops.__compatible_ops__ = {}
    return deepspeed


def _check_nvme() -> None:
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible():
        raise ValueError(
            "Offloading to 'nvme' needs libaio with its headers and a C++ compiler on every node; "
            "install them (libaio-dev, g++), or offload to 'cpu'."
        )


class Engine:
    """A module under DeepSpeed. All ranks call the same methods in the same order."""

    def __init__(
        self,
        module: nn.Module,
        config: EngineConfig,
        schedule: Callable[[int], float],
        weights: Iterable[tuple[str, Tensor]] = (),
    ) -> None:
        """Wrap `module`; `schedule(updates made so far)` gives the learning rate of the next one.

        Parameters may be on the meta device: `weights` then has the value of each, by the name that
        `named_parameters` gives it, in the same order on all ranks. Under ZeRO 3 each is cut before
        the next one is drawn, so that no rank ever holds the whole model.

        torch.distributed must be initialised. Raises `ValueError` where this machine cannot offload
        to NVMe.
        """
        deepspeed = _import_deepspeed()
        if "nvme" in (config.offload_optimizer, config.offload_parameters):
            _check_nvme()
        self.config, self.schedule = config, schedule
        self.world_size = torch.distributed.get_world_size()
        self._deepspeed = deepspeed
        groups = _groups(module, config)
        largest = max(parameter.numel() for parameter in module.parameters())
        settings = _settings(config, math.ceil(largest / self.world_size))
        if any(parameter.is_meta for parameter in module.parameters()):
            _fill(module, weights, config, settings)
        self._engine, *_ = deepspeed.initialize(
            model=module, model_parameters=groups, config=settings
        )
        has_buffers = hasattr(self._engine.optimizer, "bf16_groups")
        if has_buffers:
            gradients.gather_at_once(self._engine.optimizer)
        alone = self.world_size == 1 and has_buffers
        if alone:
            gradients.overwrite(self._engine.optimizer)
        # Without ZeRO, `step` reduces and clips itself; DeepSpeed's optimizer for bfloat16 would
        # copy all gradients to a reduction with nobody.
        self._engine.enable_backward_allreduce = config.zero_stage > 0 and not alone
        self.updates = 0
        """Steps made: the position in the schedule."""
        self.applied = 0
        """Updates of the weights: steps less those skipped for their gradients."""

    @property
    def device(self) -> torch.device:
        return torch.device(self._engine.device)

    @property
    def module(self) -> nn.Module:
        """The wrapped module."""
        module: nn.Module = self._engine.module
        return module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward pass.

        Without gradients it is the module's own, which several threads may run at once, unless
        ZeRO 3 gathers weights in it: DeepSpeed's prepares for a backward pass.
        """
        run = self._engine if torch.is_grad_enabled() else self.module
        return run(*args, **kwargs)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of `loss`, this rank's and micro-batch's part of the global loss.

        After an exception a part of it may have been added: `discard`.
        """
        self._engine.backward(loss * self.world_size, scale_wrt_gas=False)  # DeepSpeed averages

    def step(self) -> dict[str, float]:
        """Reduce, clip and apply the gradients. Returns the learning rate and the gradient's norm.

        Where the norm is not finite, on all ranks alike, the weights stay as they are; the step
        counts as made all the same.
        """
        rate = self.schedule(self.updates)
        for group in self._engine.optimizer.param_groups:
            group["lr"] = rate
        self.updates += 1
        norm = self._step() if self.config.zero_stage else self._step_without_zero()
        self.applied += math.isfinite(norm)
        return {"lr": rate, "grad_norm": norm}

    def _step(self) -> float:
        self._engine.step()
        applied, norm = self._engine.was_step_applied(), float(self._engine.get_global_grad_norm())
        assert applied == math.isfinite(norm)
        return norm

    def _step_without_zero(self) -> float:
        # DeepSpeed would not tell the norm, and would apply gradients that are not finite.
        self._engine.buffered_allreduce_fallback()
        parameters = [p for p in self.module.parameters() if p.requires_grad]
        limit = self.config.clip_grad_norm or math.inf
        norm = float(nn.utils.clip_grad_norm_(parameters, limit))
        if math.isfinite(norm):
            self._engine.step()
        else:
            self.discard()
        return norm

    def discard(self) -> None:
        """Drop what `backward` added since the last step."""
        self._engine.zero_grad()
        optimizer = self._engine.optimizer
        if self.config.zero_stage == 3:
            optimizer.zero_grad()
            optimizer._offload_boundary_param_ids = set()
        elif self.config.zero_stage:
            optimizer.zero_grad()
            if hasattr(optimizer, "bf16_groups"):  # an optimizer of its own, see fragments.py
                return
            optimizer.micro_step_id = -1  # the next gradient is the first again
            for group in optimizer.averaged_gradients:
                optimizer.averaged_gradients[group] = None
            for group in optimizer.all_grad_tensors:
                optimizer.all_grad_tensors[group] = None
            if optimizer.cpu_offload:
                optimizer._offload_accumulated_param_ids = set()

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every weight in full, one at a time, in the same order on all ranks (collective)."""
        for name, parameter in self.module.state_dict(keep_vars=True).items():
            with self._deepspeed.zero.GatheredParameters([parameter], enabled=self._sharded):
                yield name, parameter.detach()

    def buckets(self, size: int = 1 << 26) -> Iterator[list[tuple[str, Tensor]]]:
        """Every weight in full, tied ones once, in buckets of at most `size` bytes or one weight
        (collective).

        The ranks' shares of a bucket are gathered together. A bucket stays as it is until the next
        but one is drawn, so that no rank holds more than two of them.
        """
        gathered: deque[ExitStack] = deque()
        try:
            for bucket in _bucketed(self.module, size):
                if len(gathered) == 2:
                    gathered.popleft().close()
                gathered.append(ExitStack())
                gathered[-1].enter_context(
                    self._deepspeed.zero.GatheredParameters(
                        [weight for _, weight in bucket], enabled=self._sharded
                    )
                )
                yield [(name, weight.detach()) for name, weight in bucket]
        finally:
            for held in gathered:
                held.close()

    @property
    def _sharded(self) -> bool:
        return self.config.zero_stage == 3

    def fragments(self) -> Iterator[Fragment]:
        """This rank's share of weights and optimizer state; the shares of all ranks are the whole.

        Trainable parameters only. The views of a fragment are valid until the next one is drawn.
        """
        rank = torch.distributed.get_rank()
        for fragment in self._held():
            yield fragment if self.config.zero_stage else fragment.share(rank, self.world_size)

    def restore(self, fill: Callable[[Fragment], None], updates: int, applied: int) -> None:
        """Take over a state: `fill` writes into the views of every fragment that this rank holds
        (collective)."""
        self.discard()
        for fragment in self._held(writing=True):
            fill(fragment)
        fragments.set_steps(self._engine.optimizer, self.config.zero_stage, applied)
        self.updates, self.applied = updates, applied

    def sizes(self) -> dict[str, int]:
        """Number of elements of each trainable parameter."""
        return fragments.sizes(self.module)

    def _held(self, writing: bool = False) -> Iterator[Fragment]:
        stage, optimizer = self.config.zero_stage, self._engine.optimizer
        return fragments.held(self.module, optimizer, stage, writing)

    def close(self) -> None:
        """Free what the engine holds."""
        self._engine.destroy()
        del self._engine
        gc.collect()


def _bucketed(module: nn.Module, size: int) -> Iterator[list[tuple[str, Tensor]]]:
    state = module.state_dict(keep_vars=True)
    first = {id(weight): name for name, weight in reversed(state.items())}
    bucket: list[tuple[str, Tensor]] = []
    room = size
    for name, weight in state.items():
        if first[id(weight)] != name:
            continue
        if bucket and _size(weight) > room:
            yield bucket
            bucket, room = [], size
        bucket.append((name, weight))
        room -= _size(weight)
    if bucket:
        yield bucket


def _size(weight: Tensor) -> int:
    # Of a weight that ZeRO 3 has cut, only a part is here.
    return int(getattr(weight, "ds_numel", weight.numel())) * weight.itemsize


def _fill(
    module: nn.Module,
    weights: Iterable[tuple[str, Tensor]],
    config: EngineConfig,
    settings: dict[str, Any],
) -> None:
    """Give each parameter its weight, or its own where it has one, in the precision and on the
    device that it is trained in. Under ZeRO 3 this rank keeps its part alone."""
    deepspeed = _import_deepspeed()
    deepspeed.init_distributed()
    shard = None
    if config.zero_stage == 3:
        # The module is an empty one: parameters are cut one by one as they come.
        init = deepspeed.zero.Init(module=nn.Module(), config_dict_or_path=settings)
        shard = init._convert_to_zero_parameters
    accelerator = deepspeed.accelerator.get_accelerator()
    device = torch.device(accelerator.device_name(int(os.environ["LOCAL_RANK"])))
    # What DeepSpeed cuts is rank 0's: the others need not read the files.
    reads = shard is None or torch.distributed.get_rank() == 0
    parameters = dict(module.named_parameters())
    real = [(name, p.detach()) for name, p in parameters.items() if not p.is_meta]
    for name, weight in chain(weights, real):
        parameter = parameters.pop(name)
        assert parameter.shape == weight.shape, f"{name} is {weight.shape}, not {parameter.shape}"
        value = torch.empty(weight.shape, dtype=getattr(torch, config.precision), device=device)
        if reads:
            value.copy_(weight)
        # In place: tied layers and the optimizer's groups refer to the parameter.
        torch.utils.swap_tensors(parameter, nn.Parameter(value, parameter.requires_grad))
        del value
        if shard is not None:
            shard([parameter])
    assert not parameters, f"there is no weight for {', '.join(parameters)}"


def _groups(module: nn.Module, config: EngineConfig) -> list[dict[str, Any]]:
    trainable = [p for p in module.parameters() if p.requires_grad]
    matrices = [p for p in trainable if p.dim() >= 2]
    vectors = [p for p in trainable if p.dim() < 2]
    groups = [(matrices, config.weight_decay), (vectors, 0.0)]
    return [{"params": params, "weight_decay": decay} for params, decay in groups if params]


def _settings(config: EngineConfig, largest: int) -> dict[str, Any]:
    """DeepSpeed's config; `largest` is the number of elements of a rank's share of the largest
    parameter, trained or not."""
    zero: dict[str, Any] = {"stage": config.zero_stage}
    place: dict[str, Any] = {"pin_memory": torch.cuda.is_available()}
    if config.nvme_path is not None:
        place["nvme_path"] = str(config.nvme_path)
    if config.offload_optimizer != "none":
        zero["offload_optimizer"] = {"device": config.offload_optimizer, **place}
    if config.offload_parameters != "none":
        device = config.offload_parameters
        zero["offload_param"] = {"device": device, "buffer_size": largest, **place}
    return {
        "train_micro_batch_size_per_gpu": 1,
        # The caller owns the boundary: any number of backward passes, then one step.
        "managed_gradient_accumulation": False,
        "gradient_clipping": config.clip_grad_norm if config.zero_stage else 0.0,
        "bf16": {"enabled": config.precision == "bfloat16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": zero,
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": 0.0,
                "betas": [config.beta1, config.beta2],
                "eps": config.epsilon,
                "torch_adam": True,
                "fused": True,
            },
        },
        "steps_per_print": 1_000_000_000,
    }
