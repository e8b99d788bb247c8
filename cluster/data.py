"""Ray Data: producing rows in parallel and reading them in order."""

import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import ray.data

Row = dict[str, Any]


def stream(parts: int, produce: Callable[[int], Iterable[Row]], cpus: float = 1.0) -> Iterator[Row]:
    """The rows of `produce(0)`, `produce(1)`, … in that order, made by the cluster's workers.

    Parts are made ahead of the reader only as far as Ray Data's memory budget allows.
    """
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    context = ray.data.DataContext.get_current().copy()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    with ray.data.DataContext.current(context):
        numbers = ray.data.range(parts, override_num_blocks=parts)
        rows = numbers.flat_map(_Producer(produce), num_cpus=cpus)
        yield from rows.iter_rows()


class _Producer:
    def __init__(self, produce: Callable[[int], Iterable[Row]]) -> None:
        self._produce = produce

    def __call__(self, row: Row) -> list[Row]:
        return list(self._produce(int(row["id"])))
