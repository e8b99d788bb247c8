"""Published weights: one flat buffer with a version and a checksum, kept by an actor that outlives
the worker that published them."""

import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import torch
import xxhash
from torch import Tensor, nn


@dataclass(frozen=True)
class Version:
    """Which weights: how many updates made them, and the checksum of their bytes."""

    number: int
    checksum: str


@dataclass(frozen=True)
class Field:
    """Where a tensor lies in the buffer."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Snapshot:
    """All weights of a model as bytes; read without a copy where they lie in shared memory."""

    version: Version
    fields: tuple[Field, ...]
    buffer: np.ndarray[Any, Any]

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Names and read-only views."""
        for field in self.fields:
            with warnings.catch_warnings():
                # Shared memory is read-only, which torch cannot express; nobody writes to a view.
                warnings.filterwarnings("ignore", message="The given buffer is not writable")
                data = torch.frombuffer(self.buffer[field.start : field.end], dtype=field.dtype)
            yield field.name, data.view(field.shape)


def _bytes(tensor: Tensor) -> Any:
    flat = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
    return flat.numpy()


def checksum(weights: Iterable[tuple[str, Tensor]]) -> str:
    """xxh3-128 over names and bytes, in order."""
    digest = xxhash.xxh3_128()
    for name, tensor in weights:
        digest.update(name.encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def snapshot(weights: Iterable[tuple[str, Tensor]], number: int) -> Snapshot:
    """Copy weights into one buffer, tensor by tensor, and sum them up on the way."""
    digest, fields, parts, start = xxhash.xxh3_128(), [], [], 0
    for name, tensor in weights:
        # The engine reuses its buffers, and `cpu()` of a CPU tensor is no copy.
        data = _bytes(tensor).copy()
        digest.update(name.encode())
        digest.update(data)
        fields.append(Field(name, tensor.dtype, tuple(tensor.shape), start, start + len(data)))
        parts.append(data)
        start += len(data)
    version = Version(number, digest.hexdigest())
    return Snapshot(version, tuple(fields), np.concatenate(parts))


def load(module: nn.Module, source: Snapshot) -> Version:
    """Copy a snapshot into `module` and return what the module now holds, summed up afresh."""
    state = module.state_dict()
    with torch.no_grad():
        for name, tensor in source.tensors():
            state[name].copy_(tensor)
    wanted = [(field.name, state[field.name].to(field.dtype)) for field in source.fields]
    return Version(source.version.number, checksum(wanted))


@dataclass(frozen=True)
class Receipt:
    """A replica's word on the weights that it now serves."""

    replica: str
    version: Version


class PublishError(RuntimeError):
    """A replica does not serve the weights that were published."""


@ray.remote(num_cpus=0, max_restarts=0)
class WeightStore:
    """Keeps the newest weights for whoever starts late or again."""

    def __init__(self) -> None:
        self._latest: list[ray.ObjectRef] = []

    def put(self, source: Snapshot) -> Version:
        """Keep a snapshot, in place of the one before."""
        self._latest = [ray.put(source)]
        return source.version

    def latest(self) -> list[ray.ObjectRef]:
        """A list with the reference of the newest snapshot; empty before the first."""
        return self._latest


def publish(
    source: Snapshot,
    store: "ray.actor.ActorHandle[WeightStore]",
    broadcast: Callable[[], list[Receipt]],
    replicas: int,
    timeout: float,
) -> list[Receipt]:
    """Put a snapshot into the store, have every replica load it, and check what they hold.

    broadcast: asks all live replicas to load the newest snapshot. Raises `PublishError` where fewer
    than `replicas` answer or one of them holds other weights, `TimeoutError` from Ray where the
    store does not answer within `timeout` seconds.
    """
    ray.get(store.put.remote(source), timeout=timeout)
    receipts = broadcast()
    wrong = [receipt for receipt in receipts if receipt.version != source.version]
    if wrong:
        raise PublishError(
            f"Generator {wrong[0].replica} serves {wrong[0].version}, not {source.version}."
        )
    if len(receipts) < replicas:
        named = ", ".join(receipt.replica for receipt in receipts) or "none"
        raise PublishError(
            f"Only {len(receipts)} of {replicas} generators took weights {source.version.number} "
            f"({named})."
        )
    return receipts
