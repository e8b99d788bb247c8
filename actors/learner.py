"""The learner: one Ray Train group whose workers each hold a shard of the policy and of the value
model.

An iteration is: publish the weights, take this worker's share of the samples, compute advantages,
update minibatch by minibatch.
"""

import math
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
import torch
import torch.distributed
from ray.serve.exceptions import DeploymentUnavailableError

from actors.engine_loop import EngineFailed
from actors.experience import ExperienceBatch, collate, with_advantages
from actors.export import export
from actors.identity import identity
from actors.policy import Policy
from actors.records import Experience, MiniBatch, Share
from actors.value import Value
from cluster import publishing, training
from cluster.checkpoints import Checkpoints
from cluster.engine import Engine, EngineConfig
from cluster.run_directory import RunDirectory
from cluster.tracking import Tracker
from cluster.weights import Receipt, Version
from llama2 import checkpoint
from llama2.advantages import whiten
from llama2.model import ScalarModel, Transformer
from llama2.ppo import PPOSettings
from llama2.schedules import Schedule


@dataclass(frozen=True)
class LearnTask:
    """All that a learner's worker needs."""

    run: RunDirectory
    policy: Path
    critic: Path
    tokenizer: Path
    engine: EngineConfig
    policy_schedule: Schedule
    value_schedule: Schedule
    ppo: PPOSettings
    iterations: int
    micro_batch_size: int
    eval_every: int
    save_every: int
    keep_checkpoints: int
    activation_checkpointing: bool
    wandb_project: str
    coordinator: Any
    store: Any
    generators: Any
    replicas: int
    timeout: float


@dataclass
class Learner:
    """The state of one worker; `learn` drives it."""

    task: LearnTask
    policy: Policy
    value: Value
    iteration: int = 0
    attempt: int | None = None
    """This worker's right to publish: later attempts of the learner shut it out."""

    @property
    def engines(self) -> dict[str, Engine]:
        """By the names that they have in checkpoints."""
        return {"policy": self.policy.engine, "value": self.value.engine}

    def publish(self) -> tuple[Version, dict[str, float]]:
        """Have all generators serve the current weights, and prove it by checksum (collective)."""
        started = time.perf_counter()
        if training.rank() == 0:
            version, receipts = self._publish()
            checksums = {receipt.version.checksum for receipt in receipts}
            found: list[Any] = [version, len(checksums)]
        else:
            for _ in self.policy.engine.buckets():  # sharded weights are gathered by all together
                pass
            found = [None, 0]
        torch.distributed.broadcast_object_list(found)
        version, distinct = found
        return version, {
            "time/publish": time.perf_counter() - started,
            "publish/version": float(version.number),
            "publish/distinct_checksums": float(distinct),
        }

    def _publish(self) -> tuple[Version, list[Receipt]]:
        task = self.task
        if self.attempt is None:
            self.attempt = publishing.enter(task.store, task.timeout)
        version = publishing.put(
            self.policy.engine.buckets(), self.iteration, self.attempt, task.store, task.timeout
        )

        def refresh(seconds: float) -> list[Receipt | Exception]:
            try:
                found: list[Receipt | Exception] = task.generators.broadcast("refresh").results(
                    timeout_s=seconds, return_exceptions=True
                )
            except (DeploymentUnavailableError, TimeoutError) as error:
                return [error]
            # Serve replaces a replica whose engine has failed: like one that does not answer yet.
            return [TimeoutError(str(x)) if isinstance(x, EngineFailed) else x for x in found]

        receipts = publishing.confirm(version, refresh, task.store, task.replicas, task.timeout)
        return version, receipts

    def share(self, version: Version) -> Share:
        """This worker's samples of the current iteration."""
        call = self.task.coordinator.share.remote(
            self.iteration, version, training.rank(), training.world_size()
        )
        share: Share = ray.get(call, timeout=3 * self.task.timeout)
        return share

    @torch.no_grad()
    def experience(self, samples: Sequence[Sequence[Experience]]) -> list[list[ExperienceBatch]]:
        """Micro-batches of the samples of each minibatch, with advantages whitened over the global
        batch (collective)."""
        ppo = self.task.ppo
        minibatches = []
        for minibatch in samples:
            batches = []
            for start in range(0, len(minibatch), self.task.micro_batch_size):
                rows = minibatch[start : start + self.task.micro_batch_size]
                batch = collate(rows, self.policy.engine.device)
                old_BT, values_BT = self.policy.logprobs(batch), self.value.values(batch)
                batches.append(
                    with_advantages(
                        batch, old_BT, values_BT, ppo.kl_coefficient, ppo.gamma, ppo.lam
                    )
                )
            minibatches.append(batches)
        return whiten_advantages(minibatches)

    def update(
        self, minibatches: list[list[ExperienceBatch]], totals: Sequence[int]
    ) -> dict[str, float]:
        """One gradient step of policy and value per minibatch, whose answer tokens over all workers
        are `totals` (collective).

        Raises `FloatingPointError`, before the weights have changed, for a loss or gradient that is
        not finite.
        """
        sums = torch.zeros(4, dtype=torch.float64)
        norms: dict[str, float] = {}
        for number, (batches, total) in enumerate(zip(minibatches, totals, strict=True)):
            parts = torch.zeros(4, dtype=torch.float64)
            for batch in batches:
                part = self.policy.loss(batch, total)
                self.policy.engine.backward(part.loss)
                value_part = self.value.loss(batch, total)
                self.value.engine.backward(value_part)
                losses = float(part.loss.detach()), float(value_part.detach())
                parts += torch.tensor([*losses, part.clipped, part.approximate_kl]).double()
            sums += training.all_reduce(parts)
            self._check("loss", float(parts[:2].sum()), number)
            steps = {"policy": self.policy.engine.step(), "value": self.value.engine.step()}
            norms = {f"{who}/{name}": x for who, step in steps.items() for name, x in step.items()}
            for who, step in steps.items():
                self._check(f"{who} gradient's norm", step.get("grad_norm", 0.0), number)
        self.iteration += 1
        policy_loss, value_loss, clipped, divergence = sums.tolist()
        return {
            "loss": policy_loss / len(minibatches),
            "value/loss": value_loss / len(minibatches),
            "ppo/clip_fraction": clipped / sum(totals),
            "ppo/approximate_kl": divergence / sum(totals),
        } | norms

    def _check(self, what: str, value: float, minibatch: int) -> None:
        if not math.isfinite(value):
            raise FloatingPointError(
                f"{self.task.run.name}: the {what} is {value} in iteration {self.iteration}, "
                f"minibatch {minibatch}; lower the learning rates, or look at the rewards."
            )


def gather(share: Share) -> list[list[Experience]]:
    """Fetch a share's chunks and pick its samples from them, minibatch by minibatch."""
    rollouts = ray.get(share.rollouts)
    references = ray.get(share.references)

    def experience(minibatch: MiniBatch) -> list[Experience]:
        return [
            Experience(
                rollouts[place.chunk].samples[place.row],
                references[place.chunk].logprobs[place.row],
                place.score,
            )
            for place in minibatch.places
        ]

    return [experience(minibatch) for minibatch in share.minibatches]


def whiten_advantages(minibatches: list[list[ExperienceBatch]]) -> list[list[ExperienceBatch]]:
    """Mean 0 and variance 1 over all answer tokens of the global batch (collective)."""
    batches = [batch for minibatch in minibatches for batch in minibatch]
    advantages_N = torch.cat([batch.advantages_BT[batch.mask_BT] for batch in batches])
    white_N = whiten(advantages_N, torch.ones_like(advantages_N), training.all_reduce)
    parts = iter(white_N.split([int(batch.mask_BT.sum()) for batch in batches]))
    return [
        [replace(batch, advantages_BT=batch.spread(next(parts))) for batch in minibatch]
        for minibatch in minibatches
    ]


def measure(minibatches: list[list[ExperienceBatch]]) -> dict[str, float]:
    """Means over the global batch of what was sampled, before any update (collective)."""
    sums = torch.zeros(8, dtype=torch.float64)
    for batch in (batch for minibatch in minibatches for batch in minibatch):
        mask = batch.mask_BT
        residual, returns = (batch.returns_BT - batch.values_BT)[mask], batch.returns_BT[mask]
        divergence = (batch.old_logprobs_BT - batch.reference_logprobs_BT)[mask].sum()
        disagreement = (batch.old_logprobs_BT - batch.sampled_logprobs_BT)[mask].abs().sum()
        sums += torch.stack(
            (
                mask.sum(), torch.tensor(len(mask)).to(divergence), divergence, disagreement,
                residual.square().sum(), returns.sum(), returns.square().sum(),
                -batch.old_logprobs_BT[mask].sum(),
            )
        ).double().cpu()  # fmt: skip
    totals = training.all_reduce(sums).tolist()
    tokens, samples, kl, difference, residuals, total, squares, surprise = totals
    variance = squares - total**2 / tokens
    return {
        "ppo/kl_from_initial": kl / samples,
        "ppo/entropy": surprise / tokens,  # estimated: the mean surprise at one's own samples
        "rollout/logprob_difference": difference / tokens,
        "value/explained_variance": 1 - residuals / variance if variance > 0 else 0.0,
        "value/mean_return": total / tokens,
    }


def learn(task: LearnTask) -> None:
    """Run PPO on this worker, from the newest checkpoint to the last iteration."""
    learner, checkpoints = _learner(task)
    try:
        _iterate(learner, checkpoints)
    except FloatingPointError:
        checkpoints.close()  # what was saved before is to be whole
        raise
    checkpoints.close()
    export(learner.policy.engine, task.tokenizer, task.run.model)
    learner.policy.engine.close()
    learner.value.engine.close()


def _iterate(learner: Learner, checkpoints: Checkpoints) -> None:
    task, saved = learner.task, learner.iteration
    lead = training.rank() == 0
    with ExitStack() as stack:
        tracker = stack.enter_context(_tracker(task, learner.iteration)) if lead else None
        while learner.iteration < task.iterations:
            step, started = learner.iteration, time.perf_counter()
            version, metrics = learner.publish()
            if step % task.eval_every == 0:
                metrics |= _evaluate(task, step, version)
            share = learner.share(version)
            minibatches = learner.experience(gather(share))
            metrics |= share.metrics | measure(minibatches)
            learning = time.perf_counter()
            metrics |= learner.update(
                minibatches, [part.total_tokens for part in share.minibatches]
            )
            now = time.perf_counter()
            metrics |= {"time/update": now - learning, "time/iteration": now - started}
            if tracker is not None:
                tracker.log(step, metrics)
            if learner.iteration % task.save_every == 0 and learner.iteration < task.iterations:
                checkpoints.save(learner.iteration, learner.engines, {})
        version, metrics = learner.publish()
        metrics |= _evaluate(task, learner.iteration, version)
        if tracker is not None:
            tracker.log(learner.iteration, metrics)
    if learner.iteration > saved:  # else the checkpoint it came from is the last one
        checkpoints.save(learner.iteration, learner.engines, {})


def _learner(task: LearnTask) -> tuple[Learner, Checkpoints]:
    policy, policy_weights = checkpoint.stream(task.policy)
    critic, critic_weights = checkpoint.stream_scalar_from(task.critic, seed=0)
    # Values are of whitened scores, the reward model's of raw ones: keep its trunk, begin at 0.
    critic_weights = (
        (name, torch.zeros_like(weight) if name == "score.weight" else weight)
        for name, weight in critic_weights
    )
    for module in (policy, critic):
        module.model.activation_checkpointing = task.activation_checkpointing
    learner = Learner(
        task,
        Policy(
            Engine(policy, task.engine, task.policy_schedule, policy_weights), task.ppo.clip_range
        ),
        Value(
            Engine(critic, task.engine, task.value_schedule, critic_weights),
            task.ppo.value_clip_range,
        ),
    )
    checkpoints = Checkpoints(task.run.checkpoints, _identity(learner), task.keep_checkpoints)
    found = checkpoints.load(learner.engines)
    if found is not None:
        learner.iteration = found.step
    return learner, checkpoints


def _identity(learner: Learner) -> dict[str, Any]:
    """What the training state belongs to."""
    task = learner.task
    policy, critic = learner.policy.engine.module, learner.value.engine.module
    assert isinstance(policy, Transformer) and isinstance(critic, ScalarModel)
    return identity(
        task.engine,
        policy=policy.config,
        critic=critic.config,
        policy_schedule=task.policy_schedule,
        value_schedule=task.value_schedule,
        ppo=task.ppo,
    )


def _tracker(task: LearnTask, first_step: int) -> Tracker:
    return Tracker(
        task.run,
        stage=task.run.name,
        total_steps=task.iterations,
        project=task.wandb_project,
        first_step=first_step,
        headline=("reward/composite", "ppo/kl_from_initial", "eval/gold", "time/iteration"),
    )


def _evaluate(task: LearnTask, step: int, version: Version) -> dict[str, float]:
    """Held-out results, on the first worker; the others meet it at the next collective call."""
    if training.rank() != 0:
        return {}
    started = time.perf_counter()
    call = task.coordinator.evaluate.remote(step, version)
    found: dict[str, float] = ray.get(call, timeout=3 * task.timeout)
    return found | {"time/evaluate": time.perf_counter() - started}
