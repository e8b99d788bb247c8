"""The learner's side of publishing: weights into the store, and proof that replicas have them."""

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import ray
import xxhash
from ray.exceptions import RayActorError
from ray.serve.exceptions import RayServeException
from torch import Tensor

from cluster import shared_memory
from cluster.shared_memory import Bytes
from cluster.weights import (
    CHUNK,
    POLL,
    Field,
    Receipt,
    Version,
    WeightStore,
    answer,
    offered,
    pack,
    padded,
)


class PublishError(RuntimeError):
    """A replica does not serve the weights that were published."""


def enter(store: "ray.actor.ActorHandle[WeightStore]", timeout: float) -> int:
    """Begin a learner's attempt at publishing; returns its number. Raises as `put` does."""
    return int(answer(store.enter.remote(), "say which attempt this is", timeout))


def put(
    buckets: Iterable[Sequence[tuple[str, Tensor]]],
    number: int,
    attempt: int,
    store: "ray.actor.ActorHandle[WeightStore]",
    timeout: float,
) -> Version:
    """Have the store take weights from this process, which must be an actor that answers calls.

    buckets: named tensors, which stay as they are until the next bucket but one is drawn. Raises
    `Fenced` where a later attempt has begun, `TimeoutError` where the store does not answer.
    """
    context = ray.get_runtime_context()
    begun = store.begin.remote(attempt, number, context.current_actor, context.get_node_id())
    segment = answer(begun, "begin", timeout)
    digest = xxhash.xxh3_128()
    if segment is None:
        fields = _offer(buckets, digest, attempt, store, timeout)
    else:
        fields = _write(buckets, digest, shared_memory.attach(segment, writable=True))
    version = Version(number, digest.hexdigest())
    answer(store.finish.remote(attempt, version, tuple(fields)), "finish", timeout)
    return version


def _write(
    buckets: Iterable[Sequence[tuple[str, Tensor]]], digest: Any, memory: Bytes
) -> list[Field]:
    """Into memory, weight after weight; each piece is summed up while it is in the cache."""
    fields: list[Field] = []
    start = 0
    for bucket in map(pack, buckets):
        for field, part in zip(bucket.fields, bucket.parts, strict=True):
            digest.update(field.name.encode())
            for first in range(0, len(part), CHUNK):
                chunk = part[first : first + CHUNK]
                np.copyto(memory[start + first : start + first + len(chunk)], chunk)
                digest.update(chunk.data)
            start += padded(field.size)
            fields.append(field)
    return fields


def _offer(
    buckets: Iterable[Sequence[tuple[str, Tensor]]],
    digest: Any,
    attempt: int,
    store: "ray.actor.ActorHandle[WeightStore]",
    timeout: float,
) -> list[Field]:
    """As objects. While one is being written, it is summed up here and the next one is drawn."""
    fields: list[Field] = []
    calls: list[Any] = []
    try:
        for place, bucket in enumerate(map(pack, buckets)):
            offered[place] = bucket
            calls.append(store.take.remote(attempt, place))
            for field, part in zip(bucket.fields, bucket.parts, strict=True):
                digest.update(field.name.encode())
                digest.update(part.data)
            fields += bucket.fields
            if place:
                _written(calls[place - 1], place - 1, timeout)
        if calls:
            _written(calls[-1], len(calls) - 1, timeout)
    finally:
        offered.clear()
    return fields


def _written(call: Any, place: int, timeout: float) -> None:
    """Wait until a bucket lies in shared memory."""
    references = answer(call, f"ask for bucket {place}", timeout)
    # Not fetched, which would copy it where the store's node is another one.
    ready, _ = ray.wait(references, timeout=timeout, fetch_local=False)
    if not ready:
        raise TimeoutError(f"Bucket {place} of the weights was not written within {timeout:g} s.")
    del offered[place]


def confirm(
    version: Version,
    refresh: Callable[[float], Sequence[Receipt | Exception]],
    store: "ray.actor.ActorHandle[WeightStore]",
    replicas: int,
    timeout: float,
) -> list[Receipt]:
    """Have every replica load the newest weights, and check what they hold.

    refresh: asks all live replicas to do so; returns each one's receipt, or its error, within as
    many seconds as it is given. Where one dies, all are asked again, so that the one in its place
    is reached. Raises `PublishError` where, after `timeout` seconds, fewer than `replicas` have
    answered or one of them has not, and at once where one holds other weights or cannot load them.
    """
    deadline = time.monotonic() + timeout
    while True:
        answers = refresh(max(POLL, deadline - time.monotonic()))
        receipts = [found for found in answers if isinstance(found, Receipt)]
        for receipt in receipts:
            if receipt.version != version:
                raise PublishError(
                    f"Generator {receipt.replica} serves {receipt.version}, not {version}."
                )
        if len(receipts) == len(answers) >= replicas:
            return receipts
        for error in answers:
            if not isinstance(error, Receipt | RayActorError | TimeoutError | RayServeException):
                raise PublishError(f"A generator cannot load weights {version.number}.") from error
        if time.monotonic() + 10 * POLL > deadline:
            break
        time.sleep(10 * POLL)
    named = {receipt.replica for receipt in receipts}
    asked = answer(store.askers.remote(), "say who asked for weights", timeout)
    silent = [name for name in sorted(asked) if not name.endswith(tuple(named))]
    raise PublishError(
        f"Only {len(receipts)} of {max(replicas, len(answers))} generators took weights "
        f"{version.number} within {timeout:g} s ({', '.join(sorted(named)) or 'none'}); "
        f"no answer came from {', '.join(silent) or 'the others, which never asked for weights'}."
    )
