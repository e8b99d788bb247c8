"""The compiled functions of this folder, and whether this machine runs them."""

import ctypes
import logging
import threading
from ctypes import c_float, c_int, c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

import torch

from llama2.cpu.library import NotCompiled, library

FUNCTIONS: dict[str, list[Any]] = {
    "forward": [c_void_p] * 2,
    "draw": [c_void_p, c_int, c_int, *[c_void_p] * 4, c_int],
    "logprobs": [*[c_void_p] * 3, c_int, c_void_p, c_int],
    "attend": [c_void_p],
    "attend_back": [c_void_p],
    "normalize": [*[c_void_p] * 4, c_int, c_int, c_float, c_int],
    "normalize_back": [*[c_void_p] * 6, c_int, c_int, c_int],
    "swiglu": [*[c_void_p] * 3, c_int64, c_int],
    "swiglu_back": [*[c_void_p] * 6, c_int64, c_int],
    "turn": [*[c_void_p] * 4, *[c_int] * 7],
    "softmax": [*[c_void_p] * 3, *[c_int] * 4],
}
"""Arguments of each; none returns anything."""

logger = logging.getLogger(__name__)
_one_at_a_time = threading.Lock()


def kernels() -> ctypes.CDLL | None:
    """The library; None where this processor lacks bfloat16 instructions, or, with a warning, where
    it cannot be compiled."""
    with _one_at_a_time:
        return _kernels()


@cache
def _kernels() -> ctypes.CDLL | None:
    if not _suits_processor():
        return None
    try:
        found = library(Path(__file__).parent)
    except NotCompiled as reason:
        logger.warning("bfloat16 on this CPU takes up to twice as long as it could: %s", reason)
        return None
    for name, arguments in FUNCTIONS.items():
        function = getattr(found, name)
        function.argtypes, function.restype = arguments, None
    return found


def _suits_processor() -> bool:
    # Tiles of AMX, which oneDNN uses, do several times as much as the instructions used here.
    found = torch.cpu.get_capabilities()
    return bool(found.get("avx512_bf16")) and not found.get("amx_tile")
