"""Checkpoints of a run: written in the background, whole or not at all, read by any group.

Every rank writes the fragments of weights and optimizer state that it owns (`Engine.fragments`)
into a folder on the file system that all nodes share. A checkpoint depends neither on the number of
ranks nor on the ZeRO stage: a rank that reads takes, for the fragments that it holds, what lies in
any of the files.
"""

import json
import logging
import secrets
import shutil
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed
from torch import Tensor

from cluster import checkpoint_files as files
from cluster.checkpoint_files import Counters, DamagedError, Manifest, Reader
from cluster.engine import Engine

logger = logging.getLogger(__name__)

Result = TypeVar("Result")
Candidate = tuple[Path, Manifest]


@dataclass(frozen=True)
class Checkpoint:
    """A state that was saved, and what was saved with it."""

    step: int
    extra: dict[str, Any]
    path: Path
    score: float | None


class Checkpoints:
    """The checkpoints of one run, as one worker of its group sees them. Methods are collective."""

    def __init__(self, folder: Path, identity: Mapping[str, Any], keep_last: int = 2) -> None:
        """Look after the checkpoints in `folder`, which all workers share.

        identity: what the state belongs to, as JSON (nested mappings of scalars and lists). A
        checkpoint with another identity is refused. keep_last: how many of the newest are kept,
        besides the one with the best score. Removes what dead attempts left unfinished.
        """
        if keep_last < 1:
            raise ValueError(f"keep_last is {keep_last}; keep at least one checkpoint.")
        self.folder, self.keep_last = folder, keep_last
        self.identity: dict[str, Any] = json.loads(json.dumps(identity, default=str))
        self._rank = torch.distributed.get_rank()
        self._world_size = torch.distributed.get_world_size()
        self._written: Future[None] | None = None
        self._committed: Future[None] | None = None
        if self._rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            files.remove_unfinished(folder)
        # Whatever an earlier attempt's process may still write goes to a folder of another name.
        self._attempt = self._told(secrets.token_hex(4))

    def save(
        self,
        step: int,
        engines: Mapping[str, Engine],
        extra: Mapping[str, Any],
        score: float | None = None,
    ) -> None:
        """Take a copy of the state and write it in the background, as the checkpoint of `step`.

        extra: JSON, of which rank 0's counts. score: lower is better; None or a number that is not
        finite is no score. Waits where the checkpoint before is still being written, and raises
        `ValueError` on all ranks where one of them could not write it.
        """
        self._finish()
        part = self.folder / f"{files.step_folder(self.folder, step).name}.{self._attempt}.part"
        manifest = Manifest(
            step=step,
            score=files.finite(score),
            world_size=self._world_size,
            identity=self.identity,
            extra=json.loads(json.dumps(extra)),
            engines={name: Counters(e.updates, e.applied) for name, e in engines.items()},
            files={},
        )
        tensors = {name: _copy(engine) for name, engine in engines.items()}
        self._written = _in_background(lambda: self._write(part, tensors))
        if self._rank == 0:
            self._abandoned = threading.Event()
            self._committed = _in_background(lambda: self._commit(part, manifest))

    def load(self, engines: Mapping[str, Engine]) -> Checkpoint | None:
        """Put the newest checkpoint into the engines; None where there is none yet.

        A damaged one is named in the log and set aside, and the one before is taken. Raises
        `ValueError` where all are damaged, or where it belongs to another identity or other models.
        """
        return self._load(engines, lambda found: -found.step, lambda found: True)

    def load_best(self, engines: Mapping[str, Engine]) -> Checkpoint | None:
        """Put the checkpoint with the lowest score into the engines; None where none has a score.

        As `load` otherwise.
        """
        return self._load(engines, _by_score, lambda found: found.score is not None)

    def close(self) -> None:
        """Wait until everything is on disk and counts; raises as `save` does."""
        self._finish()

    def _write(self, part: Path, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
        part.mkdir(parents=True, exist_ok=True)
        paths = {engine: part / f"{engine}.rank{self._rank:05d}.safetensors" for engine in tensors}
        try:
            written = {
                paths[engine].name: asdict(files.write_tensors(paths[engine], named))
                for engine, named in tensors.items()
            }
            files.write_json(part / _receipt(self._rank), written)
        except OSError:
            for path in paths.values():  # others may need the room before this is told
                path.unlink(missing_ok=True)
            raise

    def _commit(self, part: Path, manifest: Manifest) -> None:
        """Wait for the receipts of all ranks, then make the checkpoint count."""
        receipts = [part / _receipt(rank) for rank in range(self._world_size)]
        # Listed afresh, since a network file system remembers for a while what was not there.
        while not part.exists() or not {path.name for path in receipts} <= _names(part):
            if self._abandoned.wait(0.02):
                return
        written: dict[str, files.File] = {}
        for receipt in receipts:
            for name, file in files.read_json(receipt).items():
                written[name] = files.File(**file)
            receipt.unlink()
        files.commit(part, replace(manifest, files=written))
        files.prune(self.folder, self.keep_last)

    def _finish(self) -> None:
        """Wait for the last `save`, and agree on whether it worked."""
        if self._written is None:
            return
        error = self._written.exception()
        self._written = None
        problem = self._first(_sentence(error, self.folder))
        if self._committed is not None:
            if problem is not None:
                self._abandoned.set()
            commit_error = self._committed.exception()
            error = error or commit_error
            self._committed = None
            problem = problem or _sentence(commit_error, self.folder)
        problem = self._told(problem)
        if problem is not None:
            if self._rank == 0:
                for part in self.folder.glob(f"*.{self._attempt}.part"):
                    shutil.rmtree(part)
            raise ValueError(problem) from error

    def _load(
        self,
        engines: Mapping[str, Engine],
        order: Callable[[Manifest], float | tuple[float, ...]],
        wanted: Callable[[Manifest], bool],
    ) -> Checkpoint | None:
        self._finish()
        listed = self._told(self._candidates() if self._rank == 0 else None)
        if isinstance(listed, str):
            raise ValueError(listed)
        candidates, damaged = listed
        if not candidates:  # also those that an earlier attempt found
            damaged = max(damaged, self._told(files.damaged(self.folder)))
        chosen = [candidate for candidate in candidates if wanted(candidate[1])]
        for path, manifest in sorted(chosen, key=lambda candidate: order(candidate[1])):
            _check_identity(path, manifest, self.identity)
            _check_engines(path, manifest, engines)
            problem, unreadable = self._damage(path, manifest)
            if (obstacle := self._first(unreadable)) is not None:
                raise ValueError(obstacle)
            if (problem := self._first(problem)) is None:
                _restore(path, manifest, engines)
                return Checkpoint(manifest.step, manifest.extra, path, manifest.score)
            damaged += 1
            if self._rank == 0:
                _set_aside(path, problem)
        if damaged:
            raise ValueError(
                f"No checkpoint in {self.folder} is whole (the log names what is damaged); restore "
                "the folder from a copy, or start the run under another name."
            )
        return None

    def _candidates(self) -> tuple[list[Candidate], int] | str:
        """All checkpoints whose manifest can be read, and the number of the others; or why they
        cannot be used."""
        found, damaged = [], 0
        for path in files.committed(self.folder):
            try:
                found.append((path, files.read_manifest(path)))
            except DamagedError as error:
                damaged += 1
                _set_aside(path, str(error))
            except ValueError as error:
                return str(error)
        return found, damaged

    def _damage(self, path: Path, manifest: Manifest) -> tuple[str | None, str | None]:
        """What is wrong with this rank's share of the files, or why it cannot be told."""
        names = sorted(manifest.files)[self._rank :: self._world_size]
        try:
            for name in names:
                files.check_file(path / name, manifest.files[name])
        except DamagedError as error:
            return str(error), None
        except ValueError as error:
            return None, str(error)
        return None, None

    def _first(self, mine: str | None) -> str | None:
        """The first rank's word that has something to say."""
        all_words: list[Any] = [None] * self._world_size
        torch.distributed.all_gather_object(all_words, mine)
        return next((word for word in all_words if word is not None), None)

    def _told(self, value: Any) -> Any:
        """Rank 0's value."""
        box = [value]
        torch.distributed.broadcast_object_list(box)
        return box[0]


def _copy(engine: Engine) -> dict[str, Tensor]:
    """The engine's fragments in the host's memory."""
    return {
        f"{fragment.name}/{fragment.start}/{kind}": tensor.to("cpu", copy=True)
        for fragment in engine.fragments()
        for kind, tensor in fragment.tensors.items()
        if len(tensor)
    }


def _restore(path: Path, manifest: Manifest, engines: Mapping[str, Engine]) -> None:
    for name, engine in engines.items():
        with Reader.open(_paths(path, manifest, name)) as reader:
            found, sizes = reader.sizes(), engine.sizes()
            wrong = [key for key in {**sizes, **found} if found.get(key) != sizes.get(key)]
            if wrong:
                raise ValueError(
                    f"{path} holds another {name} model: {wrong[0]} has "
                    f"{found.get(wrong[0], 'no')} elements there and {sizes.get(wrong[0], 'no')} "
                    "now; set the model back, or start the run under another name."
                )
            counters = manifest.engines[name]
            engine.restore(reader.fill, counters.updates, counters.applied)


def _paths(path: Path, manifest: Manifest, engine: str) -> list[Path]:
    return [path / name for name in manifest.files if name.rsplit(".", 2)[0] == engine]


def _check_engines(path: Path, manifest: Manifest, engines: Iterable[str]) -> None:
    if set(manifest.engines) != set(engines):
        there, now = ", ".join(sorted(manifest.engines)), ", ".join(sorted(engines))
        raise ValueError(
            f"{path} holds the state of {there}, and not of {now}; start the run under another "
            "name."
        )


def _check_identity(path: Path, manifest: Manifest, identity: Mapping[str, Any]) -> None:
    there, now = _flat(manifest.identity), _flat(identity)
    differences = [
        f"{field} ({there.get(field, 'absent')!r} there, {now.get(field, 'absent')!r} now)"
        for field in {**there, **now}
        if field not in there or field not in now or there[field] != now[field]
    ]
    if differences:
        raise ValueError(
            f"{path} was made with other settings: {', '.join(differences)}; set these back to "
            "continue from it, or start the run under another name."
        )


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(item, Mapping) and item:
            found |= _flat(item, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = item
    return found


def _by_score(manifest: Manifest) -> tuple[float, ...]:
    assert manifest.score is not None
    return (manifest.score, manifest.step)


def _set_aside(path: Path, problem: str) -> None:
    aside = files.set_aside(path)
    logger.warning("%s; that checkpoint is now %s and the one before is taken.", problem, aside)


def _receipt(rank: int) -> str:
    return f"rank{rank:05d}.json"


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def _sentence(error: BaseException | None, folder: Path) -> str | None:
    if error is None:
        return None
    if isinstance(error, OSError):
        where = error.filename or folder
        return (
            f"The checkpoint could not be written to {where} ({error.strerror}); make room there "
            "or mend the file system, then run the same command, which continues from the "
            "checkpoint before."
        )
    return f"The checkpoint could not be written to {folder} ({error!r})."


def _in_background(work: Callable[[], Result]) -> "Future[Result]":
    """Run `work` in a thread that does not keep a process alive which ends otherwise."""
    future: Future[Result] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future
