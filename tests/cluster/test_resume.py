"""State comes back to the bit, and in a group of another size or ZeRO stage."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed

from cluster.checkpoints import Checkpoints
from tests.cluster.gloo import (
    STEPS,
    Case,
    changed_net,
    differences,
    engine_of,
    run_group,
    train,
    whole_state,
)

CASES: list[Case] = [
    ("float32", 0, "none"),
    ("float32", 1, "none"),
    ("float32", 2, "none"),
    ("float32", 3, "none"),
    ("bfloat16", 1, "none"),
    ("bfloat16", 2, "none"),
    ("bfloat16", 3, "none"),
    ("float32", 3, "cpu"),
]
# Written by a group of one number of workers under one case, read by another.
ACROSS_WORKERS = [(case, case) for case in CASES]
ACROSS_STAGES = [(CASES[a], CASES[b]) for a, b in ((0, 3), (1, 3), (2, 1), (3, 0), (3, 2), (7, 1))]


def name_of(case: Case) -> str:
    return "-".join(map(str, case))


def write_all(root: Path) -> None:
    """Save at step 3 under every case, and say how training went on."""
    world = torch.distributed.get_world_size()
    found: dict[Case, Any] = {}
    for case in CASES:
        engine = engine_of(case)
        train(engine, 0, 3, split=2)
        checkpoints = Checkpoints(root / f"{world}-{name_of(case)}", {})
        checkpoints.save(3, {"net": engine}, {"tokens": 24, "rank": torch.distributed.get_rank()})
        state = whole_state(engine)
        after = train(engine, 3, STEPS, split=3)
        checkpoints.close()
        found[case] = (state, after, whole_state(engine))
        engine.close()
    if torch.distributed.get_rank() == 0:
        torch.save(found, root / f"written-{world}.pt")


def read_all(root: Path) -> None:
    """Go on from the checkpoints of both groups."""
    world = torch.distributed.get_world_size()
    pairs = [(world, case, case) for case in CASES]
    pairs += [(3 - world, *pair) for pair in ACROSS_WORKERS + ACROSS_STAGES]
    found = {}
    for writers, written, case in pairs:
        engine = engine_of(case, changed_net())
        checkpoints = Checkpoints(root / f"{writers}-{name_of(written)}", {})
        checkpoint = checkpoints.load({"net": engine})
        state = whole_state(engine)
        after = train(engine, 3, STEPS, split=3)
        found[writers, written, case] = (checkpoint, state, after, whole_state(engine))
        checkpoints.close()
        engine.close()
    if torch.distributed.get_rank() == 0:
        torch.save(found, root / f"read-{world}.pt")


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("checkpoints")
    for function in (write_all, read_all):
        for world in (1, 2):
            run_group(world, function, root)
    return {
        f"{kind}-{world}": torch.load(root / f"{kind}-{world}.pt", weights_only=False)
        for kind in ("written", "read")
        for world in (1, 2)
    }


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("world", [1, 2])
def test_resume_is_exact_to_the_bit(resumed: dict[str, Any], world: int, case: Case) -> None:
    state, after, end = resumed[f"written-{world}"][case]
    checkpoint, loaded, again, end_again = resumed[f"read-{world}"][world, case, case]
    assert differences(loaded, state) == []
    assert again == after
    assert differences(end_again, end) == []
    assert (checkpoint.step, checkpoint.extra) == (3, {"tokens": 24, "rank": 0})


@pytest.mark.parametrize("pair", ACROSS_WORKERS + ACROSS_STAGES)
@pytest.mark.parametrize("world", [1, 2])
def test_state_is_read_by_another_number_of_workers_and_stage(
    resumed: dict[str, Any], world: int, pair: tuple[Case, Case]
) -> None:
    written, case = pair
    state, (losses, norms), end = resumed[f"written-{3 - world}"][written]
    _, loaded, again, end_again = resumed[f"read-{world}"][3 - world, written, case]
    # What is read is what was written; only sums over ranks round otherwise.
    assert differences(loaded, state) == []
    tolerance = 2e-6 if case[0] == "float32" else 0.02
    assert again[0] == pytest.approx(losses, abs=tolerance)
    assert again[1] == pytest.approx(norms, rel=5 * tolerance)
    for key, tensor in end.items():
        torch.testing.assert_close(end_again[key], tensor, atol=5 * tolerance, rtol=0)
