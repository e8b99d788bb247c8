"""The learner's options: what each does, that they come back from a checkpoint, and that another
number of workers changes nothing."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
import torch.distributed
from torch import Tensor

from actors import learner as learner_module
from actors.experience import collate, with_group_advantages
from actors.learner import Learner, LearnTask, make_learner
from actors.learning import gather, learn
from actors.measures import measure
from cluster import training
from cluster.engine import EngineConfig
from cluster.run_directory import RunDirectory, read_json_lines
from cluster.weights import Version
from llama2 import checkpoint, kl
from llama2.advantages import leave_one_out
from llama2.at_once import at_once, in_turn
from llama2.ppo import PPOSettings
from tests.actors.small_learning import coordinator, experiences, learn_task, run_directory, share
from tests.cluster.gloo import run_group

ALONE = pytest.mark.usefixtures("group_of_one")
BETA = 0.2
ALL = PPOSettings(
    kl_coefficient=BETA, kl_estimator="k3", kl_target=0.05, kl_horizon=40, critic_warmup=1,
    entropy_coefficient=0.01, ptx_coefficient=0.5, ptx_rows=3,
)  # fmt: skip
GRPO = PPOSettings(algorithm="grpo", group_size=3, kl_coefficient=BETA, kl_target=0.05)
RLOO = PPOSettings(algorithm="rloo", group_size=3, kl_coefficient=BETA, whiten_advantages=True)
OPTIONS = {"all": ALL, "grpo": GRPO, "rloo": RLOO}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("learning")


@pytest.fixture(autouse=True)
def without_a_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setattr(ray, "get", lambda found, timeout=None: found)
    monkeypatch.setattr(Learner, "publish", lambda self: (Version(self.iteration, ""), {}))


def weights(learner: Learner, who: str) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in learner.engines[who].weights()}


def same(some: dict[str, Tensor], others: dict[str, Tensor]) -> bool:
    return all(torch.equal(tensor, others[name]) for name, tensor in some.items())


def iterate(learner: Learner, root: Path) -> dict[str, float]:
    """An iteration as the loop does it, without its times."""
    dealt = share(root, learner.iteration, training.rank(), training.world_size())
    minibatches = learner.experience(gather(dealt))
    found = measure(minibatches, has_critic=learner.value is not None)
    found |= learner.update(minibatches, [part.total_tokens for part in dealt.minibatches])
    learner.adapt_kl(found["ppo/kl_from_initial"], dealt.samples)
    found["beta"] = learner.kl_coefficient
    return {name: value for name, value in found.items() if not name.startswith("time/")}


def started(task: LearnTask) -> Learner:
    learner, checkpoints = make_learner(task)
    checkpoints.close()
    return learner


def close(*learners: Learner) -> None:
    for learner in learners:
        for engine in learner.engines.values():
            engine.close()


@ALONE
def test_the_baseline_is_that_of_the_whole_group(root: Path) -> None:
    """Each answer's advantage, by hand, of groups that are spread over minibatches; with the KL of
    the whole answer taken off its score."""
    learner = started(learn_task(root, "baseline", replace(RLOO, whiten_advantages=False)))
    assert list(learner.engines) == ["policy"]
    found = learner.experience(gather(share(root, 0, 0, 1)))
    made = experiences(root, 0)
    assert len({batch.slots_B[0].item() // 3 for batch in found[0]}) > 1
    rewards = torch.tensor(
        [e.score - BETA * float((e.sample.logprobs - e.reference_logprobs()).sum()) for e in made]
    )
    expected = leave_one_out(rewards, 3)
    seen = 0
    for batch in (batch for minibatch in found for batch in minibatch):
        for row, slot in enumerate(batch.slots_B.tolist()):
            mine = batch.advantages_BT[row][batch.mask_BT[row]]
            assert len(mine) == len(made[slot].sample.response)
            torch.testing.assert_close(mine, expected[slot].expand(len(mine)), atol=1e-5, rtol=0)
            seen += 1
    assert seen == len(made)
    close(learner)


@ALONE
@pytest.mark.parametrize(
    ("precision", "stage"), [("float32", 0), ("float32", 1), ("bfloat16", 1), ("bfloat16", 2)]
)
def test_policy_and_value_model_at_once_learn_what_they_learn_in_turn(
    root: Path, monkeypatch: pytest.MonkeyPatch, threads: None, precision: Any, stage: Any
) -> None:
    """And a run is the same to the bit each time, whoever is quicker. Where an operation in float32
    has one thread instead of two, it may round otherwise."""
    found, ways = [], []
    torch.set_num_threads(2)
    for way in (at_once, at_once, in_turn):

        def spied(works: Any, way: Any = way) -> Any:
            ways.append((way, len(works)))
            return way(works)

        monkeypatch.setattr(learner_module, "at_once", spied)
        engine = EngineConfig(zero_stage=stage, precision=precision)
        learner = started(learn_task(root, f"at-once-{precision}-{stage}", ALL, engine=engine))
        numbers = [iterate(learner, root) for _ in range(3)]
        found.append((numbers, weights(learner, "policy"), weights(learner, "value")))
        close(learner)
    (numbers, policy, value), again, in_turns = found
    assert numbers == again[0]
    assert same(policy, again[1])
    assert same(value, again[2])
    for line, other in zip(numbers, in_turns[0], strict=True):
        assert line == pytest.approx(other, rel=1e-3, abs=1e-5)
    # Six micro-batches of samples; then both models, not while the value model warms up.
    assert [count for _, count in ways] == 3 * [6, 6, 2, 6, 2]


@ALONE
def test_passes_of_zero_3_go_in_turn(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learner_module, "at_once", None)
    engine = EngineConfig(zero_stage=3)
    learner = started(learn_task(root, "zero-3", PPOSettings(), engine=engine))
    assert math.isfinite(iterate(learner, root)["value/loss"])
    close(learner)


@ALONE
def test_work_of_several_workers_goes_in_turn(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else their collective calls could meet each other's in another order."""
    learner = started(learn_task(root, "in-turn", PPOSettings()))
    monkeypatch.setattr(learner_module, "at_once", lambda works: "at once")
    assert learner._run([iter([1]), iter([2])]) == "at once"
    monkeypatch.setattr(training, "world_size", lambda: 2)
    assert learner._run([iter([1]), iter([2])]) == [[1], [2]]
    close(learner)


@ALONE
@pytest.mark.parametrize("whose", ["learner", "generator"])
def test_old_log_probabilities_are_whose_the_setting_says(root: Path, whose: Any) -> None:
    task = learn_task(root, f"old-{whose}", PPOSettings(old_logprobs=whose))
    learner = started(task)
    (minibatch, *_) = gather(share(root, 0, 0, 1))
    shifted = [
        replace(e, sample=replace(e.sample, logprobs=e.sample.logprobs - 0.5)) for e in minibatch
    ]
    for batch in learner.experience([shifted])[0]:
        wanted = batch.sampled_logprobs_BT + (0.5 if whose == "learner" else 0.0) * batch.mask_BT
        torch.testing.assert_close(batch.old_logprobs_BT, wanted, atol=1e-5, rtol=0)
    close(learner)


@ALONE
def test_equal_scores_teach_nothing(root: Path) -> None:
    equal = [replace(e, score=3.3) for e in experiences(root, 0)]
    batches = [[collate(equal[:6], torch.device("cpu"))], [collate(equal[6:], torch.device("cpu"))]]
    for algorithm in ("grpo", "rloo"):
        found = with_group_advantages(batches, algorithm, 3, 0.0, "k3")
        assert all(not batch.advantages_BT.any() for part in found for batch in part)


@ALONE
def test_only_the_critic_learns_while_it_warms_up(root: Path) -> None:
    learner = started(learn_task(root, "warmup", ALL))
    before = {who: weights(learner, who) for who in learner.engines}
    found = iterate(learner, root)
    assert "value/loss" in found
    assert not {"loss", "policy/grad_norm", "ptx/loss"} & set(found)
    assert same(weights(learner, "policy"), before["policy"])
    assert not same(weights(learner, "value"), before["value"])
    assert {"loss", "policy/grad_norm", "ptx/loss"} < set(iterate(learner, root))
    assert not same(weights(learner, "policy"), before["policy"])
    close(learner)


@ALONE
@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_kl_and_entropy_in_the_loss_are_those_of_autograd(root: Path, estimator: Any) -> None:
    """The loss of a micro-batch and its gradient, against the same formula on all logits."""
    ppo = replace(GRPO, kl_estimator=estimator, entropy_coefficient=0.3)
    learner = started(learn_task(root, f"loss-{estimator}", ppo))
    batch = learner.experience(gather(share(root, 0, 0, 1)))[0][0]
    found = learner.policy.loss(batch, 7, BETA, estimator)
    plain = checkpoint.load(root / "start")
    chances = torch.distributions.Categorical(
        logits=plain(batch.tokens_BT, batch.segments_BT)[batch.mask_BT]
    )
    logprobs = chances.log_prob(batch.targets_BT[batch.mask_BT])
    # The ratio is 1, so the surrogate is the mean advantage.
    ratio = torch.exp(logprobs - logprobs.detach())
    surrogate = (ratio * batch.advantages_BT[batch.mask_BT]).sum()
    reference = batch.reference_logprobs_BT[batch.mask_BT]
    divergence = kl.ESTIMATORS[estimator](logprobs, reference).sum()
    entropy = chances.entropy().sum()
    loss = (-surrogate + BETA * divergence - 0.3 * entropy) / 7
    torch.testing.assert_close(found.loss, loss, atol=1e-5, rtol=1e-5)
    assert found.entropy == pytest.approx(float(entropy.detach()), rel=1e-5)
    module = learner.policy.engine.module
    mine = torch.autograd.grad(found.loss, list(module.parameters()))
    theirs = torch.autograd.grad(loss, list(plain.parameters()))
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-3)
    close(learner)


@ALONE
def test_pretraining_data_is_kept_in_mind(root: Path) -> None:
    """Its loss falls where it is mixed in, by rows that follow from seed and update."""
    mixed = replace(PPOSettings(), ptx_coefficient=5.0, ptx_rows=6)
    learner = started(learn_task(root, "ptx", mixed))
    losses = [iterate(learner, root)["ptx/loss"] for _ in range(6)]
    assert losses[-1] < losses[0] - 0.3
    again = started(learn_task(root, "ptx-again", mixed))
    assert iterate(again, root)["ptx/loss"] == losses[0]
    other = started(learn_task(root, "ptx-other", mixed, seed=1))
    assert iterate(other, root)["ptx/loss"] != losses[0]
    close(learner, again, other)


def dealt(root: Path, tasks: dict[str, LearnTask], path: Path) -> None:
    ray.get = lambda found, timeout=None: found
    found = {}
    for name, task in tasks.items():
        learner = started(task)
        found[name] = [iterate(learner, root) for _ in range(2)]
        close(learner)
    if training.rank() == 0:
        torch.save(found, path)


def test_two_workers_learn_as_one_does(root: Path, tmp_path: Path) -> None:
    """However their state is sharded."""
    groups = {"alone": (1, 1), "zero-1": (2, 1), "zero-2": (2, 2), "zero-3": (2, 3)}
    for group, (world, stage) in groups.items():
        tasks = {
            name: learn_task(
                root, f"dealt-{name}-{group}", ppo, coordinator=None,
                engine=EngineConfig(zero_stage=stage),  # type: ignore[arg-type]
            )
            for name, ppo in OPTIONS.items()
        }  # fmt: skip
        run_group(world, dealt, root, tasks, tmp_path / group)
    alone, *others = (torch.load(tmp_path / group) for group in groups)
    for shared in others:
        for name in OPTIONS:
            for one, two in zip(alone[name], shared[name], strict=True):
                assert two == pytest.approx(one, rel=2e-3, abs=2e-5)


def lines(found: RunDirectory) -> list[dict[str, Any]]:
    return [
        {name: value for name, value in line.items() if not name.startswith("time/")}
        for line in read_json_lines(found.metrics)
    ]


@ALONE
@pytest.mark.parametrize("name", OPTIONS)
def test_a_run_that_died_goes_on_as_if_it_had_not(root: Path, name: str) -> None:
    """Checkpoints hold all that the options need: beta, the warmup, the pretraining rows."""
    whole = learn_task(root, f"whole-{name}", OPTIONS[name], save_every=2)
    learn(whole)
    task = replace(whole, run=learn_task(root, f"died-{name}", OPTIONS[name]).run)
    with pytest.raises(KeyboardInterrupt):
        learn(replace(task, coordinator=coordinator(root, [0.0] * 9, dies_at=3)))
    learn(task)
    expected = lines(whole.run)
    assert [line["step"] for line in expected] == [0, 1, 2, 3, 4]
    assert lines(task.run) == expected
    betas = {line["ppo/kl_coefficient"] for line in expected[:-1]}
    settings = OPTIONS[name]
    assert len(betas) == (1 if settings.kl_target is None else 4 - settings.critic_warmup)
    assert same(
        checkpoint.load(task.run.model).state_dict(), checkpoint.load(whole.run.model).state_dict()
    )


@ALONE
def test_patience_begins_when_the_policy_learns(root: Path) -> None:
    settings = PPOSettings(critic_warmup=2)
    task = learn_task(
        root, "warm", settings, patience=1, iterations=6, coordinator=coordinator(root, [0] * 9)
    )
    learn(task)
    assert [line["step"] for line in lines(task.run)] == [0, 1, 2, 3]


@ALONE
def test_early_stopping_keeps_the_best_policy(root: Path) -> None:
    """Also where it died just after the best evaluation, whose checkpoint is old by then."""
    found = coordinator(root, [0.0, 0.5, 0.4, 0.5, 0.9])
    patient = learn_task(root, "patient", GRPO, coordinator=found, patience=2, save_every=100)
    learn(patient)
    assert [line["step"] for line in lines(patient.run)] == [0, 1, 2, 3]
    best = learn_task(root, "best", GRPO, iterations=1)
    learn(best)
    expected = checkpoint.load(best.run.model).state_dict()
    assert same(checkpoint.load(patient.run.model).state_dict(), expected)

    died = replace(patient, run=learn_task(root, "patient-died", GRPO).run)
    with pytest.raises(KeyboardInterrupt):
        learn(replace(died, coordinator=coordinator(root, [0.0, 0.5, 0.4], dies_at=2)))
    learn(died)
    assert lines(run_directory(root, "patient-died")) == lines(patient.run)
    assert same(checkpoint.load(died.run.model).state_dict(), expected)
    first = learn_task(
        root, "never-better", GRPO, patience=1, coordinator=coordinator(root, [0] * 9)
    )
    learn(first)
    assert same(
        checkpoint.load(first.run.model).state_dict(), checkpoint.load(root / "start").state_dict()
    )
