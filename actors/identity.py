"""What training state belongs to: a checkpoint is read only by a run that would have written it."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import xxhash

from cluster.engine import EngineConfig

# How a step is computed and where its state lies, not what it computes.
PLACEMENT = ("zero_stage", "offload_optimizer", "offload_parameters", "nvme_path")


def identity(engine: EngineConfig, **others: Any) -> dict[str, Any]:
    """The optimizer's numbers and `others`, dataclasses among them as mappings, as JSON holds
    them."""
    numbers = {name: value for name, value in asdict(engine).items() if name not in PLACEMENT}
    found: dict[str, Any] = json.loads(json.dumps({"optimizer": numbers, **others}, default=asdict))
    return found


def sampled_hash(folder: Path) -> str:
    """xxh3-128 over sizes and 64 spread blocks of each weight file in `folder`: enough to tell one
    training's result from another's without reading all of it."""
    digest = xxhash.xxh3_128()
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*.pth")]):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for number in range(64):
                file.seek(number * size // 64)
                digest.update(file.read(1 << 14))
    return digest.hexdigest()
