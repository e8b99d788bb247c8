"""What a local cluster is started with, and what a cluster that is joined is not told."""

import os
import shutil
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray._private import services

from cluster import session as module
from cluster.session import LOCAL_ENVIRONMENT, WORKER_ENVIRONMENT, ClusterConfig, session

Calls = list[tuple[dict[str, Any], dict[str, str]]]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Arguments of `ray.init`, and the process's environment at each call."""
    found: Calls = []

    def init(**options: Any) -> Any:
        found.append((options, dict(os.environ)))
        return SimpleNamespace(dashboard_url="here", address_info={"gcs_address": "10.0.0.2:6380"})

    monkeypatch.setattr(os, "environ", {"METRICS_RECORD_INTERVAL_S": "7"})
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr(module, "protect_token", lambda: None)
    return found


def test_a_local_clusters_own_processes_are_quiet_unless_a_user_says_otherwise(
    calls: Calls,
) -> None:
    with session(ClusterConfig(local_cpus=3)) as dashboard:
        assert dashboard == "here"
    options, environment = calls[0]
    assert options["num_cpus"] == 3
    assert options["runtime_env"] == {"env_vars": WORKER_ENVIRONMENT}
    expected = LOCAL_ENVIRONMENT | {"METRICS_RECORD_INTERVAL_S": "7"}
    assert expected.items() <= environment.items()


def test_submitted_jobs_find_their_own_cluster_among_several(
    calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the actor looks it up that starts a job's process."""
    monkeypatch.setattr(services, "find_gcs_addresses", lambda: ["10.0.0.9:1", "10.0.0.2:6380"])
    with session(ClusterConfig()):
        folder = calls[0][0]["_temp_dir"]
        assert services.canonicalize_bootstrap_address_or_die("auto", folder) == "10.0.0.2:6380"
    shutil.rmtree(folder)


def test_a_cluster_that_is_joined_keeps_its_own_ways(calls: Calls) -> None:
    with session(ClusterConfig()):
        pass
    with session(ClusterConfig(address="10.0.0.1:6379")):
        pass
    options, environment = calls[1]
    assert options["address"] == "10.0.0.1:6379"
    assert environment["METRICS_RECORD_INTERVAL_S"] == "7"
    assert not (LOCAL_ENVIRONMENT.keys() - {"METRICS_RECORD_INTERVAL_S"}) & environment.keys()


@pytest.mark.parametrize("fails", [False, True])
def test_a_local_clusters_environment_ends_with_it(
    calls: Calls, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    def refuse(**options: Any) -> Any:
        raise ConnectionError("no")

    if fails:
        monkeypatch.setattr(ray, "init", refuse)
    with pytest.raises(ConnectionError) if fails else nullcontext(), session(ClusterConfig()):
        assert os.environ.keys() > LOCAL_ENVIRONMENT.keys()
    assert not (LOCAL_ENVIRONMENT.keys() - {"METRICS_RECORD_INTERVAL_S"}) & os.environ.keys()
    assert os.environ["METRICS_RECORD_INTERVAL_S"] == "7"
