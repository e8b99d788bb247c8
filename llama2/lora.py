"""Low-rank adaptation (LoRA; Hu et al. 2021): frozen matrices, each with a small trainable update.

A target computes W x + (alpha / rank) B A x, where only A and B are trained. A scalar model's head
is trained too, since it starts from nothing. Adapters are exchanged in the layout of PEFT.
Shapes: I inputs, O outputs, R rank.
"""

import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from llama2.checkpoint_config import read_json
from llama2.hugging_face_checkpoint import save_tensors
from llama2.model import ScalarModel

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
A, B, HEAD = "lora_A", "lora_B", "score.weight"
CONFIG, WEIGHTS, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."
# Fields of PEFT's config that change what is computed without a trace in the tensors' shapes.
UNSUPPORTED = ("use_rslora", "use_dora", "alpha_pattern", "alora_invocation_tokens", "bias")


@dataclass(frozen=True)
class LoraConfig:
    """Which matrices get an update, and of what rank. Raises `ValueError` for nonsense."""

    rank: int = 0
    """Rank of the updates; 0 trains all weights instead."""
    alpha: float = 16.0
    """Updates are multiplied by alpha / rank."""
    dropout: float = 0.0
    """Part of the inputs that an update does not see in training."""
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    """Matrices that get an update, of q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj,
    down_proj."""

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise ValueError(f"LoRA's rank is {self.rank}; give 0 to do without it, or more.")
        if not (self.alpha > 0 and math.isfinite(self.alpha)):
            raise ValueError(f"LoRA's alpha is {self.alpha}; give a positive number.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"LoRA's dropout is {self.dropout}; give 0 or more, below 1.")
        for name in self.targets:
            if name not in TARGETS:
                raise ValueError(
                    f"LoRA's target {name!r} is unknown; take of {', '.join(TARGETS)}."
                )
        if not self.targets or len(set(self.targets)) < len(self.targets):
            raise ValueError(
                f"LoRA's targets are {list(self.targets)}; name at least one, each once."
            )

    @property
    def scale(self) -> float:
        """What B A is multiplied by."""
        return self.alpha / self.rank


class LoraLinear(nn.Linear):
    """A frozen linear layer with a trainable update of low rank.

    A is drawn as PEFT and the paper's published code do, uniformly within 1 / sqrt(inputs); B is
    zero, so that training starts from the layer as it was.
    """

    def __init__(self, linear: nn.Linear, config: LoraConfig, generator: torch.Generator) -> None:
        # Not Linear's own: it would allocate and draw a second matrix.
        super(nn.Linear, self).__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.scale, self.dropout = config.scale, config.dropout
        bound = self.in_features**-0.5
        a_RI = torch.empty(config.rank, self.in_features).uniform_(
            -bound, bound, generator=generator
        )
        # The update is made at once even where the matrix itself is still to come.
        like = a_RI if self.weight.is_meta else self.weight
        self.lora_A = nn.Parameter(a_RI.to(like))
        self.lora_B = nn.Parameter(like.new_zeros(self.out_features, config.rank))

    def forward(self, x: Tensor) -> Tensor:
        low = F.linear(F.dropout(x, self.dropout, self.training), self.lora_A)
        # Scaled where it is narrow.
        return F.linear(x, self.weight, self.bias) + F.linear(low * self.scale, self.lora_B)


def apply_lora(model: nn.Module, config: LoraConfig, seed: int) -> None:
    """Give every target in `model` an update and freeze all else but a scalar model's head.

    In place. The output is unchanged until the first training step. Weights, on whatever device,
    follow from `seed` and the model's shape; on the meta device the updates alone are real.
    """
    assert config.rank > 0, "rank 0 means that there is no LoRA"
    generator = torch.Generator().manual_seed(seed)
    model.requires_grad_(False)
    parents = [(parent, name) for parent in model.modules() for name, _ in parent.named_children()]
    found = set()
    for parent, name in parents:
        linear = getattr(parent, name)
        if name in config.targets:
            assert not isinstance(linear, LoraLinear), f"{name} has an update already"
            setattr(parent, name, LoraLinear(linear, config, generator))
            found.add(name)
    assert found == set(config.targets), f"the model has no {set(config.targets) - found}"
    if isinstance(model, ScalarModel):
        model.score.requires_grad_(True)


def merged_weights(
    named: Iterable[tuple[str, Tensor]], config: LoraConfig
) -> Iterator[tuple[str, Tensor]]:
    """Weights of a plain model that computes the same: W + (alpha / rank) B A for W, A and B.

    `named` gives names and tensors in the order of `state_dict`; so does the result, with Hugging
    Face's names. Sums are made in float32 and rounded once to the weight's dtype. One target is
    held back at a time, in a copy, and no tensor that came in is changed.
    """
    held: dict[str, Tensor] = {}  # a target's weight, perhaps its bias, and A
    for name, tensor in named:
        module, _, kind = name.rpartition(".")
        if module.rpartition(".")[2] not in config.targets:
            assert not held, f"{next(iter(held))} has no adapter"
            yield name, tensor
        elif kind != B:
            # A copy: sharded weights are let go of once the next one is asked for.
            held[name] = tensor.detach().clone()
        else:
            a_RI, weight_OI = held.pop(f"{module}.{A}"), held[f"{module}.weight"]
            held[f"{module}.weight"] = torch.addmm(
                weight_OI.float(), tensor.detach().float(), a_RI.float(), alpha=config.scale
            ).to(weight_OI.dtype)
            yield from held.items()
            held.clear()
    assert not held, f"{next(iter(held))} has no adapter"


def adapter_weights(named: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Those of the weights that are trained under LoRA: the updates, and a scalar model's head."""
    for name, tensor in named:
        if name.endswith((f".{A}", f".{B}")) or name == HEAD:
            yield name, tensor


def save_adapter(
    named: Iterable[tuple[str, Tensor]], config: LoraConfig, folder: str | Path, base: str
) -> None:
    """Write what is trained, of all weights that `named` gives, as PEFT writes an adapter.

    `base` is the name or folder of the model that the adapter belongs to. The config comes last: a
    crash leaves the old adapter, the new one, or no `adapter_config.json`.
    """
    folder = Path(folder)
    tensors = {
        PREFIX + (name if name == HEAD else f"{name}.weight"): tensor.detach().cpu().clone()
        for name, tensor in adapter_weights(named)
    }
    scalar = PREFIX + HEAD in tensors
    fields = {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if scalar else "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": list(config.targets),
        "modules_to_save": ["score"] if scalar else None,
        "bias": "none",
        "inference_mode": True,
    }
    folder.mkdir(parents=True, exist_ok=True)
    staged = folder / f".{CONFIG}"
    staged.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
    (folder / CONFIG).unlink(missing_ok=True)
    save_tensors(tensors, folder / WEIGHTS)
    shutil.copymode(staged, folder / WEIGHTS)  # else no other user may read it
    os.replace(staged, folder / CONFIG)


def load_adapter(model: nn.Module, folder: str | Path) -> LoraConfig:
    """Apply the adapter in a folder that `save_adapter` or PEFT wrote to a plain model, in place.

    Returns its config, as for `merged_weights`. Raises `FileNotFoundError` where a file is missing
    and `ValueError` where the adapter is of another kind or does not fit the model, which is then
    of no further use.
    """
    folder = Path(folder)
    config = _read_config(folder)
    tensors = _read_tensors(folder / WEIGHTS)
    apply_lora(model, config, seed=0)
    wanted = dict(adapter_weights(model.named_parameters()))
    for name in sorted({*wanted, *tensors}):
        found, place = (list(t[name].shape) if name in t else None for t in (tensors, wanted))
        if found != place:
            raise ValueError(
                f"{folder / WEIGHTS}: {name} is {found or 'absent'} where the model has "
                f"{place or 'no place for it'}; use the adapter of this model."
            )
    with torch.no_grad():
        for name, parameter in wanted.items():
            parameter.copy_(tensors[name])
    return config


def _read_config(folder: Path) -> LoraConfig:
    path = folder / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no {CONFIG}; give the folder of a LoRA adapter.")
    fields = read_json(path)
    if fields.get("peft_type") != "LORA":
        raise ValueError(f"{path} is of a {fields.get('peft_type')}, not LORA; use a LoRA adapter.")
    for name in UNSUPPORTED:
        if fields.get(name) not in (None, False, "none", {}, []):
            raise ValueError(f"{path} sets {name}, which is not supported; use a plain adapter.")
    rank, targets = fields.get("r"), fields.get("target_modules")
    if not isinstance(rank, int) or rank < 1:
        raise ValueError(f"{path}: r is {rank!r}; it must be a whole number of at least 1.")
    if not isinstance(targets, list):
        raise ValueError(f"{path}: target_modules is {targets!r}; give a list of names.")
    try:
        # PEFT keeps the names in a set and writes them in any order.
        return LoraConfig(
            rank,
            float(fields.get("lora_alpha", 8)),
            float(fields.get("lora_dropout", 0)),
            tuple(sorted(map(str, targets))),
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """The adapter's tensors by the names that our parameters have."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is absent; convert the adapter to safetensors.")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is truncated or corrupt ({error}); write it again.") from error
    names = {name: name.removeprefix(PREFIX) for name in tensors}
    return {
        (name if name == HEAD else name.removesuffix(".weight")): tensors[full]
        for full, name in names.items()
    }
