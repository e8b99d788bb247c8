"""Where every model and data set of a project came from, by hash.

`lineage.json` has an entry for each run: its parents, and the checksums of its config, of the files
it read and of those it made. Files are named by their place relative to `lineage.json`, so that a
folder of runs can be moved as a whole.
"""

import hashlib
import json
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import xxhash

from cluster.run_directory import write_atomically

Hashes = dict[str, str]


@dataclass(frozen=True)
class Entry:
    """What is known of one run."""

    parents: Hashes = field(default_factory=dict)
    """The runs whose results it used, each with one checksum of all that it made."""
    config: Hashes = field(default_factory=dict)
    data: Hashes = field(default_factory=dict)
    """Files that it read, besides what its parents made."""
    made: Hashes = field(default_factory=dict)
    """Files that it leaves to others."""

    @property
    def digest(self) -> str:
        """A checksum of all that it made."""
        return xxhash.xxh3_128_hexdigest(json.dumps(self.made, sort_keys=True).encode())


class Lineage:
    """The file at `path`; it need not be there yet. Raises `ValueError` for one that is damaged."""

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        self.entries: dict[str, Entry] = {}
        if not self.path.is_file():
            return
        try:
            found = json.loads(self.path.read_text("utf-8"))
            self.entries |= {name: Entry(**entry) for name, entry in found.items()}
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{self.path} is no lineage file ({error}); put it back as it was, or begin anew "
                "under another run name."
            ) from error

    def check(self) -> None:
        """Raise `ValueError`, naming run, file and both hashes, where a file is no longer what it
        was, or a parent no longer made what its child used. Reads every file once."""
        known: Hashes = {}
        for name, entry in self.entries.items():
            for place, before in (entry.config | entry.data | entry.made).items():
                path = self._path(place)
                if not path.is_file():
                    raise ValueError(
                        f"{path}, of {name}, is gone; put it back (hash {before}), or begin anew "
                        "under another run name."
                    )
                if place not in known:
                    known[place] = file_hash(path)
                if known[place] != before:
                    raise ValueError(
                        f"{path}, of {name}, was changed: its hash was {before} and is "
                        f"{known[place]}; put it back, or begin anew under another run name."
                    )
            for parent, before in entry.parents.items():
                now = self.entries[parent].digest if parent in self.entries else "missing"
                if now != before:
                    raise ValueError(
                        f"{self.path}: {name} came from a {parent} of hash {before}, which has "
                        f"{now}; put the file back as it was, or begin anew under another run name."
                    )

    def record(
        self,
        name: str,
        parents: Sequence[str],
        config: Path | None,
        data: Iterable[Path],
        made: Iterable[Path],
    ) -> None:
        """Add a run that came to its end; folders stand for all files in them. Parents must have
        been recorded before."""
        assert name not in self.entries
        self.entries[name] = Entry(
            {parent: self.entries[parent].digest for parent in parents},
            self._hashes([] if config is None else [config]),
            self._hashes(data),
            self._hashes(made),
        )
        write_atomically(self.path, json.dumps(self._plain(), indent=1) + "\n")

    def _plain(self) -> Mapping[str, object]:
        return {name: asdict(entry) for name, entry in self.entries.items()}

    def _hashes(self, paths: Iterable[Path]) -> Hashes:
        return {
            os.path.relpath(file.absolute(), self.path.parent): file_hash(file)
            for path in paths
            for file in files_of(path)
        }

    def _path(self, place: str) -> Path:
        return Path(os.path.normpath(self.path.parent / place))


def files_of(path: Path) -> list[Path]:
    """A file, or all files in a folder, however deep, sorted."""
    if not path.is_dir():
        return [path]
    return sorted(file for file in path.rglob("*") if file.is_file())


def stamp(path: Path, besides: Collection[Path] = ()) -> str:
    """Changes when a file, or a file in a folder, however deep, does; `besides`, hidden files and
    what Python compiled left out. Weights may be too large to be read for that alone."""
    left_out = {file.resolve() for file in besides}
    root = path if path.is_dir() else path.parent
    digest = xxhash.xxh3_64()
    for file in files_of(path):
        name = file.relative_to(root)
        made = any(part.startswith(".") or part == "__pycache__" for part in name.parts)
        if not made and file.resolve() not in left_out:
            found = file.stat()
            digest.update(f"{name} {found.st_size} {found.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def file_hash(path: Path) -> str:
    """xxh3-128 over a whole file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()
