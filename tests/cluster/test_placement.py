"""What roles ask for, against what the cluster has."""

from typing import Any

import pytest
import ray

from cluster.placement import Workers, check_capacity


def nodes(*resources: dict[str, float]) -> list[dict[str, Any]]:
    return [{"Alive": True, "Resources": found} for found in resources]


def test_more_workers_than_the_cluster_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    dead = {"Alive": False, "Resources": {"CPU": 64.0, "GPU": 8.0}}
    monkeypatch.setattr(ray, "nodes", lambda: [*nodes({"CPU": 2.0}), dead])
    check_capacity({"learner": Workers(count=2, cpus=0.5), "generator": Workers(cpus=1.0)})
    with pytest.raises(ValueError, match=r"ask for 2.5 cpus \(learner 1.5, generator 1\) .* has 2"):
        check_capacity({"learner": Workers(count=3, cpus=0.5), "generator": Workers(cpus=1.0)})
    with pytest.raises(ValueError, match=r"ask for 1 gpus \(learner 1\) and the cluster has 0"):
        check_capacity({"learner": Workers(gpus=1.0)})


def test_a_worker_larger_than_any_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "nodes", lambda: nodes({"CPU": 2.0}, {"CPU": 2.0}))
    check_capacity({"learner": Workers(count=2, cpus=2.0)})
    with pytest.raises(ValueError, match="Each learner worker asks for 3 cpus and no node has mor"):
        check_capacity({"learner": Workers(cpus=3.0)})


def test_workers_that_would_have_to_be_parted(monkeypatch: pytest.MonkeyPatch) -> None:
    wide, narrow = {"CPU": 4.0, "GPU": 1.0}, {"CPU": 2.0, "GPU": 3.0}
    monkeypatch.setattr(ray, "nodes", lambda: nodes(wide, narrow))
    check_capacity({"learner": Workers(count=2, cpus=2.0, gpus=1.0)})
    check_capacity({"learner": Workers(count=30, cpus=0.1, gpus=0.1)})
    check_capacity({"learner": Workers(count=99, cpus=0.0)})
    for count, cpus, gpus, fitting in ((3, 1.5, 0.0, 3), (3, 2.0, 1.0, 2), (2, 1.0, 2.0, 1)):
        asked = {"learner": Workers(count=count, cpus=cpus, gpus=gpus)}
        if fitting == count:
            check_capacity(asked)
        else:
            with pytest.raises(ValueError, match=f"Only {fitting} of {count} learner workers fit"):
                check_capacity(asked)
