"""Hugging Face's layout: `config.json` with `model.safetensors`, or with shards and their index."""

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from llama2.checkpoint_config import (
    SCALAR,
    Architecture,
    load_config_and_architecture,
    read_json,
    save_config,
)
from llama2.config import ModelConfig

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"


class HuggingFaceFolder:
    """A folder that transformers wrote, or `write_folder`."""

    def __init__(self, folder: Path) -> None:
        """Raises `FileNotFoundError` or `ValueError` where config or index is missing or wrong."""
        self.folder = folder
        self.config, architecture = load_config_and_architecture(folder)
        self.scalar = architecture == SCALAR
        self._files = _weight_files(folder)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes from the headers. Raises `ValueError` where a file is truncated or corrupt."""
        shapes: dict[str, tuple[int, ...]] = {}
        for path in self._files:
            try:
                # Opening compares the file's size with what its header says.
                with safe_open(path, "pt") as file:
                    for name in _names(file.keys()):
                        shapes[name] = tuple(file.get_slice(name).get_shape())
            except (SafetensorError, OSError) as error:
                raise ValueError(
                    f"{path} is truncated or corrupt ({error}); fetch or write it again."
                ) from error
        return shapes

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor, mapped from the files: its bytes are read when they are used."""
        for path in self._files:
            with safe_open(path, "pt") as file:
                for name in _names(file.keys()):
                    yield name, file.get_tensor(name)


def write_folder(
    folder: Path,
    weights: Mapping[str, Tensor],
    config: ModelConfig,
    architecture: Architecture,
    tokenizer_files: Mapping[str, bytes],
    shard_bytes: int,
) -> None:
    """Write weights in files of at most `shard_bytes`, tokenizer files, and the config last.

    All is written to a folder inside `folder` and renamed from there, after the config of a model
    that was there before is gone: whenever this ends, a folder with a config is complete.
    """
    staging = folder / ".incomplete"
    shutil.rmtree(staging, ignore_errors=True)  # of a save that was killed
    staging.mkdir(parents=True)
    try:
        names = _write_weights(staging, weights, shard_bytes)
        for name, content in tokenizer_files.items():
            (staging / name).write_bytes(content)
        dtype = next(iter(weights.values())).dtype
        save_config(config, staging, architecture, dtype)
        for path in staging.iterdir():
            # safetensors makes files that no other user may read.
            shutil.copymode(staging / CONFIG, path)
            _sync(path)
        (folder / CONFIG).unlink(missing_ok=True)
        _sync(folder)
        for stale in {*folder.glob("model*.safetensors"), folder / INDEX}:
            stale.unlink(missing_ok=True)
        for name in [*names, *tokenizer_files]:
            os.replace(staging / name, folder / name)
        _sync(folder)
        os.replace(staging / CONFIG, folder / CONFIG)
        _sync(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _write_weights(folder: Path, weights: Mapping[str, Tensor], shard_bytes: int) -> list[str]:
    """Write the weights and, where there are several files, their index; the names of all files."""
    shards = _shards(weights, shard_bytes)
    if len(shards) == 1:
        files = [WEIGHTS]
    else:
        files = [
            f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)
        ]
    for file, names in zip(files, shards, strict=True):
        tensors = {name: weights[name].detach().contiguous() for name in names}
        save_tensors(tensors, folder / file)
    if len(files) == 1:
        return files
    places = {name: file for file, names in zip(files, shards, strict=True) for name in names}
    size = sum(tensor.nbytes for tensor in weights.values())
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return [*files, INDEX]


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a safetensors file. Raises `OSError` with the system's number where it cannot be
    written, as onto a full disk."""
    try:
        # transformers refuses files that do not name the framework.
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        found = re.search(r"os error (\d+)", str(error))
        if found is None:
            raise
        number = int(found[1])
        raise OSError(number, os.strerror(number), str(path)) from error


def _shards(weights: Mapping[str, Tensor], shard_bytes: int) -> list[list[str]]:
    """Names in order, cut where the next tensor would not fit; a tensor is never cut."""
    shards: list[list[str]] = [[]]
    room = shard_bytes
    for name, tensor in weights.items():
        if shards[-1] and tensor.nbytes > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(name)
        room -= tensor.nbytes
    return shards


def _weight_files(folder: Path) -> list[Path]:
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        pickled = any(folder.glob("pytorch_model*.bin"))
        raise FileNotFoundError(
            f"{folder} has neither {WEIGHTS} nor {INDEX}; "
            + ("convert its pytorch_model.bin to safetensors." if pickled else "add the weights.")
        )
    places = read_json(folder / INDEX).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(v, str) for v in places.values()):
        raise ValueError(f"{folder / INDEX} has no weight_map of file names; fetch the file again.")
    files = [folder / name for name in sorted(set(places.values()))]
    for path in files:
        if not path.is_file():
            raise FileNotFoundError(
                f"{folder / INDEX} names {path.name}, which is absent; fetch it."
            )
    return files


def _names(names: list[str]) -> list[str]:
    """Without the rotary frequencies of old checkpoints, which follow from the config."""
    return [name for name in names if not name.endswith("rotary_emb.inv_freq")]


def _sync(path: Path) -> None:
    """Have the disk hold a file or a folder's entries before what comes next."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
