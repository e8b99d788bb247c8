"""PPO: the main job.

python jobs/ppo.py --preset tiny
ray job submit --working-dir . -- python jobs/ppo.py --preset tiny
"""

import hashlib
import json
import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
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
from jobs.prepare import file_prompts, split_prompts
from jobs.rewards import Rewards
from jobs.sampling import Cast
from jobs.training import VERIFIED_BYTES
from llama2.chat import encode_prompt
from llama2.checkpoint import check_folder
from llama2.generation import Sampling
from llama2.records import Prompt
from llama2.schedules import Schedule
from llama2.shards import Shards
from llama2.tokenizer import Tokenizer, check_vocabulary, load_tokenizer

MAY_CHANGE = (
    "cluster", "runs", "wandb_project", "learner", "reference", "rewards", "scorer",
    # Another backend draws other answers.
    *(f"generator.{field.name}" for field in fields(GeneratorConfig) if field.name != "backend"),
    "save_every", "keep_checkpoints", "micro_batch_size", "timeout", "activation_checkpointing",
    "engine.zero_stage", "engine.offload_optimizer", "engine.offload_parameters",
    "engine.nvme_path",
)  # fmt: skip


@dataclass(frozen=True)
class Models:
    """The folders that PPO starts from."""

    policy: Path
    helpfulness: Path
    safety: Path


@dataclass(frozen=True)
class Prompts:
    """What PPO asks."""

    train: tuple[Prompt, ...]
    heldout: tuple[Prompt, ...]
    world_seed: int | None


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
        stack.enter_context(session(config.cluster))
        check_capacity(roles(config, rewards))
        run.open(cli.plain(config), may_change=MAY_CHANGE)
        check_unchanged(run, models, rewards, prompts)
        train(config, run, models, rewards, prompts, pretraining)
    results.write(run, results.best_step(run) if config.patience else config.iterations)
    write_report(run, f"{run.name}: PPO", note=results.NOTE)
    print(f"\n{results.read(run)}\n\nThe model is in {run.model}, the report is {run.report}.")


def find_models(config: PPOConfig) -> Models:
    """The folders given, else the preset's. Raises `ValueError` for one that is not there."""
    models = Models(
        config.policy or config.runs / f"{config.preset}-sft" / "model",
        config.helpfulness_model or config.runs / f"{config.preset}-helpfulness" / "model",
        config.safety_model or config.runs / f"{config.preset}-safety" / "model",
    )
    return Models(models.policy.absolute(), models.helpfulness.absolute(), models.safety.absolute())


def check_given(config: PPOConfig, rewards: Rewards) -> None:
    """Raise for a named input that is missing or wrong, before the missing ones are made."""
    if config.policy is not None:
        check_folder(config.policy, scalar=False)
    if config.helpfulness_model is not None or config.helpfulness_reward:
        rewards.helpfulness.check(config.scorer)
    if config.safety_model is not None or config.safety_reward:
        rewards.safety.check(config.scorer)
    if config.prompts:
        _read_prompts(config)
    if config.pretraining_data is not None and config.ppo.ptx_coefficient:
        Shards(pretraining_rows(config))


def check_policy(folder: Path) -> Tokenizer:
    """The policy's tokenizer. Raises `ValueError` where folder, model and tokenizer do not fit."""
    policy = check_folder(folder, scalar=False)
    tokenizer = load_tokenizer(folder)
    check_vocabulary(tokenizer, policy.vocab_size)
    return tokenizer


def check_models(models: Models) -> Tokenizer:
    """The tokenizer of all. Raises `ValueError` for folders that do not fit it or each other."""
    tokenizer = check_policy(models.policy)
    for folder in (models.helpfulness, models.safety):
        check_folder(folder, scalar=True)
        if load_tokenizer(folder).fingerprint != tokenizer.fingerprint:
            raise ValueError(
                f"The reward model {folder} has another tokenizer than the policy {models.policy}; "
                "train it from the same base."
            )
    return tokenizer


def find_prompts(config: PPOConfig, tokenizer: Tokenizer, models: Models) -> Prompts:
    """Prepared prompts or raw ones. Raises `ValueError` for missing, empty or too long ones."""
    train, heldout, world_seed = _read_prompts(config)
    context = check_folder(models.policy).max_position_embeddings
    train, heldout = (_fitting(p, tokenizer, context, config) for p in (train, heldout))
    if len(train) < 1 or len(heldout) < 1:
        raise ValueError("There must be at least one training and one held-out prompt; give more.")
    return Prompts(tuple(train), tuple(heldout[: config.heldout_prompts]), world_seed)


def _read_prompts(config: PPOConfig) -> tuple[list[Prompt], list[Prompt], int | None]:
    """Training and held-out prompts, and the seed of the world that they come from, if any."""
    paths = config.prompts or (config.runs / f"{config.preset}-data",)
    folder = paths[0] / "prompts"
    if (folder / "train.jsonl").is_file():
        train, heldout = (file_prompts([folder / f"{name}.jsonl"]) for name in ("train", "heldout"))
        return train, heldout, json.loads((folder / "world.json").read_text())["seed"]
    return *split_prompts(file_prompts(paths), share=0.05), None


def _fitting(
    prompts: Sequence[Prompt], tokenizer: Tokenizer, context: int, config: PPOConfig
) -> list[Prompt]:
    room = context - 1 if config.long_prompts == "error" else context - config.max_new_tokens
    kept = []
    for prompt in prompts:
        tokens = len(encode_prompt(tokenizer, prompt.messages))
        if tokens <= room:
            kept.append(prompt)
        elif config.long_prompts == "error":
            raise ValueError(
                f"{prompt.source}: the prompt has {tokens} tokens and the context is {context}; "
                "shorten it, or leave such prompts out with --long-prompts drop."
            )
    return kept


def find_pretraining(config: PPOConfig, tokenizer: Tokenizer, policy: Path) -> Path | None:
    """The pretraining rows that are mixed in, if any. Raises `ValueError` where they are not there,
    damaged, or not for this policy."""
    if not config.ppo.ptx_coefficient:
        return None
    folder = pretraining_rows(config).absolute()
    shards, context = Shards(folder), check_folder(policy).max_position_embeddings
    if shards.manifest.tokenizer != tokenizer.fingerprint or shards.manifest.context > context:
        raise ValueError(
            f"{folder} was written with another tokenizer than the policy's, or has rows longer "
            f"than its context of {context}; prepare it with --tokenizer {policy} --context "
            f"{context}, or set --ppo.ptx-coefficient 0."
        )
    if shards.bytes <= VERIFIED_BYTES:
        shards.verify()
    return folder


def pretraining_rows(config: PPOConfig) -> Path:
    """The folder of prepared rows. Raises `ValueError` where they are not there."""
    root = config.pretraining_data or config.runs / f"{config.preset}-data"
    folder = root / "pretrain" / "train"
    if not folder.is_dir():
        raise ValueError(
            f"{root} holds no prepared pretraining data; name some with --pretraining-data, or set "
            "--ppo.ptx-coefficient 0."
        )
    return folder


def check_unchanged(run: RunDirectory, models: Models, rewards: Rewards, prompts: Prompts) -> None:
    """Raise `ValueError` where a model or the prompts are no longer those that the run began with,
    which it keeps checksums of."""
    digest = hashlib.blake2b(digest_size=16)
    for prompt in (*prompts.train, *prompts.heldout):
        digest.update(repr((prompt.messages, prompt.safety)).encode("utf-8", "backslashreplace"))
    found = Cast(models.policy, rewards).hashes | {"prompts": digest.hexdigest()}
    path = run.path / "inputs.json"
    if not path.exists():
        write_atomically(path, json.dumps(found, indent=1) + "\n")
    for name, before in json.loads(path.read_text()).items():
        if found[name] != before:
            what = "prompts" if name == "prompts" else f"{name} model"
            raise ValueError(
                f"The {what} changed since {run.name} began (hash {before}, now {found[name]}); "
                "put it back as it was, or give another --name."
            )


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
