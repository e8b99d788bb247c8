"""Where a run keeps what it was told, what it measured and what it made: `runs/<name>/`.

A run may be killed at any moment. Whole files appear atomically or not at all; a file of JSON lines
may end in a torn line, which reading leaves out (and says so) and resuming cuts off.
"""

import errno
import fcntl
import json
import logging
import os
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from os.path import samestat
from pathlib import Path
from typing import IO, Any

import yaml

logger = logging.getLogger(__name__)

Json = dict[str, Any]
LOCKLESS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)
"""How a file system says that it has no locks; there nothing keeps a second process out."""
_claims: dict[Path, IO[bytes]] = {}
"""The locks of this process."""


@dataclass(frozen=True)
class RunDirectory:
    """The folder `root/name` and the places in it. Holds paths only, so it may be sent to any
    process.

    A relative `root` is made absolute at once, since workers start in other folders than the
    driver. Raises `ValueError` when `name` could not be a folder's name everywhere the run is
    shown.
    """

    root: Path
    name: str

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", self.name):
            raise ValueError(
                f"The run name {self.name!r} cannot be used; take 1 to 100 letters, digits, "
                "'.', '_' or '-', beginning with a letter or digit."
            )
        object.__setattr__(self, "root", Path(self.root).absolute())

    @property
    def path(self) -> Path:
        """The folder of the run."""
        return self.root / self.name

    @property
    def config(self) -> Path:
        """All resolved values of the job; `--config` of any job replays it."""
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        """One JSON object per step, with the step's number (from 0) under "step"."""
        return self.path / "metrics.jsonl"

    @property
    def samples(self) -> Path:
        """One JSON object per sample, with the number of the step that made it under "step"."""
        return self.path / "samples.jsonl"

    @property
    def checkpoints(self) -> Path:
        """Folder of the training state, from which the run continues."""
        return self.path / "checkpoints"

    @property
    def model(self) -> Path:
        """Folder of the resulting model, in Hugging Face's layout."""
        return self.path / "model"

    @property
    def report(self) -> Path:
        """Plots and sample tables as one page, readable offline."""
        return self.path / "report.html"

    @property
    def is_finished(self) -> bool:
        """Whether the run came to its end (`finish` was called)."""
        return self._summary.exists()

    @property
    def _summary(self) -> Path:
        return self.path / "summary.json"

    def open(self, config: Mapping[str, Any], may_change: Collection[str] = ()) -> None:
        """Create the folder, or go on with the run that it holds, and write `config` into it.

        `may_change` names fields that do not alter what the run computes (number of workers,
        logging), nested ones with dots ("cluster.workers"); a name stands for all fields beneath
        it. Raises `ValueError` when any other field differs from the run's config, naming each with
        both values, and when another process has it open: two would overwrite each other's files.
        """
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"{self.path} is a file; give the run another name or move the file.")
        if self.config.exists():
            old, new = _flatten(read_config(self.config)), _flatten(_plain(config))
            differences = [
                f"{field} ({_shown(old, field)} there, {_shown(new, field)} now)"
                for field in [*old, *(field for field in new if field not in old)]
                if not _covered(field, may_change) and not _same(old, new, field)
            ]
            if differences:
                raise ValueError(
                    f"Run {self.name!r} exists with another config: {', '.join(differences)}; "
                    "set these back to continue it, or give another run name."
                )
        for folder in (self.checkpoints, self.model):
            folder.mkdir(parents=True, exist_ok=True)
        self._claim()
        self.write_config(config)

    def _claim(self) -> None:
        """Keep others out until this process ends, however it does."""
        path = self.path.resolve() / ".lock"
        held = _claims.get(path)
        if held is not None and path.exists() and samestat(os.fstat(held.fileno()), path.stat()):
            return
        file = path.open("ab")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.close()
            raise ValueError(
                f"Run {self.name!r} is under way in another process; wait for it to end, or give "
                "another run name."
            ) from error
        except OSError as error:
            if error.errno not in LOCKLESS:
                raise
        _claims[path] = file

    def write_config(self, config: Mapping[str, Any]) -> None:
        """Replace `config.yaml` by `config`: nested mappings, sequences, paths and scalars."""
        write_atomically(self.config, yaml.safe_dump(_plain(config), sort_keys=False))

    def read_config(self) -> Json:
        """What `config.yaml` holds; see the function of the same name."""
        return read_config(self.config)

    def resume_at(self, step: int) -> None:
        """Forget metrics and samples of `step` and later, so that the steps to come are there
        once."""
        for path in (self.metrics, self.samples):
            if path.exists():
                truncate_json_lines(path, lambda line: line["step"] < step)

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Mark the run as finished, with its results (JSON values) for `summary()` to return."""
        write_atomically(self._summary, json.dumps(dict(summary), indent=2) + "\n")

    def summary(self) -> Json | None:
        """The results given to `finish`; None while the run is unfinished."""
        return json.loads(self._summary.read_text("utf-8")) if self.is_finished else None


def read_config(path: Path) -> Json:
    """The nested mapping in a `config.yaml`.

    Raises `FileNotFoundError` when there is none, `ValueError` (naming file and line) when it is
    not YAML or not a mapping.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; give the config.yaml of a run directory.")
    try:
        config = yaml.safe_load(path.read_text("utf-8"))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "unreadable characters"
        raise ValueError(f"{path}{where} is not YAML ({problem}); correct it.") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds no 'field: value' lines; give a job's config.yaml.")
    return config


def write_atomically(path: Path, text: str) -> None:
    """Write `text` so that a reader, or a run after a crash, finds the old file or the new one,
    whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with temporary.open("w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def append_json(path: Path, value: Mapping[str, Any]) -> None:
    """Append one line to a file of JSON lines, in one write.

    Floats that are not finite are written as Python's json module does (NaN, Infinity).
    """
    with path.open("ab") as file:
        file.write(_line(value).encode("utf-8"))


def read_json_lines(path: Path) -> list[Json]:
    """The objects of a file of JSON lines, in order.

    A last line that a killed process left unfinished is left out, with a warning in the log. Raises
    `ValueError`, naming file and line, when any other line is no JSON object.
    """
    objects: list[Json] = []
    # Bytes are split, as characters such as U+2028 end a line of text but not a line of JSON.
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError as error:
            if number == len(lines):
                logger.warning(
                    "%s, line %d is torn (its writer was killed); left out.", path, number
                )
                break
            raise ValueError(f"{path}, line {number} is not JSON ({error}); remove it.") from error
        if not isinstance(value, dict):
            raise ValueError(f"{path}, line {number} is not a JSON object; remove it.")
        objects.append(value)
    return objects


def truncate_json_lines(path: Path, keep: Callable[[Json], bool]) -> None:
    """Replace the file, atomically, by those of its lines that `keep` accepts; a torn last line
    goes too."""
    write_atomically(path, "".join(_line(value) for value in read_json_lines(path) if keep(value)))


def _line(value: Mapping[str, Any]) -> str:
    text = json.dumps(dict(value), ensure_ascii=False)
    # A lone surrogate cannot be written as UTF-8; its backslash form is the same character in JSON.
    return text.encode("utf-8", "backslashreplace").decode("utf-8") + "\n"


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _flatten(config: Mapping[str, Any], prefix: str = "") -> Json:
    flat: Json = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _covered(field: str, names: Collection[str]) -> bool:
    return any(field == name or field.startswith(name + ".") for name in names)


def _same(old: Json, new: Json, field: str) -> bool:
    return field in old and field in new and old[field] == new[field]


def _shown(config: Json, field: str) -> str:
    return repr(config[field]) if field in config else "absent"
