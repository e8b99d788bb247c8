"""The learner's loop over iterations: sample, update, evaluate, save."""

import time
from contextlib import ExitStack
from dataclasses import replace
from functools import cache
from typing import Any

import ray
import torch.distributed

from actors.export import export
from actors.learner import Learner, LearnTask, make_learner
from actors.measures import measure
from actors.records import Experience, Place, ReferenceLogprobs, Share
from cluster import training
from cluster.checkpoints import Checkpoints
from cluster.tracking import Tracker
from cluster.weights import Version


def learn(task: LearnTask) -> None:
    """Run PPO on this worker, from the newest checkpoint to the last iteration or until `patience`
    is spent, and export the policy: the last one, or with `patience` the best one."""
    learner, checkpoints = make_learner(task)
    try:
        _iterate(learner, checkpoints)
    except FloatingPointError:
        checkpoints.close()  # what was saved before is to be whole
        raise
    checkpoints.close()
    if task.patience and learner.heldout.best_step != learner.iteration:
        checkpoints.load_best(learner.engines)
    export(learner.policy.engine, task.tokenizer, task.run.model)
    for engine in learner.engines.values():
        engine.close()


def _iterate(learner: Learner, checkpoints: Checkpoints) -> None:
    task, lead = learner.task, training.rank() == 0
    with ExitStack() as stack:
        tracker = stack.enter_context(_tracker(task, learner.iteration)) if lead else None
        while True:
            step, started, before = learner.iteration, time.perf_counter(), learner.heldout
            version, metrics = learner.publish()
            if step % task.eval_every == 0 or step == task.iterations:
                metrics |= _evaluate(learner, version)
            ends = step == task.iterations or 0 < task.patience <= learner.heldout.stale
            if _is_due(learner, ends):
                reward = metrics.get("eval/reward") if task.patience else None
                score = None if reward is None else -reward  # of scores the lowest is best
                checkpoints.save(step, learner.engines, learner.state(before), score)
                learner.saved = step
            if not ends:
                metrics |= _learn_once(learner, version)
                metrics["time/iteration"] = time.perf_counter() - started
            if tracker is not None:
                tracker.log(step, metrics)
            if ends:
                return


def _is_due(learner: Learner, ends: bool) -> bool:
    task, step = learner.task, learner.iteration
    if step == learner.saved:
        return False
    better = learner.heldout.best is not None and learner.heldout.best_step == step
    better = better and task.patience > 0
    return ends or better or (step > 0 and step % task.save_every == 0)


def _learn_once(learner: Learner, version: Version) -> dict[str, float]:
    """Sample with the weights `version` and learn from it. Returns what is to be recorded."""
    share = learner.share(version)
    started = time.perf_counter()
    minibatches = learner.experience(gather(share))
    metrics = share.metrics | measure(minibatches, has_critic=learner.value is not None)
    learning = time.perf_counter()
    metrics |= {
        "time/experience": learning - started,
        "ppo/kl_coefficient": learner.kl_coefficient,
    }
    metrics |= learner.update(minibatches, [part.total_tokens for part in share.minibatches])
    learner.adapt_kl(metrics["ppo/kl_from_initial"], share.samples)
    return metrics | {"time/update": time.perf_counter() - learning}


def gather(share: Share) -> list[list[Experience]]:
    """Fetch a share's chunks and pick its samples from them, minibatch by minibatch. What the
    reference says of them is waited for where it is used."""
    rollouts = ray.get(share.rollouts)

    @cache
    def reference(chunk: int) -> ReferenceLogprobs:
        found: ReferenceLogprobs = ray.get(share.references[chunk])
        return found

    def experience(place: Place) -> Experience:
        sample = rollouts[place.chunk].samples[place.row]
        return Experience(
            sample, lambda: reference(place.chunk).logprobs[place.row], place.score, place.slot
        )

    return [[experience(place) for place in part.places] for part in share.minibatches]


def _tracker(task: LearnTask, first_step: int) -> Tracker:
    return Tracker(
        task.run,
        stage=task.run.name,
        total_steps=task.iterations,
        project=task.wandb_project,
        first_step=first_step,
        headline=("reward/composite", "ppo/kl_from_initial", "eval/gold", "time/iteration"),
    )


def _evaluate(learner: Learner, version: Version) -> dict[str, float]:
    """Held-out results of the current iteration on the first worker; all learn of the reward
    (collective)."""
    task, step, started = learner.task, learner.iteration, time.perf_counter()
    found: dict[str, float] = {}
    if training.rank() == 0:
        call = task.coordinator.evaluate.remote(step, version)
        found = ray.get(call, timeout=3 * task.timeout)
    box: list[Any] = [found.get("eval/reward")]
    torch.distributed.broadcast_object_list(box)
    learner.heldout = learner.heldout.evaluated(step, box[0])
    if step <= task.ppo.critic_warmup:  # the policy is still the one that it was
        learner.heldout = replace(learner.heldout, stale=0)
    return found | {"eval/reward": box[0], "time/evaluate": time.perf_counter() - started}
