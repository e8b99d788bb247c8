"""The files of a checkpoint: tensors with their checksums, a manifest, and a folder that appears
whole or not at all.

`step_00000042/` holds one safetensors file per rank and engine, whose keys are
`<parameter>/<first element>/<kind>`, and `manifest.json`, which names all files with their lengths
and xxh3-128 checksums.
"""

import json
import logging
import math
import os
import re
import shutil
import struct
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import xxhash
from safetensors import safe_open
from torch import Tensor

from cluster.fragments import Fragment

logger = logging.getLogger(__name__)

FORMAT = 1
MANIFEST = "manifest.json"
BLOCK = 1 << 24


@dataclass(frozen=True)
class File:
    """Length in bytes and xxh3-128 checksum of a file."""

    bytes: int
    checksum: str


@dataclass(frozen=True)
class Counters:
    """An engine's position: steps made, and updates that were applied."""

    updates: int
    applied: int


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint holds."""

    step: int
    score: float | None
    world_size: int
    identity: dict[str, Any]
    extra: dict[str, Any]
    engines: dict[str, Counters]
    files: dict[str, File]


class DamagedError(ValueError):
    """A checkpoint is not as it was written."""


def step_folder(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return folder / f"step_{step:08d}"


def committed(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, in the order of their steps."""
    found = [path for path in folder.iterdir() if re.fullmatch(r"step_\d{8,}", path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step_")))


def remove_unfinished(folder: Path) -> None:
    """Remove what attempts that died left half written or half removed, and put back what one was
    about to replace."""
    for path in folder.glob("step_*.part"):
        shutil.rmtree(path)
    for path in folder.glob("step_*.replaced"):
        final = path.with_suffix("")
        if final.exists():
            shutil.rmtree(path)
        else:
            path.rename(final)


def damaged(folder: Path) -> int:
    """How many damaged checkpoints have been set aside."""
    return sum(1 for _ in folder.glob("step_*.damaged"))


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> File:
    """Write float32 tensors of the host's memory in safetensors' format, through to the disk.

    Summed up from memory as they are written, so the checksum is of what was meant.
    """
    entries: dict[str, Any] = {}
    end = 0
    for key, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        entries[key] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [start, end]}
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    return _write(
        path, (struct.pack("<Q", len(header)) + header, *map(Tensor.numpy, tensors.values()))
    )


def _write(path: Path, blocks: Iterable[Any]) -> File:
    digest = xxhash.xxh3_128()
    try:
        with path.open("wb") as file:
            for block in blocks:
                digest.update(block)
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            return File(file.tell(), digest.hexdigest())
    except OSError as error:
        error.filename = str(path)  # a full disk does not say which
        raise


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object so that the file appears whole, with its own checksum."""
    plain = json.loads(json.dumps(value))  # as it will be read: keys are strings
    text = json.dumps({**plain, "checksum": _checksum(plain)}, indent=1)
    unfinished = path.with_name(f"{path.name}.unfinished")
    _write(unfinished, [text.encode()])
    unfinished.rename(path)


def read_json(path: Path) -> dict[str, Any]:
    """What `write_json` wrote. Raises `DamagedError`."""
    try:
        value = json.loads(path.read_bytes())
        if value.pop("checksum") != _checksum(value):
            raise DamagedError(f"{path} does not match its checksum")
    except FileNotFoundError as error:
        raise DamagedError(f"{path} is missing") from error
    except (ValueError, KeyError, AttributeError) as error:
        if isinstance(error, DamagedError):
            raise
        raise DamagedError(f"{path} is not what was written ({error})") from error
    return dict(value)


def _checksum(value: Mapping[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(value, sort_keys=True).encode())


def read_manifest(path: Path) -> Manifest:
    """The manifest of the checkpoint at `path`.

    Raises `DamagedError`, and `ValueError` where another version of this program wrote it.
    """
    value = read_json(path / MANIFEST)
    if value.pop("format") != FORMAT:
        raise ValueError(
            f"{path} was written by another version of this program; continue with that version."
        )
    engines = {name: Counters(**counters) for name, counters in value.pop("engines").items()}
    files = {name: File(**file) for name, file in value.pop("files").items()}
    return Manifest(**value, engines=engines, files=files)


def check_file(path: Path, wanted: File) -> None:
    """Raise `DamagedError` where the file is not the one that was written."""
    digest, size = xxhash.xxh3_128(), 0
    try:
        with path.open("rb", buffering=0) as file:
            while block := file.read(BLOCK):
                digest.update(block)
                size += len(block)
    except FileNotFoundError as error:
        raise DamagedError(f"{path} is missing") from error
    except OSError as error:  # the file system's fault, and perhaps a passing one
        raise ValueError(
            f"{path} cannot be read ({error.strerror}); mend the file system, then run the same "
            "command again."
        ) from error
    if size != wanted.bytes:
        raise DamagedError(f"{path} has {size} bytes instead of {wanted.bytes}")
    if digest.hexdigest() != wanted.checksum:
        raise DamagedError(f"{path} does not match its checksum")


def commit(part: Path, manifest: Manifest) -> Path:
    """Give the folder `part` its manifest and its name, in place of a checkpoint of that step."""
    write_json(part / MANIFEST, {"format": FORMAT, **asdict(manifest)})
    _sync(part)
    final = step_folder(part.parent, manifest.step)
    before = final.with_name(f"{final.name}.replaced")
    if final.exists():
        final.rename(before)
    part.rename(final)
    _sync(part.parent)
    if before.exists():
        shutil.rmtree(before)
    return final


def remove(path: Path) -> None:
    """Remove a checkpoint so that at no time half of it passes for one."""
    shutil.rmtree(path.rename(path.with_name(f"{path.name}.removed.part")))


def set_aside(path: Path) -> Path:
    """Rename a damaged checkpoint, so that it is neither read again nor counted among the kept."""
    aside = path.with_name(f"{path.name}.damaged")
    if aside.exists():
        shutil.rmtree(aside)
    return path.rename(aside)


def prune(folder: Path, keep_last: int) -> None:
    """Remove all checkpoints but the newest `keep_last` and the one with the lowest score."""
    paths = committed(folder)
    scored = []
    for path in paths:
        try:
            score = read_manifest(path).score
        except DamagedError as error:
            logger.warning("%s; that checkpoint is left out.", error)
            continue
        if score is not None:
            scored.append((score, path))
    best = min(scored)[1] if scored else None
    for path in paths[:-keep_last]:
        if path != best:
            remove(path)


def finite(score: float | None) -> float | None:
    """A score that can be compared, None for one that cannot (NaN or infinite)."""
    return score if score is not None and math.isfinite(score) else None


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class Reader:
    """An engine's state in the files of all ranks that wrote it."""

    def __init__(self, handles: Mapping[Path, Any]) -> None:
        self._pieces: dict[tuple[str, str], list[tuple[int, int, Any]]] = {}
        for handle in handles.values():
            for key in handle.keys():  # noqa: SIM118 (it is no mapping)
                name, start, kind = key.rsplit("/", 2)
                data = handle.get_slice(key)
                piece = (int(start), data.get_shape()[0], data)
                self._pieces.setdefault((name, kind), []).append(piece)

    @classmethod
    @contextmanager
    def open(cls, paths: Iterable[Path]) -> Iterator["Reader"]:
        """Open the files for the time of a `with` block."""
        with ExitStack() as stack:
            yield cls({path: stack.enter_context(safe_open(path, "pt")) for path in paths})

    def sizes(self) -> dict[str, int]:
        """Number of elements of each parameter."""
        pieces = self._pieces.items()
        return {
            name: sum(p[1] for p in found) for (name, kind), found in pieces if kind == "weight"
        }

    def fill(self, fragment: Fragment) -> None:
        """Copy into a fragment's views what the files hold of its elements, and no more of them
        than that."""
        for kind, view in fragment.tensors.items():
            filled = 0
            for start, length, data in self._pieces[fragment.name, kind]:
                first = max(start, fragment.start)
                last = min(start + length, fragment.start + len(view))
                if first < last:
                    place = slice(first - fragment.start, last - fragment.start)
                    view[place].copy_(data[first - start : last - start])
                    filled += last - first
            assert filled == len(view), f"{fragment.name} {kind} has gaps"
