"""DeepSpeed behind a small interface: the only file that imports it.

An `Engine` owns a module, its ZeRO-sharded optimizer and its learning-rate schedule. Losses are
sums divided by counts of the whole global batch, so gradients are added over ranks and micro-
batches, never averaged, and any split of a batch gives the same update.
"""

import gc
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed
from torch import Tensor, nn


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
    offload_optimizer: bool = False
    """Keep the optimizer state in the host's memory (ZeRO 1 to 3)."""
    offload_parameters: bool = False
    """Keep the sharded weights in the host's memory (ZeRO 3)."""

    def __post_init__(self) -> None:
        if self.offload_parameters and self.zero_stage != 3:
            raise ValueError("offload_parameters needs zero_stage 3; set it, or do not offload.")
        if self.offload_optimizer and self.zero_stage == 0:
            raise ValueError("offload_optimizer needs zero_stage 1, 2 or 3; set one of them.")
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


class Engine:
    """A module under DeepSpeed. All ranks call the same methods in the same order."""

    def __init__(
        self, module: nn.Module, config: EngineConfig, schedule: Callable[[int], float]
    ) -> None:
        """Wrap `module`; `schedule(updates made so far)` gives the learning rate of the next one.

        torch.distributed must be initialised.
        """
        deepspeed = _import_deepspeed()
        self.config, self.schedule = config, schedule
        self.world_size = torch.distributed.get_world_size()
        self._deepspeed = deepspeed
        self._engine, *_ = deepspeed.initialize(
            model=module, model_parameters=_groups(module, config), config=_settings(config)
        )
        self.updates = 0

    @property
    def device(self) -> torch.device:
        return torch.device(self._engine.device)

    @property
    def module(self) -> nn.Module:
        """The wrapped module, as for `Engine.__call__` without gradients."""
        module: nn.Module = self._engine.module
        return module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward pass."""
        return self._engine(*args, **kwargs)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of `loss`, this rank's and micro-batch's part of the global loss."""
        self._engine.backward(loss * self.world_size, scale_wrt_gas=False)  # DeepSpeed averages

    def step(self) -> dict[str, float]:
        """Reduce, clip and apply the gradients. Returns the learning rate and the gradient's
        norm."""
        rate = self.schedule(self.updates)
        for group in self._engine.optimizer.param_groups:
            group["lr"] = rate
        self._engine.step()
        self.updates += 1
        norm = self._engine.get_global_grad_norm()
        # Without ZeRO and in float32 DeepSpeed clips but does not tell the norm.
        return {"lr": rate} if norm is None else {"lr": rate, "grad_norm": float(norm)}

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every weight in full, one at a time, in the same order on all ranks (collective)."""
        for name, parameter in self.module.state_dict(keep_vars=True).items():
            with self._deepspeed.zero.GatheredParameters([parameter], enabled=self._sharded):
                yield name, parameter.detach()

    @property
    def _sharded(self) -> bool:
        return self.config.zero_stage == 3

    def save(self, folder: Path, name: str) -> None:
        """Write this rank's part of weights, optimizer and counters under `folder/name`
        (collective)."""
        self._engine.save_checkpoint(
            str(folder), tag=name, client_state={"updates": self.updates}, save_latest=False
        )

    def load(self, folder: Path, name: str) -> None:
        """Read what `save` wrote, on the same number of ranks (collective)."""
        path, state = self._engine.load_checkpoint(str(folder), tag=name)
        if path is None:
            raise ValueError(
                f"No training state {name!r} in {folder}; remove the folder to restart."
            )
        self.updates = int(state["updates"])

    def close(self) -> None:
        """Free what the engine holds."""
        self._engine.destroy()
        del self._engine
        gc.collect()


def _groups(module: nn.Module, config: EngineConfig) -> list[dict[str, Any]]:
    trainable = [p for p in module.parameters() if p.requires_grad]
    matrices = [p for p in trainable if p.dim() >= 2]
    vectors = [p for p in trainable if p.dim() < 2]
    groups = [(matrices, config.weight_decay), (vectors, 0.0)]
    return [{"params": params, "weight_decay": decay} for params, decay in groups if params]


def _settings(config: EngineConfig) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": config.zero_stage}
    if config.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if config.offload_parameters:
        zero["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return {
        "train_micro_batch_size_per_gpu": 1,
        # The caller owns the boundary: any number of backward passes, then one step.
        "managed_gradient_accumulation": False,
        "gradient_clipping": config.clip_grad_norm,
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
            },
        },
        "steps_per_print": 1_000_000_000,
    }
