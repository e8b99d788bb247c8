"""From nothing to PPO: every stage as a Ray job on a local cluster that lives for this command.

make ppo
"""

import asyncio
import logging
import os
import shlex
import socket
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from ray.job_submission import JobStatus, JobSubmissionClient

from cluster.run_directory import RunDirectory
from cluster.session import WORKER_ENVIRONMENT, ClusterConfig, session
from jobs import cli, results
from jobs.configs import JobConfig
from jobs.stages import COMMANDS, STAGES

ROOT = Path(__file__).resolve().parent.parent
AGENT_PORT = 52365
LEFT_OUT = [".venv", ".git", "runs", "tests", "docs", ".mypy_cache", ".ruff_cache", ".pytest_cache"]


@dataclass(frozen=True)
class QuickstartConfig(JobConfig):
    """Which preset to run, and where."""

    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    """The Ray cluster; by default a local one is started."""


def main(config: QuickstartConfig) -> None:
    """Run all stages of a preset; those that have finished are not run again."""
    waiting = [stage for stage in STAGES if not _run(config, stage).is_finished]
    if waiting:
        print(f"Stages to run: {', '.join(waiting)}. Results go to {config.runs.absolute()}.")
        check_agent_port(config.cluster)
        with session(config.cluster) as dashboard:
            print(f"Ray dashboard: http://{dashboard}", flush=True)
            client = JobSubmissionClient(f"http://{dashboard}")
            for stage in waiting:
                submit(client, config, stage)
    else:
        print("All stages have finished; delete their folders to run them again.")
    run = _run(config, "ppo")
    print(f"\n{results.read(run)}\n\nThe model is in {run.model}.\nThe report is {run.report}.")


def check_agent_port(cluster: ClusterConfig) -> None:
    """Raise `ValueError` where a local cluster could not take jobs, since another one on this
    machine does: Ray's agent listens at one port, which `ray.init` cannot change."""
    if cluster.joins:
        return
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", AGENT_PORT))
        except OSError as error:
            raise ValueError(
                f"Port {AGENT_PORT} is taken, most likely by another Ray cluster on this machine; "
                "wait for it to end, or name it with --cluster.address."
            ) from error


def submit(client: JobSubmissionClient, config: QuickstartConfig, stage: str) -> None:
    """Submit one stage and show its log until it ends. Raises `ValueError` where it failed."""
    logging.getLogger("ray._private.runtime_env").setLevel(logging.WARNING)
    started = time.monotonic()
    command = [
        sys.executable, *COMMANDS[stage], "--preset", config.preset, "--seed", str(config.seed),
        "--runs", str(config.runs.absolute()), "--wandb-project", config.wandb_project,
    ]  # fmt: skip
    job = client.submit_job(
        entrypoint=shlex.join(command),
        # Told here, since Ray takes an environment from the submission or from the job, not both.
        runtime_env={
            "working_dir": str(ROOT),
            "excludes": _left_out(config),
            "env_vars": WORKER_ENVIRONMENT,
        },
        metadata={"stage": stage},
    )
    print(f"\n── {stage}: job {job}", flush=True)
    status = asyncio.run(_follow(client, job))
    if status is not JobStatus.SUCCEEDED:
        raise ValueError(f"Stage {stage} ended as {status}; its log is above. Run again to go on.")
    print(f"── {stage}: done in {time.monotonic() - started:.0f} s", flush=True)


def _left_out(config: QuickstartConfig) -> list[str]:
    """What a job does not need of this folder, above all the results of earlier runs."""
    runs = config.runs.absolute()
    return [*LEFT_OUT, *([str(runs.relative_to(ROOT))] if runs.is_relative_to(ROOT) else [])]


async def _follow(client: JobSubmissionClient, job: str) -> JobStatus:
    """Print a job's log as it grows, and return how the job ended."""

    async def show() -> None:
        async for text in client.tail_job_logs(job):
            sys.stdout.write(text)
            sys.stdout.flush()

    log = asyncio.create_task(show())
    while not (status := client.get_job_status(job)).is_terminal():
        await asyncio.sleep(0.3)
    # The log's connection stays open some seconds after the end; what is left comes within one.
    await asyncio.wait([log], timeout=1.0)
    log.cancel()
    return status


def _run(config: QuickstartConfig, stage: str) -> RunDirectory:
    return RunDirectory(config.runs, f"{config.preset}-{stage}")


if __name__ == "__main__":
    os.chdir(ROOT)
    cli.run(main, lambda preset: QuickstartConfig(preset=preset.ppo.preset))
