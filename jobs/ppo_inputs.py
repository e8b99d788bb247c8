"""What PPO starts from: models, prompts and pretraining rows, found and checked before any work."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster.run_directory import RunDirectory
from jobs.configs import PPOConfig
from jobs.prepare import file_prompts, split_prompts
from jobs.rewards import Rewards
from jobs.training import VERIFIED_BYTES
from llama2.chat import encode_prompt
from llama2.checkpoint import check_folder
from llama2.records import Prompt
from llama2.shards import Shards
from llama2.tokenizer import Tokenizer, check_vocabulary, load_tokenizer


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
    fitting = [_fitting(several, tokenizer, context, config) for several in (train, heldout)]
    if not train or not heldout:
        raise ValueError("There must be at least one training and one held-out prompt; give more.")
    if not all(fitting):
        dropped = len(train) + len(heldout) - sum(map(len, fitting))
        raise ValueError(
            f"{dropped} of {len(train) + len(heldout)} prompts leave no room for "
            f"{config.max_new_tokens} tokens in the context of {context}, and no training or no "
            "held-out prompt is left; give shorter ones, or lower max_new_tokens."
        )
    return Prompts(tuple(fitting[0]), tuple(fitting[1][: config.heldout_prompts]), world_seed)


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


def inputs_file(run: RunDirectory) -> Path:
    """Where a run keeps checksums of the models and prompts that it began with."""
    return run.path / "inputs.json"


def check_unchanged(run: RunDirectory, inputs: dict[str, str]) -> None:
    """Raise `ValueError` where a model or the prompts are no longer those that the run began
    with."""
    if not inputs_file(run).exists():
        return
    for name, before in json.loads(inputs_file(run).read_text()).items():
        if inputs[name] != before:
            what = "prompts" if name == "prompts" else f"{name} model"
            raise ValueError(
                f"The {what} changed since {run.name} began (hash {before}, now {inputs[name]}); "
                "put it back as it was, or give another --name."
            )


def digest(prompts: Prompts) -> str:
    """A checksum of all prompts, in their order."""
    found = hashlib.blake2b(digest_size=16)
    for prompt in (*prompts.train, *prompts.heldout):
        found.update(repr((prompt.messages, prompt.safety)).encode())
    return found.hexdigest()
