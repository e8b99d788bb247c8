"""All stages on a real local Ray cluster, as small as can be: Data, Train, Serve, DeepSpeed."""

import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from ray.util.state import list_actors

from actors.coordinator import read_evaluation
from actors.generator_config import GeneratorConfig
from cluster.placement import Workers
from cluster.run_directory import RunDirectory, read_json_lines
from cluster.session import ClusterConfig, session
from jobs import ppo, prepare, pretrain, reward_model, sft
from jobs.configs import SftConfig
from jobs.presets import Preset, tiny
from llama2 import checkpoint

ITERATIONS = 3


def small(runs: Path) -> Preset:
    """The tiny preset with less of everything, in float32 so that numbers can be compared."""
    preset = tiny()
    engine = replace(preset.ppo.engine, precision="float32")
    brief: dict[str, Any] = {
        "runs": runs,
        "steps": 4,
        "eval_every": 0,
        "eval_rows": 16,
        "engine": engine,
    }
    return Preset(
        prepare=replace(
            preset.prepare, runs=runs, world_documents=600, world_dialogues=400,
            world_comparisons=300, world_prompts=200, world_heldout_prompts=24,
        ),
        pretrain=replace(preset.pretrain, **brief),
        sft=replace(preset.sft, **brief),
        helpfulness=replace(preset.helpfulness, **brief),
        safety=replace(preset.safety, **brief),
        ppo=replace(
            preset.ppo, runs=runs, iterations=ITERATIONS, batch_size=16, minibatch_size=8,
            micro_batch_size=2, max_new_tokens=12, eval_every=2, save_every=2,
            engine=engine,
        ),
    )  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with session(ClusterConfig(local_cpus=2)):
        yield tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def chain(runs: Path) -> Preset:
    """All stages, run once for the tests of this file."""
    preset = small(runs)
    prepare.main(preset.prepare)
    pretrain.main(preset.pretrain)
    sft.main(preset.sft)
    reward_model.main(preset.helpfulness)
    reward_model.main(preset.safety)
    ppo.main(preset.ppo)
    return preset


def metrics(runs: Path, name: str) -> list[dict[str, Any]]:
    return read_json_lines(RunDirectory(runs, name).metrics)


def test_every_iteration_serves_the_trainers_weights(chain: Preset, runs: Path) -> None:
    found = metrics(runs, "tiny-ppo")
    assert [line["step"] for line in found] == list(range(ITERATIONS + 1))
    for line in found:
        assert line["publish/version"] == line["step"]
        assert line["publish/distinct_checksums"] == 1


def test_generator_and_trainer_agree_on_every_token(chain: Preset, runs: Path) -> None:
    for line in metrics(runs, "tiny-ppo")[:ITERATIONS]:
        assert line["rollout/logprob_difference"] < 1e-4
        assert line["rollout/refused_as_stale"] == 0


def test_the_policy_starts_at_the_reference_and_leaves_it(chain: Preset, runs: Path) -> None:
    found = metrics(runs, "tiny-ppo")
    assert abs(found[0]["ppo/kl_from_initial"]) < 1e-3
    assert found[ITERATIONS - 1]["ppo/kl_from_initial"] > 1e-3
    assert all(math.isfinite(value) for line in found for value in line.values())


def test_results_come_from_the_runs_files(chain: Preset, runs: Path) -> None:
    run = RunDirectory(runs, "tiny-ppo")
    before, after = read_evaluation(run, 0), read_evaluation(run, ITERATIONS)
    summary = run.summary()
    assert summary is not None
    assert len(before) == len(after) == summary["prompts"] == 24
    gold = [sum(answer.gold or 0 for answer in answers) / 24 for answers in (before, after)]
    assert summary["before"]["gold"] == pytest.approx(gold[0])
    assert summary["gain"] == pytest.approx(gold[1] - gold[0])
    assert run.report.read_text().count("<svg") > 10
    assert list(run.path.glob("wandb/**/*.wandb"))


def test_the_result_is_a_hugging_face_model(chain: Preset, runs: Path) -> None:
    import transformers

    folder = RunDirectory(runs, "tiny-ppo").model
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer("Where does Mira live?", return_tensors="pt").input_ids
    ours = checkpoint.load(folder)
    torch.testing.assert_close(ours(tokens), theirs(tokens).logits, atol=1e-4, rtol=0)


def test_a_second_run_says_that_it_is_done(
    chain: Preset, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunDirectory(runs, "tiny-ppo")
    before = run.metrics.read_text()
    ppo.main(chain.ppo)
    assert "finished already" in capsys.readouterr().out
    assert run.metrics.read_text() == before


def run_and_kill(main: Callable[[], None], run: RunDirectory, steps: int) -> None:
    """Run a job and kill one of its training workers as soon as so many steps are recorded."""
    finished = threading.Thread(target=main)
    finished.start()
    deadline = time.monotonic() + 120
    while not (run.metrics.exists() and run.metrics.read_text().count("\n") >= steps):
        assert time.monotonic() < deadline, "the first steps take too long"
        time.sleep(0.05)
    workers = list_actors(filters=[("class_name", "=", "RayTrainWorker"), ("state", "=", "ALIVE")])
    os.kill(workers[0].pid, signal.SIGKILL)
    finished.join(timeout=240)
    assert not finished.is_alive()


@pytest.fixture(scope="module")
def whole(chain: Preset) -> SftConfig:
    """A training that nobody killed. It evaluates and saves at other steps than each other's."""
    config = replace(chain.sft, name="sft-whole", steps=60, eval_every=10, save_every=7)
    sft.main(config)
    return config


def assert_as_if_not_killed(runs: Path, name: str) -> None:
    speed = "targets_per_second"
    before, after = (
        [{key: x for key, x in line.items() if key != speed} for line in metrics(runs, run)]
        for run in ("sft-whole", name)
    )
    assert len(before) == 61
    assert after == before
    assert RunDirectory(runs, name).summary() == RunDirectory(runs, "sft-whole").summary()


def test_a_killed_training_gives_the_same_losses_to_the_bit(whole: SftConfig, runs: Path) -> None:
    killed = replace(whole, name="sft-killed")
    run_and_kill(lambda: sft.main(killed), RunDirectory(runs, "sft-killed"), steps=10)
    assert_as_if_not_killed(runs, "sft-killed")


def test_a_killed_job_goes_on_when_it_is_started_again(whole: SftConfig, runs: Path) -> None:
    """SIGKILL to the driver, which takes the whole group with it."""
    run = RunDirectory(runs, "sft-job")
    config = RunDirectory(runs, "sft-whole").config
    job = subprocess.Popen(
        [sys.executable, "jobs/sft.py", "--config", str(config), "--name", run.name],
        env=os.environ
        | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address, "RAY_AUTH_MODE": "token"},
        cwd=Path(__file__).parents[2],
    )
    deadline = time.monotonic() + 120
    while not run.metrics.exists() or len(read_json_lines(run.metrics)) < 17:
        assert job.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.05)
    job.kill()
    job.wait()
    assert not run.is_finished
    sft.main(replace(whole, name=run.name))
    assert_as_if_not_killed(runs, run.name)


def test_a_killed_worker_changes_nothing(chain: Preset, runs: Path) -> None:
    """SIGKILL to a learner's worker in mid-run: the group starts again from its last checkpoint."""
    killed = replace(chain.ppo, name="ppo-killed", save_every=1)
    run_and_kill(lambda: ppo.main(killed), RunDirectory(runs, "ppo-killed"), steps=1)
    before, after = metrics(runs, "tiny-ppo"), metrics(runs, "ppo-killed")
    assert [line["step"] for line in after] == list(range(ITERATIONS + 1))
    same = ("loss", "value/loss", "reward/composite", "ppo/kl_from_initial", "ppo/entropy")
    for old, new in zip(before[:ITERATIONS], after[:ITERATIONS], strict=True):
        assert [old[name] for name in same] == pytest.approx([new[name] for name in same], rel=1e-5)


def test_one_worker_and_other_splits_give_the_same_losses(chain: Preset, runs: Path) -> None:
    two = [line["loss"] for line in metrics(runs, "tiny-sft")[:4]]
    alone = replace(chain.sft, name="alone", workers=Workers(count=1), micro_batch_tokens=700)
    sft.main(alone)
    one = [line["loss"] for line in metrics(runs, "alone")[:4]]
    assert one == pytest.approx(two, abs=2e-5)


def test_one_learner_gives_the_same_ppo(chain: Preset, runs: Path) -> None:
    alone = replace(
        chain.ppo, name="ppo-alone", learner=Workers(count=1, cpus=0.5), micro_batch_size=5,
        iterations=2, generator=GeneratorConfig(count=1, cpus=0.2),
    )  # fmt: skip
    ppo.main(alone)
    one, two = metrics(runs, "ppo-alone"), metrics(runs, "tiny-ppo")
    for name in ("loss", "value/loss", "reward/composite", "ppo/kl_from_initial", "ppo/entropy"):
        assert [x[name] for x in one[:2]] == pytest.approx([x[name] for x in two[:2]], abs=1e-4)
