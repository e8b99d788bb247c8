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
