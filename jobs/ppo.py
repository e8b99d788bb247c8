"""PPO: the main job.

python jobs/ppo.py --preset tiny
ray job submit --working-dir . -- python jobs/ppo.py --preset tiny
"""

import json
import math
from contextlib import ExitStack
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import ray
import torch
from ray import serve
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.backend import PRECISIONS
from actors.coordinator import Coordinator, RolloutTask
from actors.generator import check_backend, deploy
from actors.generator_config import GeneratorConfig
from actors.learner import LearnTask
from actors.learning import learn
from actors.reference import Reference
from actors.reward import Asked
from cluster.placement import Workers, check_capacity
from cluster.report import write_report
from cluster.run_directory import RunDirectory, write_atomically
from cluster.session import session
from cluster.training import run_workers
from cluster.weights import WeightStore
from jobs import cli, results, stages
from jobs.configs import PPOConfig
from jobs.ppo_inputs import (
    Models,
    Prompts,
    check_given,
    check_policy,
    check_unchanged,
    digest,
    find_models,
    find_pretraining,
    find_prompts,
    inputs_file,
)
from jobs.rewards import Rewards
from jobs.sampling import Cast
from llama2.generation import Sampling
from llama2.schedules import Schedule
from llama2.tokenizer import load_tokenizer

MAY_CHANGE = (
    "cluster", "runs", "wandb_project", "learner", "reference", "rewards", "scorer",
    # Another backend draws other answers.
    *(f"generator.{field.name}" for field in fields(GeneratorConfig) if field.name != "backend"),
    "save_every", "keep_checkpoints", "micro_batch_size", "timeout", "activation_checkpointing",
    "engine.zero_stage", "engine.offload_optimizer", "engine.offload_parameters",
    "engine.nvme_path",
)  # fmt: skip


def main(config: PPOConfig) -> None:
    """Train a policy by PPO against a helpfulness and a safety reward model."""
    run = RunDirectory(config.runs, config.run_name("ppo"))
    if run.is_finished:
        print(f"{run.name}: finished already.\n\n{results.read(run)}")
        return
    check_sizes(config)
    check_backend(config.generator)
    rewards = Rewards.find(config)
    if run.config.exists():  # told before a cluster starts
        run.open(cli.plain(config), may_change=MAY_CHANGE)
    with ExitStack() as stack:
        if stages.missing(config):
            check_given(config, rewards)
            stack.enter_context(session(config.cluster))
            stages.run_missing(config)
        models = find_models(config)
        tokenizer = check_policy(models.policy)
        rewards.check(config.scorer)
        prompts = find_prompts(config, tokenizer, models)
        pretraining = find_pretraining(config, tokenizer, models.policy)
        inputs = Cast(models.policy, rewards).hashes | {"prompts": digest(prompts)}
        check_unchanged(run, inputs)
        stack.enter_context(session(config.cluster))
        check_capacity(roles(config, rewards))
        run.open(cli.plain(config), may_change=MAY_CHANGE)
        write_atomically(inputs_file(run), json.dumps(inputs, indent=1) + "\n")
        train(config, run, models, rewards, prompts, pretraining)
    results.write(run, results.best_step(run) if config.patience else config.iterations)
    write_report(run, f"{run.name}: PPO", note=results.NOTE)
    print(f"\n{results.read(run)}\n\nThe model is in {run.model}, the report is {run.report}.")


def check_sizes(config: PPOConfig) -> None:
    """Raise `ValueError` for numbers that make no sense, and where batch, minibatch, groups and
    workers do not divide evenly."""
    for name in ("batch_size", "minibatch_size", "micro_batch_size", "iterations", "max_new_tokens",
                 "heldout_prompts", "eval_every", "save_every", "keep_checkpoints"):  # fmt: skip
        if getattr(config, name) < 1:
            raise ValueError(f"{name} must be at least 1, not {getattr(config, name)}.")
    for name in ("lr", "value_lr", "temperature"):
        if not 0 <= getattr(config, name) < math.inf:
            raise ValueError(f"{name} must be at least 0, not {getattr(config, name):g}.")
    if not config.timeout > 0:
        raise ValueError(f"timeout must be positive, not {config.timeout:g}.")
    if config.patience < 0:
        raise ValueError(f"patience must not be negative, as {config.patience} is.")
    if config.batch_size % config.ppo.group_size:
        raise ValueError(
            f"batch_size {config.batch_size} is not a multiple of ppo.group_size "
            f"{config.ppo.group_size}; change one of them."
        )
    if config.batch_size % config.minibatch_size:
        raise ValueError(
            f"batch_size {config.batch_size} is not a multiple of minibatch_size "
            f"{config.minibatch_size}; change one of them."
        )
    if config.ppo.kl_target is not None and config.batch_size >= 5 * config.ppo.kl_horizon:
        raise ValueError(
            f"With batch_size {config.batch_size} an iteration could adapt the KL coefficient to "
            f"0; set ppo.kl_horizon above {config.batch_size / 5:g}."
        )
    if config.minibatch_size % config.learner.count:
        raise ValueError(
            f"minibatch_size {config.minibatch_size} cannot be shared evenly by "
            f"{config.learner.count} learner workers; change one of them."
        )


def roles(config: PPOConfig, rewards: Rewards) -> dict[str, Workers]:
    """All that run at once."""
    return {
        "learner": config.learner,
        "generator": replace(config.generator, count=config.generator.most),
        "reference": config.reference,
        "helpfulness": rewards.helpfulness.workers(config.rewards),
        "safety": rewards.safety.workers(config.rewards),
    }


def shares_processors(config: PPOConfig, rewards: Rewards) -> bool:
    """Whether reward models, reference and learner compute on CPUs, which may be the same."""
    models = [source for source in (rewards.helpfulness, rewards.safety) if not source.function]
    used = config.learner, config.reference, *(source.workers(config.rewards) for source in models)
    return bool(models) and not any(workers.gpus for workers in used)


def train(
    config: PPOConfig,
    run: RunDirectory,
    models: Models,
    rewards: Rewards,
    prompts: Prompts,
    pretraining: Path | None,
) -> None:
    """Start the roles, run the learner to its end, and stop them."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    store = WeightStore.options(scheduling_strategy=here).remote()  # type: ignore[attr-defined]
    dtype = PRECISIONS[config.engine.precision]
    asked = Asked(models.policy, prompts.train + prompts.heldout)
    try:
        generators = deploy(
            run.name, models.policy, store, config.engine.precision, config.generator
        )
        rollouts = RolloutTask(
            run=run,
            tokenizer=models.policy,
            prompts=prompts.train,
            heldout=prompts.heldout,
            batch_size=config.batch_size,
            minibatch_size=config.minibatch_size,
            sampling=_sampling(config, models.policy),
            seed=config.seed,
            world_seed=prompts.world_seed,
            timeout=config.timeout,
            ppo=config.ppo,
            in_turn=shares_processors(config, rewards),
        )
        coordinator = Coordinator.options(scheduling_strategy=here).remote(  # type: ignore[attr-defined]
            rollouts,
            generators,
            config.generator.most,
            start(Reference, config.reference, models.policy, dtype),
            rewards.helpfulness.start(config.rewards, dtype, asked, config.scorer),
            rewards.safety.start(config.rewards, dtype, asked, config.scorer),
        )
        task = _learn_task(config, run, models, coordinator, store, generators)
        task = replace(task, critic=rewards.critic(models.policy), pretraining=pretraining)
        # While the first worker waits for what `LearnTask.timeout` limits, the others wait for it.
        run_workers(learn, task, config.learner, run, timeout=4 * config.timeout)
    finally:
        serve.delete(run.name)


def start(role: Any, workers: Workers, folder: Path, dtype: torch.dtype) -> list[Any]:
    """The workers of a scoring role."""
    options = workers.actor_options()
    return [
        role.options(**options).remote(folder, dtype, workers.threads) for _ in range(workers.count)
    ]


def _sampling(config: PPOConfig, policy: Path) -> Sampling:
    eos = load_tokenizer(policy).eos_id
    return Sampling(
        temperature=config.temperature, max_new_tokens=config.max_new_tokens, stop_ids=(eos,)
    )


def _learn_task(
    config: PPOConfig,
    run: RunDirectory,
    models: Models,
    coordinator: Any,
    store: Any,
    generators: Any,
) -> LearnTask:
    updates = config.iterations * config.batch_size // config.minibatch_size
    return LearnTask(
        run=run,
        policy=models.policy,
        critic=models.helpfulness,
        tokenizer=models.policy,
        engine=config.engine,
        policy_schedule=Schedule(config.lr, updates, kind="constant"),
        value_schedule=Schedule(config.value_lr, updates, kind="constant"),
        ppo=config.ppo,
        iterations=config.iterations,
        micro_batch_size=config.micro_batch_size,
        eval_every=config.eval_every,
        save_every=config.save_every,
        keep_checkpoints=config.keep_checkpoints,
        activation_checkpointing=config.activation_checkpointing,
        wandb_project=config.wandb_project,
        coordinator=coordinator,
        store=store,
        generators=generators,
        replicas=config.generator.count,
        timeout=config.timeout,
        patience=config.patience,
        seed=config.seed,
    )


if __name__ == "__main__":
    cli.run(main, lambda preset: preset.ppo)
