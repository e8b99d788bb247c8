"""The stages from nothing to PPO, in order."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from cluster.run_directory import RunDirectory
from jobs import prepare, pretrain, reward_model, sft
from jobs.configs import JobConfig, PPOConfig
from jobs.presets import Preset, preset

STAGES = ("data", "pretrain", "sft", "helpfulness", "safety", "ppo")
COMMANDS = {
    "data": ["jobs/prepare.py"],
    "pretrain": ["jobs/pretrain.py"],
    "sft": ["jobs/sft.py"],
    "helpfulness": ["jobs/reward_model.py", "--kind", "helpfulness"],
    "safety": ["jobs/reward_model.py", "--kind", "safety"],
    "ppo": ["jobs/ppo.py"],
}
_JOBS: dict[str, tuple[Callable[[Any], None], Callable[[Preset], JobConfig]]] = {
    "data": (prepare.main, lambda found: found.prepare),
    "pretrain": (pretrain.main, lambda found: found.pretrain),
    "sft": (sft.main, lambda found: found.sft),
    "helpfulness": (reward_model.main, lambda found: found.helpfulness),
    "safety": (reward_model.main, lambda found: found.safety),
}


def missing(config: PPOConfig) -> list[str]:
    """Stages whose results PPO would take by default and that have not finished.

    None where all inputs were named. Raises `ValueError` for a preset too large to run its earlier
    stages unasked.
    """
    wanted = {
        "sft": config.policy,
        "helpfulness": config.helpfulness_model or config.helpfulness_reward or None,
        "safety": config.safety_model or config.safety_reward or None,
        "data": config.prompts or None,
    }
    absent = [
        stage for stage, given in wanted.items() if given is None and not _done(config, stage)
    ]
    if not absent:
        return []
    check_absent(config, absent, "policy, reward models and prompts")
    return unfinished(config, STAGES[:-1])


def unfinished(config: JobConfig, wanted: Sequence[str]) -> list[str]:
    """Those of the wanted stages that have not finished."""
    return [stage for stage in wanted if not _done(config, stage)]


def check_absent(config: JobConfig, absent: Sequence[str], inputs: str) -> None:
    """Raise `ValueError` where stages are absent of a preset too large to run them unasked;
    `inputs` says what can be named instead."""
    if absent and config.preset != "tiny":
        names = ", ".join(f"{config.preset}-{stage}" for stage in absent)
        raise ValueError(
            f"The runs {names} are not there or not finished in {config.runs}; run these stages, "
            f"or name {inputs}."
        )


def run_missing(config: PPOConfig) -> None:
    """Run what is missing, in this process's Ray session."""
    run_stages(config, missing(config))


def run_stages(config: JobConfig, wanted: Sequence[str]) -> None:
    """Run these stages of the preset, in this process's Ray session."""
    for stage in wanted:
        main, choose = _JOBS[stage]
        chosen = choose(preset(config.preset))
        main(
            replace(
                chosen,
                runs=config.runs,
                seed=config.seed,
                cluster=config.cluster,
                wandb_project=config.wandb_project,
            )
        )


def _done(config: JobConfig, stage: str) -> bool:
    return RunDirectory(config.runs, f"{config.preset}-{stage}").is_finished
