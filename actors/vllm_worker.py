"""What runs inside vLLM's workers: weights that can be read, are replaced in place, and are summed
up under the names of Hugging Face's layout.

vLLM imports this module in each worker, for `WorkerExtension`; so the loader and the transfer
engine are known there. It cuts a model over its tensor-parallel workers by heads and by columns of
the feed-forward network, and fuses matrices that read the same input.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import ModelConfig
from vllm.distributed import get_tp_group
from vllm.distributed.weight_transfer import WeightTransferEngine, WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.model_executor.layers.linear import (
    LinearBase,
    RowParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.vocab_parallel_embedding import (
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.platforms import current_platform

from cluster import weights
from cluster.weights import Bucket, Field
from llama2 import checkpoint

FUSED = {
    "q_proj": ("qkv_proj", 0),
    "k_proj": ("qkv_proj", 1),
    "v_proj": ("qkv_proj", 2),
    "gate_proj": ("gate_up_proj", 0),
    "up_proj": ("gate_up_proj", 1),
}
"""The module that holds a matrix, and the matrix's place in it."""


class PlainLinear(UnquantizedLinearMethod):
    """Multiplies with the matrix itself. On a CPU vLLM would keep a packed copy alone, which nobody
    can read."""

    def process_weights_after_loading(self, layer: Any) -> None:
        """Leave the matrix as it is."""
        layer.cpu_linear = nn.functional.linear


class PlainEmbedding(UnquantizedEmbeddingMethod):
    """As `PlainLinear`, for the embedding and the head."""

    def process_weights_after_loading(self, layer: Any) -> None:
        """Leave the matrix as it is."""
        layer.cpu_linear = nn.functional.linear


@register_model_loader("llama2")
class FolderLoader(BaseModelLoader):
    """Reads what `llama2.checkpoint` reads."""

    def download_model(self, model_config: ModelConfig) -> None:
        """Nothing: the folder is here."""

    def load_weights(self, model: Any, model_config: ModelConfig) -> None:
        """Fill the model from its folder."""
        if current_platform.is_cpu():
            for module in model.modules():
                if isinstance(module, LinearBase):
                    module.quant_method = PlainLinear()
                elif isinstance(module, VocabParallelEmbedding):
                    module.quant_method = PlainEmbedding()
        model.load_weights(checkpoint.read_tensors(model_config.model))


@dataclass
class Start(WeightTransferInitInfo):
    """Nothing has to be agreed on."""


@dataclass
class Delivery(WeightTransferUpdateInfo):
    """A part of the weights."""

    bucket: Bucket


class SnapshotTransfer(WeightTransferEngine[Start, Delivery]):
    """Writes published weights over those that the model has, in the same memory, so that compiled
    code and captured graphs go on reading them there."""

    init_info_cls = Start
    update_info_cls = Delivery

    def init_transfer_engine(self, init_info: Start) -> None:
        """Nothing to connect: the weights come with the call."""

    def start_weight_update(self) -> None:
        """Begin to note which weights come."""
        self._missing = {name for name, _ in self.model.named_parameters()}

    def receive_weights(self, update_info: Delivery) -> None:
        """Copy a bucket into the model."""
        self._missing -= self.model.load_weights(update_info.bucket.tensors())

    def finish_weight_update(self) -> None:
        """All weights must have come."""
        assert not self._missing, f"no weights for {self._missing}"

    def shutdown(self) -> None:
        """Nothing to close."""


WeightTransferEngineFactory.register_engine("snapshot", SnapshotTransfer)


class WorkerExtension:
    """What vLLM's worker can do besides."""

    def held_checksum(self, fields: Sequence[Field]) -> str:
        """Checksum of the weights that the model holds, in the order and dtypes of `fields`.

        All workers of a model must be asked; each gives the same answer.
        """
        model = self.model_runner.get_model()  # type: ignore[attr-defined]
        return weights.checksum(
            (field.name, _held(model, field.name).to(field.dtype)) for field in fields
        )


def _held(model: nn.Module, name: str) -> Tensor:
    """The whole of the weight that Hugging Face calls `name`, put together from all workers."""
    path, _, kind = name.rpartition(".")
    parent, _, leaf = path.rpartition(".")
    holder, place = FUSED.get(leaf, (leaf, 0))
    module: Any = model.get_submodule(f"{parent}.{holder}" if parent else holder)
    local: Tensor = getattr(module, kind).detach()
    if leaf in FUSED:
        copies = module.num_kv_head_replicas if leaf in ("k_proj", "v_proj") else 1
        return _joined(local.split(module.output_partition_sizes)[place], 0, copies)
    if isinstance(module, RowParallelLinear) and kind == "weight":
        return _joined(local, 1)
    if isinstance(module, VocabParallelEmbedding):
        # Rows after the vocabulary's end are there to make workers' parts equal.
        return _joined(local, 0)[: module.org_vocab_size]
    return local


def _joined(local: Tensor, dimension: int, copies: int = 1) -> Tensor:
    """This worker's part of a tensor with those of the others, where each part is held by `copies`
    workers, one after another."""
    group = get_tp_group()
    if group.world_size == 1:
        return local
    local = local.contiguous()
    parts = [torch.empty_like(local) for _ in range(group.world_size)]
    torch.distributed.all_gather(parts, local, group=group.device_group)
    return torch.cat(parts[::copies], dim=dimension)
