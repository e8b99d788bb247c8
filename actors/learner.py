"""The learner: one Ray Train group whose workers each hold a shard of the policy and, unless there
is no critic, of the value model.

An iteration is: publish the weights, take this worker's share of the samples, compute advantages,
update minibatch by minibatch.
"""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import ray
import torch
import torch.distributed
from ray.serve.exceptions import DeploymentUnavailableError

from actors.early_stopping import HeldOut
from actors.engine_loop import EngineFailed
from actors.experience import (
    ExperienceBatch,
    MiniBatches,
    collate,
    whiten_advantages,
    with_advantages,
    with_group_advantages,
    with_reference,
)
from actors.identity import identity
from actors.measures import UpdateSums
from actors.policy import Policy
from actors.pretraining_mix import PretrainingMix
from actors.records import Experience, Share
from actors.value import Value
from cluster import publishing, training
from cluster.checkpoints import Checkpoint, Checkpoints
from cluster.engine import Engine, EngineConfig
from cluster.run_directory import RunDirectory
from cluster.weights import Receipt, Version
from llama2 import checkpoint, kl
from llama2.at_once import at_once, in_turn
from llama2.entropy import EntropyUnembedding
from llama2.model import ScalarModel, Transformer
from llama2.ppo import PPOSettings
from llama2.schedules import Schedule

T = TypeVar("T")


@dataclass(frozen=True)
class LearnTask:
    """All that a learner's worker needs."""

    run: RunDirectory
    policy: Path
    critic: Path
    """Folder that the value model starts from, where there is one."""
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
    pretraining: Path | None = None
    """Rows of pretraining data, where their loss is mixed in."""
    patience: int = 0
    """Evaluations without a better held-out reward after which training ends; 0 never does."""
    seed: int = 0


@dataclass(frozen=True)
class ModelUpdate:
    """The update of one model."""

    sums: UpdateSums
    steps: Iterator[None]
    """Each is made when it is drawn."""
    engine: Engine

    @property
    def size(self) -> int:
        """Elements that are trained, to which a step's time is about proportional."""
        return sum(self.engine.sizes().values())


@dataclass
class Learner:
    """The state of one worker; `actors/learning.py` drives it."""

    task: LearnTask
    policy: Policy
    value: Value | None
    mix: PretrainingMix | None = None
    iteration: int = 0
    kl_coefficient: float = field(init=False)
    """Beta as it now is; at first the task's."""
    heldout: HeldOut = field(default_factory=HeldOut)
    """How evaluations went."""
    saved: int | None = None
    """Step of the newest checkpoint."""
    attempt: int | None = None
    """This worker's right to publish: later attempts of the learner shut it out."""

    def __post_init__(self) -> None:
        self.kl_coefficient = self.task.ppo.kl_coefficient

    @property
    def engines(self) -> dict[str, Engine]:
        """By the names that they have in checkpoints."""
        value = {} if self.value is None else {"value": self.value.engine}
        return {"policy": self.policy.engine} | value

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
    def experience(self, samples: Sequence[Sequence[Experience]]) -> MiniBatches:
        """Micro-batches of the samples of each minibatch, with advantages over the global batch
        (collective)."""
        ppo, size = self.task.ppo, self.task.micro_batch_size
        parts = [
            [rows[start : start + size] for start in range(0, len(rows), size)] for rows in samples
        ]
        works = [self._observed(rows) for part in parts for rows in part]
        observed = iter([batch for (batch,) in self._run(works)])
        minibatches = [[with_reference(next(observed), rows) for rows in part] for part in parts]
        coefficient = self.kl_coefficient if ppo.kl_place == "reward" else 0.0
        if self.value is None:
            minibatches = with_group_advantages(
                minibatches, ppo.algorithm, ppo.group_size, coefficient, ppo.estimator
            )
        else:
            minibatches = [
                [with_advantages(b, coefficient, ppo.gamma, ppo.lam, ppo.estimator) for b in part]
                for part in minibatches
            ]
        return whiten_advantages(minibatches) if ppo.whitens_advantages else minibatches

    def _observed(self, samples: Sequence[Experience]) -> Iterator[ExperienceBatch]:
        """Yields samples with the log-probabilities and values of before the update."""
        batch = collate(samples, self.policy.engine.device)
        if self.task.ppo.old_logprobs == "learner":
            old_BT = self.policy.logprobs(batch)
        else:
            old_BT = batch.sampled_logprobs_BT
        batch = replace(batch, old_logprobs_BT=old_BT)
        if self.value is not None:
            batch = replace(batch, values_BT=self.value.values(batch))
        yield batch

    def _run(self, works: Sequence[Iterator[T]]) -> list[list[T]]:
        """Do some independent `works` at once, unless their collective calls (ZeRO 3 makes some in
        every pass) must have one order."""
        single = training.world_size() == 1 and self.task.engine.zero_stage < 3
        return at_once(works) if single else in_turn(works)

    def update(self, minibatches: MiniBatches, totals: Sequence[int]) -> dict[str, float]:
        """One gradient step of policy and value model per minibatch, whose answer tokens over all
        workers are `totals` (collective). While the critic warms up the policy makes none.

        Raises `FloatingPointError`, before the weights of that model have changed, for a loss or
        gradient that is not finite.
        """
        updates = list(self._updates(minibatches, totals))
        sizes = [update.size for update in updates]
        counts = [round(len(totals) * min(sizes) / size) for size in sizes]
        if len(updates) == 2 and min(counts):  # at once, as long as both have steps
            self._run([islice(update.steps, n) for update, n in zip(updates, counts, strict=True)])
        in_turn([update.steps for update in updates])
        self.iteration += 1
        found: dict[str, float] = {}
        for update in updates:
            found |= update.sums.metrics(len(minibatches), sum(totals))
        return found

    def _updates(self, minibatches: MiniBatches, totals: Sequence[int]) -> Iterator[ModelUpdate]:
        """Those of the models that learn in this iteration."""
        if self.iteration >= self.task.ppo.critic_warmup:
            sums = UpdateSums("policy")
            steps = self._policy_steps(minibatches, totals, sums)
            yield ModelUpdate(sums, steps, self.policy.engine)
        if self.value is not None:
            sums = UpdateSums("value")
            steps = self._value_steps(self.value, minibatches, totals, sums)
            yield ModelUpdate(sums, steps, self.value.engine)

    def _policy_steps(
        self, minibatches: MiniBatches, totals: Sequence[int], sums: UpdateSums
    ) -> Iterator[None]:
        """The policy's part of an update; yields after each step."""
        ppo = self.task.ppo
        coefficient = self.kl_coefficient if ppo.kl_place == "loss" else 0.0
        for number, (batches, total) in enumerate(zip(minibatches, totals, strict=True)):
            with sums.timed():
                for batch in batches:
                    part = self.policy.loss(batch, total, coefficient, ppo.estimator)
                    self.policy.engine.backward(part.loss)
                    sums.add(
                        policy_loss=float(part.loss.detach()),
                        clipped=part.clipped,
                        approximate_kl=part.approximate_kl,
                        entropy=part.entropy,
                    )
                if self.mix is not None:
                    sums.add(ptx_loss=self.mix.backward(self.policy))
                self._step(self.policy.engine, sums, number)
            yield

    def _value_steps(
        self,
        value: Value,
        minibatches: MiniBatches,
        totals: Sequence[int],
        sums: UpdateSums,
    ) -> Iterator[None]:
        """The value model's part of an update; yields after each step."""
        for number, (batches, total) in enumerate(zip(minibatches, totals, strict=True)):
            with sums.timed():
                for batch in batches:
                    part = value.loss(batch, total)
                    value.engine.backward(part)
                    sums.add(value_loss=float(part.detach()))
                self._step(value.engine, sums, number)
            yield

    def _step(self, engine: Engine, sums: UpdateSums, minibatch: int) -> None:
        """Apply the gradients of a minibatch."""
        self._check(f"{sums.who} loss", sums.reduce(), minibatch)
        found = engine.step()
        sums.stepped(**found)
        self._check(f"{sums.who} gradient's norm", found["grad_norm"], minibatch)

    def adapt_kl(self, divergence: float, samples: int) -> None:
        """Move beta towards its target, after an iteration with this KL, in nats per answer; not
        before the policy has learned."""
        ppo = self.task.ppo
        if ppo.kl_target is not None and self.iteration > ppo.critic_warmup:
            self.kl_coefficient = kl.adapted(
                self.kl_coefficient, divergence, ppo.kl_target, ppo.kl_horizon, samples
            )

    def state(self, heldout: HeldOut) -> dict[str, Any]:
        """What a checkpoint holds besides the engines: beta, and `heldout` as of before the
        evaluation of its own step, which a resumed loop makes again."""
        return {"kl_coefficient": self.kl_coefficient, "heldout": asdict(heldout)}

    def restore(self, found: Checkpoint) -> None:
        """Take over what `state` told."""
        self.iteration = self.saved = found.step
        self.kl_coefficient = found.extra["kl_coefficient"]
        self.heldout = HeldOut(**found.extra["heldout"])

    def _check(self, what: str, value: float, minibatch: int) -> None:
        if not math.isfinite(value):
            raise FloatingPointError(
                f"{self.task.run.name}: the {what} is {value} in iteration {self.iteration}, "
                f"minibatch {minibatch}; lower the learning rates, or look at the rewards."
            )


def make_learner(task: LearnTask) -> tuple[Learner, Checkpoints]:
    """A worker's learner as of the newest checkpoint, where there is one (collective)."""
    learner = _new(task)
    checkpoints = Checkpoints(task.run.checkpoints, _identity(learner), task.keep_checkpoints)
    found = checkpoints.load(learner.engines)
    if found is not None:
        learner.restore(found)
    return learner, checkpoints


def _new(task: LearnTask) -> Learner:
    """A learner with the weights that training starts from."""
    ppo = task.ppo
    module, weights = checkpoint.stream(task.policy)
    module.model.activation_checkpointing = task.activation_checkpointing
    if ppo.entropy_coefficient:
        module.lm_head = EntropyUnembedding.of(module.lm_head)
    policy = Policy(
        Engine(module, task.engine, task.policy_schedule, weights),
        ppo.clip_range,
        ppo.entropy_coefficient,
    )
    mix = None
    if task.pretraining is not None:
        mix = PretrainingMix(
            task.pretraining, ppo.ptx_rows, ppo.ptx_coefficient, task.seed, task.micro_batch_size
        )
    return Learner(task, policy, _critic(task) if ppo.has_critic else None, mix)


def _critic(task: LearnTask) -> Value:
    critic, weights = checkpoint.stream_scalar_from(task.critic, seed=0)
    # Values are of whitened scores, the reward model's of raw ones: keep its trunk, begin at 0.
    weights = (
        (name, torch.zeros_like(weight) if name == "score.weight" else weight)
        for name, weight in weights
    )
    critic.model.activation_checkpointing = task.activation_checkpointing
    engine = Engine(critic, task.engine, task.value_schedule, weights)
    return Value(engine, task.ppo.value_clip_range)


def _identity(learner: Learner) -> dict[str, Any]:
    """What the training state belongs to."""
    task = learner.task
    policy = learner.policy.engine.module
    assert isinstance(policy, Transformer)
    parts: dict[str, Any] = {"policy": policy.config, "policy_schedule": task.policy_schedule}
    if learner.value is not None:
        critic = learner.value.engine.module
        assert isinstance(critic, ScalarModel)
        parts |= {"critic": critic.config, "value_schedule": task.value_schedule}
    if learner.mix is not None:
        parts |= {"pretraining": learner.mix.shards.fingerprint, "seed": task.seed}
    return identity(task.engine, ppo=task.ppo, **parts)
