"""Learners of a few thousand parameters, whose samples, evaluations and publications are made up,
for tests that run the real loop."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from actors.learner import LearnTask
from actors.records import (
    Experience,
    FloatArray,
    MiniBatch,
    Place,
    ReferenceLogprobs,
    Rollout,
    Sample,
    Share,
)
from cluster.engine import EngineConfig
from cluster.run_directory import RunDirectory
from cluster.weights import Version
from llama2 import checkpoint
from llama2.batches import pack
from llama2.packing import balance, shuffled
from llama2.ppo import PPOSettings
from llama2.schedules import Schedule
from tests.actors import small_tasks

SAMPLES, MINIBATCH = 12, 6


@torch.no_grad()
def experiences(root: Path, iteration: int) -> list[Experience]:
    """Made-up answers, in groups of three to a prompt, with the start model's
    log-probabilities."""
    reference, found = checkpoint.load(root / "start"), []
    random = np.random.default_rng(iteration)
    for slot in range(SAMPLES):
        prompt = np.arange(20, 24) + slot // 3
        response = random.integers(10, 300, int(random.integers(2, 8)))
        sample = Sample(
            f"{iteration}-{slot}", prompt, response, np.zeros(0, dtype=np.float32),
            Version(iteration, ""), "stop",
        )  # fmt: skip
        batch = pack([[sample.sequence]])
        logprobs = reference(
            batch.tokens_BT, batch.segments_BT, targets_BT=batch.targets_BT
        ).numpy()
        sample = replace(sample, logprobs=logprobs)
        # The reference is told to differ a little, so that a KL is there from the start.
        told = logprobs + 0.1 * random.standard_normal(len(logprobs)).astype(np.float32)
        found.append(experience(sample, told, float(random.standard_normal()), slot))
    return found


def experience(sample: Sample, told: FloatArray, score: float, slot: int = 0) -> Experience:
    """With a reference that has finished."""
    return Experience(sample, lambda: told, score, slot)


def share(root: Path, iteration: int, rank: int, world: int) -> Share:
    """What a coordinator would deal."""
    made = experiences(root, iteration)
    order = [shuffled(i, SAMPLES, iteration) for i in range(SAMPLES)]
    minibatches = []
    for start in range(0, SAMPLES, MINIBATCH):
        members = order[start : start + MINIBATCH]
        mine = balance([len(made[slot].sample.tokens) for slot in members], world)[rank]
        places = tuple(Place(0, members[i], made[members[i]].score, members[i]) for i in mine)
        total = sum(len(made[slot].sample.response) for slot in members)
        minibatches.append(MiniBatch(places, total))
    rollout: Any = Rollout(tuple(e.sample for e in made), 0.0)
    reference: Any = ReferenceLogprobs((), tuple(e.reference_logprobs() for e in made))
    return Share(iteration, SAMPLES, [rollout], [reference], tuple(minibatches), {})


def learn_task(root: Path, name: str, ppo: PPOSettings, **changes: Any) -> LearnTask:
    """Below `root`, whose models and rows are made on first use."""
    run = small_tasks.task(root, name).run
    schedule = Schedule(1e-2, 100, kind="constant")
    nothing: dict[str, Any] = dict.fromkeys(("store", "generators"))
    made = LearnTask(
        run=run, policy=root / "start", critic=root / "start", tokenizer=root / "start",
        engine=EngineConfig(zero_stage=1), policy_schedule=schedule, value_schedule=schedule,
        ppo=ppo, iterations=4, micro_batch_size=2, eval_every=1, save_every=1, keep_checkpoints=1,
        activation_checkpointing=False, wandb_project="", replicas=1, timeout=1.0,
        coordinator=coordinator(root, [0.0] * 100),
        pretraining=root / "text" / "train" if ppo.ptx_coefficient else None, **nothing,
    )  # fmt: skip
    return replace(made, **changes)


def coordinator(root: Path, rewards: Sequence[float], dies_at: int = -1) -> Any:
    """Deals made-up samples, and finds `rewards` in its evaluations. Asked for the samples of
    iteration `dies_at`, it raises `KeyboardInterrupt`."""

    def deal(iteration: int, version: Version, rank: int, world: int) -> Share:
        if iteration == dies_at:
            raise KeyboardInterrupt
        return share(root, iteration, rank, world)

    def evaluate(step: int, version: Version) -> dict[str, float]:
        return {"eval/reward": rewards[step]}

    return SimpleNamespace(
        share=SimpleNamespace(remote=deal), evaluate=SimpleNamespace(remote=evaluate)
    )


def run_directory(root: Path, name: str) -> RunDirectory:
    return RunDirectory(root / "runs", name)
