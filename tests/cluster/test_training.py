"""A group of Ray Train whose worker is killed: started again, exact, and not for ever."""

import json
import os
import random
import re
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
import torch.distributed

from cluster import training
from cluster.checkpoints import Checkpoints
from cluster.engine import Engine, EngineConfig
from cluster.placement import Workers
from cluster.run_directory import RunDirectory, append_json, read_json_lines
from cluster.session import ClusterConfig, session
from tests.cluster.gloo import STEPS, Net, run_group, schedule, train

SENTENCE = "The loss is nan at step 4, rows 3, 7; lower the learning rate."


def loop(root: Path) -> None:
    """Train with a checkpoint per step; die in the third step, once; raise after the last."""
    note(root, "starts")
    engine = Engine(Net(), EngineConfig(zero_stage=2), schedule)
    checkpoints = Checkpoints(root / "state", {})
    checkpoints.load({"net": engine})
    while engine.updates < STEPS:
        step = engine.updates
        losses, norms = train(engine, step, step + 1, split=2)
        note(root, "steps", step=step, loss=losses[0], norm=norms[0])
        if step == 2 and training.rank() == 1 and dies(root):
            note(root, "dies")
            os.kill(os.getpid(), signal.SIGKILL)
        checkpoints.save(engine.updates, {"net": engine}, {})
    checkpoints.close()
    if (root / "killed").exists() and training.rank() == 1:
        raise FloatingPointError(SENTENCE)
    torch.distributed.barrier()


def note(root: Path, what: str, **more: Any) -> None:
    value = {"what": what, "time": time.time(), "pid": os.getpid(), **more}
    append_json(root / f"rank{training.rank()}.jsonl", value)


def notes(root: Path, rank: int, what: str) -> list[dict[str, Any]]:
    return [line for line in read_json_lines(root / f"rank{rank}.jsonl") if line["what"] == what]


def dies(root: Path) -> bool:
    """Whether this is the first time, and death is wanted."""
    wanted = (root / "kill").exists() and not (root / "killed").exists()
    if wanted:
        (root / "killed").touch()
    return wanted


def test_a_killed_worker_s_group_goes_on_exactly_and_a_final_error_is_not_tried_again(
    tmp_path: Path,
) -> None:
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    for root in (unbroken, broken):
        root.mkdir()
    run_group(2, loop, unbroken)
    (broken / "kill").touch()
    run = RunDirectory(broken, "run")
    run.open({})
    with session(ClusterConfig(local_cpus=2)):
        with pytest.raises(FloatingPointError, match=f"^{re.escape(SENTENCE)}$"):
            training.run_workers(loop, broken, Workers(count=2, cpus=0.5), run)
        logs = Path(ray._private.worker._global_node.get_logs_dir_path())
        log = "".join(path.read_text() for path in logs.glob("worker-*.err"))

    expected = {line["step"]: (line["loss"], line["norm"]) for line in notes(unbroken, 0, "steps")}
    assert sorted(expected) == list(range(STEPS))
    found = notes(broken, 0, "steps")
    assert {line["step"] for line in found} == set(expected)
    for line in found:  # also those of steps that were made again
        assert (line["loss"], line["norm"]) == expected[line["step"]]

    starts, (death,) = notes(broken, 1, "starts"), notes(broken, 1, "dies")
    assert len(starts) == 2, "started again after the kill, not after the final error"
    # 5 seconds, nearly all of them imports, on two cores with nothing else to do.
    assert starts[1]["time"] - death["time"] < 15
    obituary = re.search(r"run: worker 1 failed: ActorDiedError: .*", log)
    assert obituary is not None
    assert re.search(rf"actor_id: \w+ pid: {death['pid']} .* ip: \S+", obituary.group())
    failure = json.loads((run.checkpoints / "failure.json").read_text())
    assert failure == {"error": "FloatingPointError", "sentence": SENTENCE}


def draw(path: Path) -> None:
    found = {}
    for seed, step in ((1, 0), (1, 1), (2, 0), (1, 0)):
        training.seed_step(seed, step)
        drawn = (float(torch.rand(1)), float(np.random.rand()), random.random())
        found.setdefault((seed, step), []).append(drawn)
    gathered: list[Any] = [None] * training.world_size()
    torch.distributed.all_gather_object(gathered, found)
    if training.rank() == 0:
        torch.save(gathered, path)


def test_random_numbers_are_a_function_of_seed_step_and_rank(tmp_path: Path) -> None:
    run_group(2, draw, tmp_path / "drawn.pt")
    ranks = torch.load(tmp_path / "drawn.pt")
    for found in ranks:
        first, again = found[1, 0]
        assert first == again
    firsts = [drawn[0] for found in ranks for drawn in found.values()]
    for kind in range(3):
        assert len({drawn[kind] for drawn in firsts}) == 6
