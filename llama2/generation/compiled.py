"""C++ that is compiled on the machine it runs on, once for each state of the source."""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

FLAGS = (
    "-std=c++17 -O3 -fopenmp -fPIC -shared -mfma -mavx512f -mavx512bw -mavx512vl -mavx512dq "
    "-mavx512bf16"
).split()


class NotCompiled(Exception):
    """Why there is no library, in a sentence."""


def library(source: Path) -> ctypes.CDLL:
    """Compile `source` with GNU's C++ compiler, whose OpenMP shares its threads with torch, unless
    that was done before; load it.

    The library lies in the user's cache by the hash of what it was made of. Raises `NotCompiled`.
    """
    text = source.read_bytes()
    made_of = b"\0".join([text, " ".join(FLAGS).encode(), " ".join(platform.libc_ver()).encode()])
    name = f"{source.stem}-{hashlib.sha256(made_of).hexdigest()[:16]}.so"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llama2-ray"
    path = cache / name
    try:
        if not path.exists():
            cache.mkdir(parents=True, exist_ok=True)
            _compile(source, path)
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise NotCompiled(f"{path} can be neither made nor loaded: {error}.") from error


def _compile(source: Path, path: Path) -> None:
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        raise NotCompiled("There is no C++ compiler (g++).")
    # Under another name first: several processes may be at it, and any of them may be killed.
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / path.name
        command = [compiler, *FLAGS, str(source), "-o", str(made)]
        ran = subprocess.run(command, capture_output=True, text=True, check=False)
        if ran.returncode:
            raise NotCompiled(f"{compiler} does not compile {source}: {ran.stderr.strip()[:2000]}")
        os.replace(made, path)
