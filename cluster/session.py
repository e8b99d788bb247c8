"""Connecting to Ray: an existing cluster where there is one, else a local one for this process."""

import contextlib
import os
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

# Set before a worker starts: glibc hands every large tensor back to the kernel and page-faults it
# in again (up to 2.8 times slower training); with these it keeps the memory, in huge pages.
WORKER_ENVIRONMENT = {
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    # Ray Train's loop runs in a thread, whose own arena would hold no large tensor.
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 32),
    "MALLOC_TOP_PAD_": str(1 << 26),
    # Seconds after which Ray Train looks after its workers again, and so notices a dead one.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    # A worker's lines would else be shown twice.
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONWARNINGS": "ignore::FutureWarning",
}

# On a local cluster Ray's own processes share the work's CPUs: whenever one of them wakes up, a
# thread of the work stops, and with it the others of its operation. So they look around less often
# than Ray lets them on a cluster, collect no metrics, and start no worker before it is asked for.
# What a user has set stays. It counts for the processes that Ray starts, not for the job's own.
LOCAL_ENVIRONMENT = {
    "METRICS_RECORD_INTERVAL_S": "60",
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",
    "RAY_SERVE_METRICS_EXPORT_INTERVAL_MS": "10000",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # nobody takes this machine away
    "RAY_enable_metrics_collection": "0",
    "RAY_enable_worker_prestart": "0",
    "RAY_prestart_worker_first_driver": "0",
    "RAY_task_events_report_interval_ms": "10000",
    "REPORTER_UPDATE_INTERVAL_MS": "30000",
}


@dataclass(frozen=True)
class ClusterConfig:
    """Which Ray cluster a job runs on."""

    address: str | None = None
    """Cluster to join, as host:port. By default that of the submitted job (RAY_ADDRESS); without
    one a local cluster is started for the time of the job, its dashboard on loopback."""
    local_cpus: int | None = None
    """CPUs that a local cluster offers; by default all of this machine's."""

    @property
    def joins(self) -> bool:
        """Whether there is a cluster to join."""
        return self.address is not None or "RAY_ADDRESS" in os.environ


@contextmanager
def session(config: ClusterConfig) -> Iterator[str | None]:
    """Connect to Ray for the time of a `with` block; yields the dashboard's address, if it has one.

    A process that is connected already stays so. Raises `ConnectionError` where the named cluster
    does not answer.
    """
    if ray.is_initialized():
        yield None
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    with contextlib.nullcontext() if config.joins else _environment(LOCAL_ENVIRONMENT):
        try:
            yield (_join(config) if config.joins else _start(config)).dashboard_url
        finally:
            ray.shutdown()


def _join(config: ClusterConfig) -> Any:
    # A submitted job brings this environment already; Ray refuses to be told it twice.
    submitted = WORKER_ENVIRONMENT.items() <= os.environ.items()
    environment = None if submitted else {"env_vars": WORKER_ENVIRONMENT}
    return ray.init(address=config.address or "auto", runtime_env=environment)


def _start(config: ClusterConfig) -> Any:
    protect_token()
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # sockets want a short path
    started = ray.init(
        num_cpus=config.local_cpus,
        include_dashboard=True,  # Ray Train asks it for the state of its actors
        dashboard_host="127.0.0.1",
        runtime_env={"env_vars": WORKER_ENVIRONMENT},
        _temp_dir=folder,
    )
    # Where Ray looks up the cluster of a job that is submitted to this one. It writes the file in
    # `ray start` alone, and takes any cluster that it finds on this machine where there is none.
    Path(folder, "ray_current_cluster").write_text(started.address_info["gcs_address"])
    return started


@contextmanager
def _environment(wanted: dict[str, str]) -> Iterator[None]:
    """Variables of this process for the time of a `with` block; those that it has stay."""
    added = {name: value for name, value in wanted.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def protect_token() -> None:
    """See to it that the token that guards local clusters is readable by its owner alone.

    Ray would create it on its own, readable by everybody on the machine.
    """
    path = Path.home() / ".ray" / "auth_token"
    path.parent.mkdir(exist_ok=True)
    with contextlib.suppress(FileExistsError):
        handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
        with os.fdopen(handle, "w") as file:
            file.write(secrets.token_hex(32))
    path.chmod(0o600)
