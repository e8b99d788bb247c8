"""Command lines: options, presets, replays, help, and errors of one line."""

import ast
import inspect
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
import ray

from cluster.placement import Workers
from cluster.run_directory import RunDirectory
from jobs import cli, ppo, prepare, pretrain, quickstart, reward_model, sft, training
from jobs.configs import JobConfig, PPOConfig, SftConfig
from jobs.presets import Preset, preset
from jobs.quickstart import QuickstartConfig
from jobs.training import Inputs
from llama2.batches import TokenSequence
from llama2.config import RopeScaling
from llama2.shards import Manifest, ShardWriter

ROOT = Path(__file__).resolve().parents[2]
JOBS: dict[str, tuple[Callable[[Any], None], Callable[[Preset], JobConfig]]] = {
    "prepare": (prepare.main, lambda found: found.prepare),
    "pretrain": (pretrain.main, lambda found: found.pretrain),
    "sft": (sft.main, lambda found: found.sft),
    "reward_model": (reward_model.main, lambda found: found.helpfulness),
    "ppo": (ppo.main, lambda found: found.ppo),
    "quickstart": (quickstart.main, lambda found: QuickstartConfig(preset=found.ppo.preset)),
}


def parse_sft(*arguments: str) -> SftConfig:
    return cli.parse(list(arguments), lambda found: found.sft, "")


def parse_ppo(*arguments: str) -> PPOConfig:
    return cli.parse(list(arguments), lambda found: found.ppo, "")


def error(
    job: str, arguments: list[str], capsys: pytest.CaptureFixture[str], patch: pytest.MonkeyPatch
) -> str:
    """The only line on stderr of a job that is left with status 2."""
    main, default = JOBS[job]
    patch.setattr(sys, "argv", [f"jobs/{job}.py", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.run(main, default)
    assert stop.value.code == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert re.fullmatch(r"error: [^\n]+\n", said.err)
    assert not ray.is_initialized()
    return said.err


@pytest.mark.parametrize("job", JOBS)
def test_unknown_options_and_presets(
    job: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = error(job, ["--learning-speed", "3"], capsys, monkeypatch)
    assert "Unrecognized options: --learning-speed" in found
    found = error(job, ["--preset", "8b"], capsys, monkeypatch)
    assert "There is no preset '8b'; choose one of tiny, 7b, 13b, 34b, 70b." in found


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--peak-lr", "fast"], "--peak-lr"),
        (["--peak-lr"], "--peak-lr"),
        (["--schedule", "square"], "'square' for argument '--schedule'"),
        (["--workers.count", "0"], "A role needs at least one worker, not 0"),
        (["--engine.zero-stage", "0", "--engine.precision", "bfloat16"], "needs zero_stage 1, 2"),
        (["--model.num-attention-heads", "3"], "not a multiple of"),
        (["--preset"], "--preset needs a value"),
        (["--config", "gone.yaml"], "gone.yaml does not exist"),
        (["--name", "a/b"], "The run name 'a/b' cannot be used"),
        (["--data", "gone.jsonl", "--runs", "gone"], "gone"),
    ],
)
def test_wrong_values(
    arguments: list[str],
    expected: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert expected in error("sft", arguments, capsys, monkeypatch)


def test_a_large_preset_without_its_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = error("ppo", ["--preset", "7b", "--runs", str(tmp_path)], capsys, monkeypatch)
    assert "The runs 7b-sft, 7b-helpfulness, 7b-safety, 7b-data are not there" in found


def test_the_script_itself(tmp_path: Path) -> None:
    """A process of its own: nothing that is imported writes beside the one line."""
    ended = subprocess.run(
        [sys.executable, "jobs/ppo.py", "--preset", "huge"],
        cwd=ROOT, env=os.environ | {"RUNS_DIR": str(tmp_path)}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert ended.returncode == 2
    assert ended.stdout == ""
    assert ended.stderr == (
        "error: There is no preset 'huge'; choose one of tiny, 7b, 13b, 34b, 70b.\n"
    )


def test_options_override_the_preset() -> None:
    found = parse_sft("--preset=7b", "--peak-lr", "0.5", "--workers.count", "3", "--data", "a", "b")
    expected = preset("7b").sft
    assert found == replace(
        expected, peak_lr=0.5, workers=replace(expected.workers, count=3),
        data=(Path("a"), Path("b")),
    )  # fmt: skip
    assert parse_sft().preset == "tiny"


@pytest.mark.parametrize("name", ["tiny", "7b", "70b"])
@pytest.mark.parametrize("job", JOBS)
def test_a_runs_config_replays(job: str, name: str, tmp_path: Path) -> None:
    default = JOBS[job][1]
    config = replace(default(preset(name)), runs=tmp_path / "runs", seed=7, name="mine")
    run = RunDirectory(tmp_path, "mine")
    run.open(cli.plain(config))
    replayed = cli.parse(["--config", str(run.config)], default, "")
    assert replayed == config
    assert cli.parse([f"--config={run.config}", "--seed", "8"], default, "") == replace(
        config, seed=8
    )


def test_a_replay_keeps_files_and_nested_values(tmp_path: Path) -> None:
    scaled = replace(preset("tiny").sft.model, rope_scaling=RopeScaling("llama3", 8.0))
    config = replace(
        preset("tiny").sft, data=(tmp_path / "a.jsonl", Path("b")), start=Path("model"),
        model=replace(scaled, eos_token_id=(2, 5)), workers=Workers(count=5, gpus=0.5),
    )  # fmt: skip
    path = tmp_path / "config.yaml"
    path.write_text(cli.shown(config))
    assert parse_sft("--config", str(path)) == config
    found = parse_sft("--workers.cpus", "2", "--config", str(path))
    assert found == replace(config, workers=Workers(count=5, cpus=2.0, gpus=0.5))


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("clip_range: 0.2", "clip_range: wide", "field ppo.clip_range: "),
        ("clip_range: 0.2", "clip_rage: 0.2", "no field ppo.clip_rage"),
        ("temperature:", "temprature:", "no field temprature"),
        ("long_prompts: error", "long_prompts: keep", "field long_prompts: "),
        ("cpus: 0.5", "cpus: -1", "field learner: cpus and gpus must not be negative"),
        ("iterations: ", "iterations: {", "is not YAML"),
    ],
)
def test_a_wrong_field_of_a_config_is_named(
    old: str,
    new: str,
    expected: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text = cli.shown(preset("tiny").ppo)
    assert text.count(old) >= 1
    path = tmp_path / "config.yaml"
    path.write_text(text.replace(old, new))
    found = error("ppo", ["--config", str(path)], capsys, monkeypatch)
    assert str(path) in found
    assert expected in found


def test_another_jobs_config_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(cli.shown(preset("tiny").ppo))
    with pytest.raises(ValueError, match="this job has no field policy; is it another job's"):
        parse_sft("--config", str(path))


def documented(kind: type) -> dict[str, str]:
    """The strings below a dataclass's fields, as Sphinx, IDEs and tyro read them."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        if not is_dataclass(base):
            continue
        tree = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        assert isinstance(tree, ast.ClassDef)
        for field, below in zip(tree.body, tree.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                text = below.value if isinstance(below, ast.Expr) else None
                if isinstance(text, ast.Constant) and isinstance(text.value, str):
                    found[field.target.id] = " ".join(text.value.split())
    return found


def options(kind: type, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Every option of a config, with its help text or nothing."""
    hints, texts = get_type_hints(kind), documented(kind)
    for field in fields(kind):
        name = f"{prefix}{field.name.replace('_', '-')}"
        if is_dataclass(hints[field.name]):
            yield from options(hints[field.name], f"{name}.")
        elif not any(is_dataclass(choice) for choice in get_args(hints[field.name])):
            # What may be a dataclass or nothing (RoPE scaling) is set in config.yaml alone.
            yield f"--{name}", texts.get(field.name, "")


@pytest.mark.parametrize("job", JOBS)
def test_help_explains_every_option(
    job: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    main, default = JOBS[job]
    assert main.__doc__
    with pytest.raises(SystemExit) as stop:
        cli.parse(["--help"], default, main.__doc__)
    assert stop.value.code in (0, None)
    shown = capsys.readouterr().out
    flat = " ".join(re.sub(r"\x1b\[[0-9;]*m|[│╭╰─╮╯]", " ", shown).split())
    assert main.__doc__ in flat
    assert "--config FILE" in flat
    listed = dict(options(type(default(preset("tiny")))))
    assert [flag for flag in listed if not re.search(rf"{flag}[ ,]", flat)] == []
    assert [flag for flag, text in listed.items() if not text] == []
    assert [flag for flag, text in listed.items() if text[:25] not in flat] == []


PAPER: dict[str, dict[str, float]] = {
    "7b": {"pretrain": 3e-4, "reward": 1e-5, "beta": 0.01, "parameters": 6_738_415_616},
    "13b": {"pretrain": 3e-4, "reward": 1e-5, "beta": 0.01, "parameters": 13_015_864_320},
    "34b": {"pretrain": 1.5e-4, "reward": 1e-5, "beta": 0.005, "parameters": 33_743_970_304},
    "70b": {"pretrain": 1.5e-4, "reward": 5e-6, "beta": 0.005, "parameters": 68_976_648_192},
}


@pytest.mark.parametrize("size", PAPER)
def test_presets_carry_the_papers_numbers(size: str) -> None:
    numbers, found = PAPER[size], preset(size)
    assert found.pretrain.peak_lr == numbers["pretrain"]
    assert (found.pretrain.schedule, found.pretrain.warmup_steps) == ("cosine", 2000)
    assert found.prepare.context * found.pretrain.batch_rows == 4_194_304  # "4M tokens"
    assert found.pretrain.steps * 4_194_304 == pytest.approx(2.0e12, rel=0.05)
    assert (found.prepare.context, found.prepare.vocab_size) == (4096, 32_000)

    assert (found.sft.peak_lr, found.sft.schedule) == (2e-5, "cosine")
    assert (found.sft.batch_rows, found.sft.epochs, found.sft.steps) == (64, 2, 0)

    for reward, kind in ((found.helpfulness, "helpfulness"), (found.safety, "safety")):
        assert (reward.kind, reward.peak_lr, reward.schedule) == (kind, numbers["reward"], "cosine")
        assert (reward.batch_rows, reward.epochs, reward.steps) == (512, 1, 0)

    assert (found.ppo.lr, found.ppo.value_lr) == (1e-6, 1e-6)
    assert (found.ppo.batch_size, found.ppo.minibatch_size) == (512, 64)
    assert found.ppo.ppo.kl_coefficient == numbers["beta"]
    assert found.ppo.ppo.clip_range == 0.2
    assert (found.ppo.ppo.gamma, found.ppo.ppo.lam) == (1.0, 0.95)
    assert 200 <= found.ppo.iterations <= 400

    for stage in (found.pretrain, found.sft, found.helpfulness, found.safety, found.ppo):
        engine = stage.engine
        assert (engine.beta1, engine.beta2, engine.epsilon) == (0.9, 0.95, 1e-5)
        assert (engine.weight_decay, engine.clip_grad_norm) == (0.1, 1.0)
        assert stage.preset == size
    for training_stage in (found.pretrain, found.sft, found.helpfulness, found.safety):
        assert training_stage.model.num_parameters() == numbers["parameters"]


@pytest.mark.parametrize(("steps", "warmup"), [(20, 5), (100, 5), (166, 5), (200, 6), (1000, 30)])
def test_reward_models_warm_up_for_3_percent_and_5_steps_at_least(
    steps: int, warmup: int, tmp_path: Path
) -> None:
    answer = TokenSequence(np.array([1, 270, 2], np.int32), np.array([False, True, True]))
    for split in ("train", "heldout"):
        writer = ShardWriter(tmp_path / split, Manifest("preference", "0", 4096))
        writer.add([answer, answer])
        writer.close()
    config = replace(preset("7b").helpfulness, steps=steps)
    inputs = Inputs(tmp_path, tmp_path, None)
    run = RunDirectory(tmp_path, "mine")
    rows = tmp_path / "train"
    task = training._task(config, "reward_model", inputs, rows, config.model, run, tmp_path)
    assert task.schedule.warmup == warmup
    assert task.schedule(warmup - 1) == pytest.approx(1e-5)
    assert task.schedule(0) == pytest.approx(1e-5 / warmup)
    assert task.schedule(steps - 1) == pytest.approx(1e-6, rel=0.1)
