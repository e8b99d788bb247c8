"""Training tasks of a few thousand parameters on made-up rows, for tests that run the real loop."""

import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from actors.objectives import LanguageModelling
from actors.steps import MicroBatches
from actors.trainer import TrainTask
from cluster.engine import Engine, EngineConfig
from cluster.run_directory import RunDirectory
from llama2 import checkpoint
from llama2.batches import TokenSequence
from llama2.config import ModelConfig
from llama2.lora import LoraConfig
from llama2.model import Transformer, initialize
from llama2.schedules import Schedule
from llama2.shards import Kind, Manifest, Shards, ShardWriter
from llama2.tokenizer import load_tokenizer, train_tokenizer

CONTEXT = 24
TEXT = "the cat dog sees hears green red house garden in and who is not there"


def tokenizer_folder(folder: Path) -> Path:
    words = TEXT.split()
    lines = [" ".join(words[(i * j) % len(words)] for j in range(1, 9)) for i in range(300)]
    train_tokenizer(lines, 310, folder)
    return folder


def config() -> ModelConfig:
    return ModelConfig(
        vocab_size=310, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=CONTEXT,
    )  # fmt: skip


def sequence(random: np.random.Generator, length: int, ids: range, prompt: int) -> TokenSequence:
    """Tokens that go up by one at each place, the first `prompt` of them no targets."""
    start = random.integers(ids.start, ids.stop)
    tokens = ids.start + (start - ids.start + np.arange(length)) % len(ids)
    return TokenSequence(tokens.astype(np.int64), np.arange(length) >= max(1, prompt))


def write_rows(folder: Path, kind: Kind, count: int, seed: int, ids: range) -> Path:
    """Rows of uneven lengths: packed documents, or pairs with ratings."""
    random = np.random.default_rng(seed)
    writer = ShardWriter(folder, Manifest(kind, "made up", CONTEXT))
    for _ in range(count):
        if kind == "preference":
            lengths = random.integers(3, CONTEXT, 2)
            pair = [sequence(random, int(n), ids, 2) for n in lengths]
            writer.add(pair, rating=int(random.integers(0, 4)))
        else:
            lengths = random.integers(3, CONTEXT // 2, random.integers(1, 3))
            prompt = 2 if kind == "sft" else 0
            writer.add([sequence(random, int(n), ids, prompt) for n in lengths])
    writer.close()
    return folder


def start_folder(folder: Path, tokenizer: Path) -> Path:
    model = Transformer(config())
    initialize(model, config(), seed=3)
    checkpoint.save(model, folder, load_tokenizer(tokenizer).files())
    return folder


def task(root: Path, name: str, **changes: Any) -> TrainTask:
    """A pretraining task below `root`, whose data and tokenizer are made on first use."""
    if not (root / "tokenizer").is_dir():
        tokenizer_folder(root / "tokenizer")
        ids = range(10, 300)
        for kind, folder in (("pretrain", "text"), ("sft", "chat"), ("preference", "pairs")):
            write_rows(root / folder / "train", kind, 24, 1, ids)  # type: ignore[arg-type]
            write_rows(root / folder / "heldout", kind, 7, 2, ids)  # type: ignore[arg-type]
        start_folder(root / "start", root / "tokenizer")
    run = RunDirectory(root / "runs", name)
    if os.environ.get("RANK", "0") == "0":  # a run is open in one process at a time
        run.open({})
    made = TrainTask(
        stage="pretrain", run=run, data=root / "text" / "train", heldout=root / "text" / "heldout",
        start=None, model=config(), engine=EngineConfig(zero_stage=1),
        schedule=Schedule(1e-2, 8, 2), tokenizer=root / "tokenizer", batch_rows=5,
        micro_batches=MicroBatches(40), eval_rows=7, eval_every=2, save_every=3,
        keep_checkpoints=2, patience=0, keep_best=False, on_bad_loss="stop", seed=0,
        lora=LoraConfig(),
    )  # fmt: skip
    return replace(made, **changes)


def reward_task(root: Path, name: str, **changes: Any) -> TrainTask:
    return task(
        root, name, stage="reward_model", start=root / "start", data=root / "pairs" / "train",
        heldout=root / "pairs" / "heldout", **changes,
    )  # fmt: skip


class Steep(LanguageModelling):
    """The loss is finite, its gradient on one row is not: that of a root at zero."""

    steep_row = 7

    def loss(self, engine: Engine, rows: Any, total: int) -> Tensor:
        loss = super().loss(engine, rows, total)
        if self.steep_row in rows:
            loss = loss + (loss * 0).sqrt()
        return loss


BAD = 305  # no other row has it, and its embedding is NaN


def poisoned(root: Path, name: str, bad: set[int], **changes: Any) -> TrainTask:
    """24 rows to train on, of which those of `bad` begin with a token without a number."""
    folder = root / f"poisoned-{'-'.join(map(str, sorted(bad)))}"
    if not folder.is_dir():
        task(root, "poisoned-start")
        model = checkpoint.load(root / "start")
        with torch.no_grad():
            model.model.embed_tokens.weight[BAD] = math.nan
        checkpoint.save(model, root / "nan", {})
        source = Shards(root / "text" / "train")
        writer = ShardWriter(folder, Manifest("pretrain", "made up", CONTEXT))
        for i in range(len(source)):
            row = [TokenSequence(s.tokens.copy(), s.is_target) for s in source.row(i)]
            if i in bad:
                row[0].tokens[0] = BAD
            writer.add(row)
        writer.close()
    return task(root, name, data=folder, start=root / "nan", eval_every=0, **changes)
