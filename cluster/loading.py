"""A replica's side of publishing: the newest weights from the store into a model."""

import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import ray
import torch
import xxhash
from torch import Tensor, nn

from cluster import shared_memory
from cluster.shared_memory import Gone, Lease
from cluster.weights import (
    CHUNK,
    POLL,
    Bucket,
    Field,
    Shelf,
    Snapshot,
    Version,
    WeightStore,
    answer,
    as_bytes,
    as_tensor,
    checksum,
    places,
)


def fetch(
    store: "ray.actor.ActorHandle[WeightStore]",
    timeout: float = 60.0,
    unless: Version | None = None,
) -> Snapshot | None:
    """The newest weights; None before the first publication, and where they are version `unless`.

    Waits for a publication that is under way. Raises `TimeoutError` where all this takes longer
    than `timeout` seconds.
    """
    deadline = time.monotonic() + timeout
    node = ray.get_runtime_context().get_node_id()
    while True:
        shelf: Shelf = answer(store.latest.remote(_name(), node), "show its weights", timeout)
        if shelf.underway is None:
            if shelf.version is None or shelf.version == unless:
                return None
            try:
                return _taken(shelf, shelf.version, timeout)
            except Gone:  # others have been published since the store answered, or are about to be
                pass
        if time.monotonic() > deadline:
            number = shelf.underway if shelf.version is None else shelf.version.number
            raise TimeoutError(
                f"Weights {number} are still being published after {timeout:g} s; look for "
                "a worker of the learner that died or hangs."
            )
        time.sleep(POLL)


def _taken(shelf: Shelf, version: Version, timeout: float) -> Snapshot:
    if shelf.segment is None:
        shared_memory.forget_closed()
        return Snapshot(
            version, tuple(answer(list(shelf.buckets), "hand out its weights", timeout))
        )
    lease = Lease(shelf.segment)
    parts = tuple(lease.memory[place] for place in places(shelf.fields))
    return Snapshot(version, (Bucket(shelf.fields, parts),), lease)


def _name() -> str:
    """What messages call this process."""
    context = ray.get_runtime_context()
    actor = context.get_actor_id()
    return (context.get_actor_name() or actor) if actor else context.get_worker_id()


class Loader:
    """Gives a module one snapshot after another.

    What lies in the node's shared memory is not copied into a module on a CPU that has the same
    dtypes: it becomes the module's own storage, which nobody may write to but this, the module's
    only loader.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._lease: Lease | None = None
        """Of the module's storage, where it is shared memory."""

    @torch.no_grad()
    def load(self, source: Snapshot) -> Version:
        """Load a snapshot and return what the module now holds, summed up afresh.

        Weights that are rounded on the way give another version than the snapshot's. The snapshot
        must have every weight of the module, tied ones once, and no others.
        """
        state = self._module.state_dict(keep_vars=True)
        fields = [field for bucket in source.buckets for field in bucket.fields]
        _check_names(state, fields)
        alike = all(state[f.name].dtype == f.dtype and state[f.name].is_cpu for f in fields)
        if source.lease is not None and alike:
            for name, tensor in _views(source.lease, fields):
                state[name].data = tensor
            self._lease = source.lease
            found = checksum((field.name, state[field.name]) for field in fields)
            return Version(source.version.number, found)
        if self._lease is not None:
            for tensor in state.values():
                tensor.data = torch.empty_like(tensor)
            self._lease = None
        digest = xxhash.xxh3_128()
        for name, tensor in source.tensors():
            digest.update(name.encode())
            _copy(state[name], tensor, digest)
        return Version(source.version.number, digest.hexdigest())


def _check_names(state: dict[str, Tensor], fields: Sequence[Field]) -> None:
    for field in fields:
        assert field.name in state, f"the module has no weight {field.name}"
        shape = tuple(state[field.name].shape)
        assert shape == field.shape, f"{field.name} is {shape}, not {field.shape}"
    filled = [field.name for field in fields if field.size]
    # Were two of them one tensor here, the second would overwrite the first, which is summed up.
    held = {state[name].data_ptr() for name in filled}
    assert len(held) == len(filled), "tied, but not there"
    missing = [name for name, tensor in state.items() if tensor.data_ptr() not in held]
    assert not any(state[name].numel() for name in missing), f"no weights for {missing}"


def _views(lease: Lease, fields: Sequence[Field]) -> Iterator[tuple[str, Tensor]]:
    """All in one storage, in which weights that are used together may lie side by side."""
    memory = as_tensor(lease.memory)
    for field, place in zip(fields, places(fields), strict=True):
        yield field.name, memory[place].view(field.dtype).view(field.shape)


def _copy(target: Tensor, source: Tensor, digest: Any) -> None:
    """Copy, and add to the digest what `target` then holds."""
    if target.device.type != "cpu" or target.dtype != source.dtype or not target.is_contiguous():
        target.copy_(source)
        digest.update(as_bytes(target.to(source.dtype)).data)
        return
    there, here = as_bytes(target), as_bytes(source)
    for start in range(0, len(here), CHUNK):
        chunk = there[start : start + CHUNK]
        np.copyto(chunk, here[start : start + CHUNK])
        digest.update(chunk.data)
