"""C++ that is compiled on the machine it runs on, once for each state of the source."""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

VECTORS = ("-mfma", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512bf16")
FLAGS = ("-std=c++17", "-O3", "-fopenmp", "-fPIC", "-shared", *VECTORS)


class NotCompiled(Exception):
    """Why there is no library, in a sentence."""


def library(folder: Path) -> ctypes.CDLL:
    """Compile the sources in `folder` with GNU's C++ compiler, whose OpenMP shares its threads with
    torch, unless that was done before; load them.

    The library lies in the user's cache by the hash of what it was made of. Raises `NotCompiled`.
    """
    digest = hashlib.sha256(" ".join((*FLAGS, *platform.libc_ver())).encode())
    for path in sorted(folder.glob("*.[ch]pp")):
        digest.update(path.read_bytes())
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llama2-ray"
        path = cache / f"{folder.name}-{digest.hexdigest()[:16]}.so"
        if not path.exists():
            cache.mkdir(parents=True, exist_ok=True)
            _compile(sorted(folder.glob("*.cpp")), path)
        return ctypes.CDLL(str(path))
    except (OSError, RuntimeError) as error:  # the latter where there is no home
        raise NotCompiled(f"The library can be neither made nor loaded: {error}.") from error


def _compile(sources: list[Path], path: Path) -> None:
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        raise NotCompiled("There is no C++ compiler (g++).")
    # Under another name first: several processes may be at it, and any of them may be killed.
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / path.name
        command = [compiler, *FLAGS, *map(str, sources), "-o", str(made)]
        ran = subprocess.run(command, capture_output=True, text=True, check=False)
        if ran.returncode:
            raise NotCompiled(
                f"{compiler} refuses {sources[0].parent}: {ran.stderr[:2000].strip()}"
            )
        with made.open("rb") as file:
            os.fsync(file.fileno())  # a part of a library would end the process that loads it
        os.replace(made, path)
