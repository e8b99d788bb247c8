"""What tests of bad input share: small inputs that are good, and how a refusal reads."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from jobs.configs import PPOConfig, SftConfig
from jobs.presets import preset
from llama2 import checkpoint
from llama2.batches import TokenSequence
from llama2.config import ModelConfig
from llama2.model import ScalarModel, Transformer, initialize
from llama2.shards import Kind, Manifest, ShardWriter
from llama2.tokenizer import load_tokenizer, train_tokenizer

CONTEXT = 64
TINY = preset("tiny")
DIALOGUE = {"prompt": "Who sees the cat?", "response": "the dog"}


class SessionEntered(Exception):
    """Everything was accepted: the next step would be to start Ray."""


@dataclass(frozen=True)
class Folders:
    """Model folders of one vocabulary, and one of another."""

    policy: Path
    reward: Path
    other_reward: Path


def model_folder(path: Path, tokenizer: Path, kind: type[Transformer | ScalarModel]) -> Path:
    found = load_tokenizer(tokenizer)
    config = ModelConfig(
        vocab_size=found.vocab_size, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=CONTEXT,
    )  # fmt: skip
    model = kind(config)
    initialize(model, config, seed=0)
    checkpoint.save(model, path, found.files())
    return path


def model_folders(root: Path) -> Folders:
    text = "the cat dog sees hears green red house garden in and who is not there"
    words = text.split()
    lines = [" ".join(words[(i * j) % len(words)] for j in range(1, 9)) for i in range(300)]
    train_tokenizer(lines, 310, root / "tokenizer")
    train_tokenizer(lines, 320, root / "other-tokenizer")
    return Folders(
        model_folder(root / "policy", root / "tokenizer", Transformer),
        model_folder(root / "reward", root / "tokenizer", ScalarModel),
        model_folder(root / "other-reward", root / "other-tokenizer", ScalarModel),
    )


def refusal(main: Callable[[Any], None], config: object) -> str:
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        main(config)
    message = str(caught.value)
    assert "\n" not in message
    return message


def jsonl(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def questions(path: Path, count: int = 40) -> Path:
    return jsonl(path, *({"prompt": f"Who sees the cat {i}?"} for i in range(count)))


def sft_config(runs: Path, start: Path, *data: Path) -> SftConfig:
    return replace(TINY.sft, runs=runs, name="mine", start=start, data=data)


def ppo_config(runs: Path, folders: Folders) -> PPOConfig:
    """Names all inputs, so that nothing is missing."""
    return replace(
        TINY.ppo, runs=runs, name="mine", policy=folders.policy, max_new_tokens=8,
        helpfulness_model=folders.reward, safety_model=folders.reward,
        prompts=(questions(runs / "prompts.jsonl"),),
    )  # fmt: skip


def prepared(root: Path, tokenizer: Path, part: str, kind: Kind, context: int) -> Path:
    """A folder as jobs/prepare.py leaves it, with one row in each split."""
    found = load_tokenizer(tokenizer)
    found.save(root / "tokenizer")
    tokens = torch.tensor([1, 270, 2], dtype=torch.int32).numpy()
    sequence = TokenSequence(tokens, torch.tensor([False, True, True]).numpy())
    for split in ("train", "heldout"):
        writer = ShardWriter(root / part / split, Manifest(kind, found.fingerprint, context))
        writer.add([sequence] * (2 if kind == "preference" else 1))
        writer.close(0)
    return root
