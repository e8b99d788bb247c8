"""A run's checkpoints after accidents: what is damaged, torn, full, refused or pruned."""

import logging
import os
import re
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
import torch.multiprocessing

from cluster import checkpoint_files as files
from cluster.checkpoints import Checkpoint, Checkpoints
from tests.cluster.gloo import (
    STEPS,
    Net,
    State,
    changed_net,
    differences,
    engine_of,
    run_group,
    train,
    whole_state,
)

CASE = ("float32", 2, "none")
IDENTITY = {"model": {"width": 15, "names": ["first", "last"]}, "optimizer": {"beta2": 0.95}}


def first_rank() -> bool:
    return torch.distributed.get_rank() == 0


def make_run(root: Path, steps: int, scores: list[float | None] | None = None) -> None:
    """A checkpoint after every step, and the state of each."""
    engine = engine_of(CASE)
    checkpoints = Checkpoints(root / "run", IDENTITY, keep_last=2)
    for step in range(1, steps + 1):
        train(engine, step - 1, step, split=2)
        score = scores[step - 1] if scores else None
        checkpoints.save(step, {"net": engine}, {"step": step}, score)
        state = whole_state(engine)
        if first_rank():
            torch.save(state, root / f"state-{step}.pt")
    checkpoints.close()
    engine.close()


def load_run(root: Path, best: bool = False) -> None:
    """Load into a fresh engine; leave what came of it, and the log."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("cluster").addHandler(handler)
    engine = engine_of(CASE, changed_net())
    checkpoints = Checkpoints(root / "run", IDENTITY, keep_last=2)
    load = checkpoints.load_best if best else checkpoints.load
    error, found = None, None
    try:
        found = load({"net": engine})
    except ValueError as problem:
        error = str(problem)
    state = whole_state(engine)
    if first_rank():
        torch.save((found, error, lines, state), root / "loaded.pt")


def loaded(root: Path) -> tuple[Checkpoint | None, str | None, list[str], State]:
    return torch.load(root / "loaded.pt", weights_only=False)


def state_of(root: Path, step: int) -> State:
    return torch.load(root / f"state-{step}.pt")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("run")
    run_group(2, make_run, root, 2)
    return root


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    """A run of its own, with checkpoints of steps 1 and 2."""
    return Path(shutil.copytree(run, tmp_path / "copy"))


def flip_a_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-3])


DAMAGE: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "flipped byte": ("net.rank00001.safetensors", flip_a_byte, "does not match its checksum"),
    "truncated": ("net.rank00000.safetensors", truncate, "bytes instead of"),
    "missing": ("net.rank00001.safetensors", Path.unlink, "is missing"),
    "manifest": ("manifest.json", flip_a_byte, "manifest.json"),
    "no manifest": ("manifest.json", Path.unlink, "manifest.json is missing"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_used(
    copy: Path, kind: str
) -> None:
    name, damage, message = DAMAGE[kind]
    newest = copy / "run" / "step_00000002"
    damage(newest / name)
    run_group(2, load_run, copy)
    checkpoint, error, lines, state = loaded(copy)
    assert error is None
    assert checkpoint is not None
    assert checkpoint.step == 1
    assert differences(state, state_of(copy, 1)) == []
    assert len(lines) == 1
    assert str(newest / name) in lines[0]
    assert re.search(message, lines[0])
    assert not newest.exists()
    assert newest.with_name("step_00000002.damaged").is_dir()


def test_nothing_is_whole(copy: Path) -> None:
    for step in (1, 2):
        flip_a_byte(copy / "run" / f"step_0000000{step}" / "net.rank00000.safetensors")
    run_group(2, load_run, copy)
    checkpoint, error, lines, _ = loaded(copy)
    assert checkpoint is None
    assert error is not None
    assert error.startswith(f"No checkpoint in {copy / 'run'} is whole")
    assert len(lines) == 2
    # The same command again must not begin at step 0 as if there had never been one.
    run_group(2, load_run, copy)
    assert loaded(copy)[1] == error


def test_a_run_without_checkpoints(tmp_path: Path) -> None:
    run_group(2, load_run, tmp_path)
    assert loaded(tmp_path)[:3] == (None, None, [])


def refused(root: Path, identity: dict[str, Any], net: Net, names: list[str], error: str) -> None:
    checkpoints = Checkpoints(root / "run", identity)
    engine = engine_of(CASE, net)
    with pytest.raises(ValueError, match=error) as caught:
        checkpoints.load(dict.fromkeys(names, engine))
    assert "\n" not in str(caught.value)


def refuse_all(root: Path) -> None:
    other = {"model": {"width": 16, "names": ["first", "last"]}, "optimizer": {"beta1": 0.9}}
    fields = (
        r"step_00000002 was made with other settings: model.width \(15 there, 16 now\), "
        r"optimizer.beta2 \(0.95 there, 'absent' now\), optimizer.beta1 \('absent' there, 0.9 now\)"
    )
    refused(root, other, Net(), ["net"], fields)
    refused(root, IDENTITY, Net(), ["policy"], "the state of net, and not of policy")
    sizes = "another net model: first.weight has 90 elements there and 96 now"
    refused(root, IDENTITY, Net(width=16), ["net"], sizes)


def test_checkpoints_of_other_settings_or_models_are_refused(copy: Path) -> None:
    run_group(2, refuse_all, copy)
    names = {path.name for path in (copy / "run").iterdir()}
    assert names == {"step_00000001", "step_00000002"}  # refused is not damaged


def test_another_format_is_refused(copy: Path) -> None:
    manifest = copy / "run" / "step_00000002" / "manifest.json"
    content = files.read_json(manifest)
    files.write_json(manifest, {**content, "format": files.FORMAT + 1})
    run_group(2, load_run, copy)
    _, error, _, _ = loaded(copy)
    assert error is not None
    assert "another version of this program" in error


def die_writing(root: Path) -> None:
    engine = engine_of(CASE)
    checkpoints = Checkpoints(root / "run", IDENTITY)
    checkpoints.load({"net": engine})
    train(engine, 2, 3, split=2)
    rank, whole = torch.distributed.get_rank(), files.write_tensors

    def half(path: Path, tensors: Any) -> files.File:
        if rank == 1:
            written = whole(path, tensors)
            truncated = path.read_bytes()[: written.bytes // 2]
            path.write_bytes(truncated)
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(path, tensors)

    files.write_tensors = half
    checkpoints.save(3, {"net": engine}, {})
    checkpoints.close()


def test_a_process_killed_while_it_writes_leaves_the_checkpoint_before(copy: Path) -> None:
    with pytest.raises(torch.multiprocessing.ProcessExitedException, match="SIGKILL"):
        run_group(2, die_writing, copy)
    torn = list((copy / "run").glob("step_00000003.*.part"))
    assert [path.name for path in torn[0].glob("net.rank00001*")]
    run_group(2, load_run, copy)
    checkpoint, error, lines, state = loaded(copy)
    assert (error, lines) == (None, [])
    assert checkpoint is not None
    assert checkpoint.step == 2
    assert differences(state, state_of(copy, 2)) == []
    assert not list((copy / "run").glob("*.part"))


def fill_the_disk(root: Path) -> None:
    engine = engine_of(CASE)
    checkpoints = Checkpoints(root / "run", IDENTITY)
    checkpoints.load({"net": engine})
    rank, write = torch.distributed.get_rank(), files.write_tensors

    def on_a_full_disk(path: Path, tensors: Any) -> files.File:
        if rank == 1:
            path.symlink_to("/dev/full")
        return write(path, tensors)

    files.write_tensors = on_a_full_disk
    checkpoints.save(3, {"net": engine}, {})
    message = (
        r"^The checkpoint could not be written to .*/run/step_00000003\..*\.part/"
        r"net.rank00001.safetensors \(No space left on device\); make room there .*\.$"
    )
    with pytest.raises(ValueError, match=message):  # on all ranks
        checkpoints.save(4, {"net": engine}, {})
    torch.distributed.barrier()
    names = {path.name for path in (root / "run").iterdir()}
    assert names == {"step_00000001", "step_00000002"}
    torch.distributed.barrier()
    files.write_tensors = write
    checkpoints.save(4, {"net": engine}, {})  # there is room again
    checkpoints.close()


def test_a_full_disk_ends_in_one_sentence_and_the_last_good_one_stays(copy: Path) -> None:
    run_group(2, fill_the_disk, copy)
    steps = [path.name for path in files.committed(copy / "run")]
    assert steps == ["step_00000002", "step_00000004"]
    assert len(list((copy / "run").iterdir())) == 2


def keep_training_while_writing(root: Path) -> None:
    engine = engine_of(CASE)
    checkpoints = Checkpoints(root / "run", IDENTITY)
    train(engine, 0, 1, split=2)
    state = whole_state(engine)
    go, write = threading.Event(), files.write_tensors

    def slow(path: Path, tensors: Any) -> files.File:
        assert go.wait(60)
        return write(path, tensors)

    files.write_tensors = slow
    checkpoints.save(1, {"net": engine}, {})
    train(engine, 1, STEPS, split=2)
    later = whole_state(engine)
    assert not (root / "run" / "step_00000001").exists()
    go.set()
    checkpoints.save(5, {"net": engine}, {})  # waits for the one before
    assert (root / "run" / "step_00000001" / "manifest.json").exists()
    checkpoints.close()
    torch.distributed.barrier()
    if first_rank():
        torch.save((state, later), root / "states.pt")


def test_saving_returns_before_the_write_and_writes_the_state_of_its_moment(
    tmp_path: Path,
) -> None:
    run_group(2, keep_training_while_writing, tmp_path)
    state, later = torch.load(tmp_path / "states.pt")
    assert differences(state, later)
    run_group(2, load_run, tmp_path)
    assert differences(loaded(tmp_path)[3], later) == []
    shutil.rmtree(tmp_path / "run" / "step_00000005")
    run_group(2, load_run, tmp_path)
    assert differences(loaded(tmp_path)[3], state) == []


def test_the_last_and_the_best_are_kept(tmp_path: Path) -> None:
    run_group(2, make_run, tmp_path, 5, [3.0, 1.0, 2.0, float("nan"), None])
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {"step_00000002", "step_00000004", "step_00000005"}
    run_group(2, load_run, tmp_path, True)
    checkpoint, error, lines, state = loaded(tmp_path)
    assert (error, lines) == (None, [])
    assert checkpoint is not None
    assert (checkpoint.step, checkpoint.score, checkpoint.extra) == (2, 1.0, {"step": 2})
    assert differences(state, state_of(tmp_path, 2)) == []
