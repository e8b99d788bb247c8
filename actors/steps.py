"""One global batch on one worker: a gradient step, or an evaluation. All methods are collective.

Rows are dealt by their lengths alone, so that every worker knows the whole plan without asking. All
make equally many forward and backward passes, as sharded weights are gathered by all together.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed
from torch import Tensor

from actors.objectives import Objective
from cluster import training
from cluster.engine import Engine
from llama2.packing import deal

NAMED_ROWS = 20


class BadBatch(FloatingPointError):
    """The loss or the gradient of a global batch is not finite. All workers raise it alike, before
    the weights have changed."""

    def __init__(self, what: str, rows: Sequence[int]) -> None:
        self.what, self.rows = what, sorted(rows)
        super().__init__(f"{what}, in {self.where}")

    @property
    def where(self) -> str:
        """The rows, cut short where they are many."""
        named = ", ".join(str(row) for row in self.rows[:NAMED_ROWS])
        rest = len(self.rows) - NAMED_ROWS
        more = f" and {rest} more" if rest > 0 else ""
        return f"row{'s' * (len(self.rows) > 1)} {named}{more}"


@dataclass(frozen=True)
class MicroBatches:
    """How a batch is laid over workers and passes."""

    tokens: int
    """Padded tokens whose activations a worker holds at a time."""
    sequence_parallel: int = 1
    """Workers that share one row."""

    def of(self, objective: Objective, rows: Sequence[int]) -> list[list[int]]:
        """This worker's rows by pass; a pass may be empty."""
        degree = self.sequence_parallel
        shares = training.world_size() // degree
        dealt = deal(objective.lengths(rows), shares, self.tokens * degree)
        return [[rows[i] for i in micro] for micro in dealt[training.rank() // degree]]


def update(
    engine: Engine, objective: Objective, rows: Sequence[int], layout: MicroBatches
) -> dict[str, float]:
    """One gradient step on `rows`. Returns the loss, the rate, the gradient's norm and the speed.

    Raises `BadBatch` where loss or gradient is not finite; the weights are as before, no gradient
    is left, and the engine's number of updates is that of a step made.
    """
    started = time.perf_counter()
    total = objective.total(rows)
    micros = layout.of(objective, rows)
    losses_M = _backward(engine, objective, rows, micros, total)
    loss = float(training.all_reduce(losses_M.sum()))
    if not math.isfinite(loss):
        engine.discard()
        engine.updates += 1
        bad = [row for micro, x in zip(micros, losses_M.isfinite().tolist(), strict=True)
               if not x for row in micro]  # fmt: skip
        raise BadBatch(f"the loss is {loss}", _gather(bad) or rows)
    metrics = engine.step()
    norm = metrics.get("grad_norm", 0.0)
    if not math.isfinite(norm):  # the engine has left the weights as they were
        bad = _rows_without_gradient(engine, objective, rows, micros, total)
        raise BadBatch(f"the gradient's norm is {norm}", _gather(bad) or rows)
    speed = {"targets_per_second": total / (time.perf_counter() - started)}
    return {"loss": loss, **speed, **metrics}


def _backward(
    engine: Engine,
    objective: Objective,
    rows: Sequence[int],
    micros: Sequence[Sequence[int]],
    total: int,
) -> Tensor:
    losses = []
    for micro in micros:
        if micro:
            loss = objective.loss(engine, micro, total)
        else:
            loss = 0.0 * objective.loss(engine, _shortest(objective, rows), total)
        engine.backward(loss)
        losses.append(loss.detach())
    return torch.stack(losses)


def _shortest(objective: Objective, rows: Sequence[int]) -> list[int]:
    """What a worker computes, in vain, to keep step with the others in an empty pass."""
    lengths = objective.lengths(rows)
    return [rows[lengths.index(min(lengths))]]


def _rows_without_gradient(
    engine: Engine,
    objective: Objective,
    rows: Sequence[int],
    micros: Sequence[Sequence[int]],
    total: int,
) -> list[int]:
    """This worker's rows in passes whose own gradient is not finite, each pass done again."""
    broken = torch.zeros((), dtype=torch.bool, device=engine.device)

    def look(gradient: Tensor) -> None:
        broken.logical_or_(~gradient.isfinite().all())

    trainable = [parameter for parameter in engine.module.parameters() if parameter.requires_grad]
    hooks = [parameter.register_hook(look) for parameter in trainable]
    bad: list[int] = []
    for micro in micros:
        broken.zero_()
        _backward(engine, objective, rows, [micro], total)
        bad += micro if broken else []
    for hook in hooks:
        hook.remove()
    engine.discard()
    return bad


def _gather(rows: list[int]) -> list[int]:
    """All workers' rows together."""
    found: list[list[int]] = [[] for _ in range(training.world_size())]
    torch.distributed.all_gather_object(found, rows)
    return sorted({row for part in found for row in part})


@torch.no_grad()
def evaluate(
    engine: Engine, objective: Objective, rows: Sequence[int], layout: MicroBatches
) -> dict[str, float]:
    """Means over held-out `rows`, the same on all workers."""
    engine.module.eval()
    sums: dict[str, float] = {}
    for micro in layout.of(objective, rows):
        found = objective.measure(engine, micro or _shortest(objective, rows))
        for name, value in found.items():
            sums[name] = sums.get(name, 0.0) + (value if micro else 0.0)
    engine.module.train()
    summed = torch.tensor(list(sums.values()), dtype=torch.float64, device=engine.device)
    means = dict(zip(sums, training.all_reduce(summed).tolist(), strict=True))
    terms = means.pop("count")
    return {f"eval/{name}": value / terms for name, value in means.items()}
