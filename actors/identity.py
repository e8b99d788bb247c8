"""What training state belongs to: a checkpoint is read only by a run that would have written it."""

import json
from dataclasses import asdict
from typing import Any

from cluster.engine import EngineConfig

# How a step is computed and where its state lies, not what it computes.
PLACEMENT = ("zero_stage", "offload_optimizer", "offload_parameters", "nvme_path")


def identity(engine: EngineConfig, **others: Any) -> dict[str, Any]:
    """The optimizer's numbers and `others`, dataclasses among them as mappings, as JSON holds
    them."""
    numbers = {name: value for name, value in asdict(engine).items() if name not in PLACEMENT}
    found: dict[str, Any] = json.loads(json.dumps({"optimizer": numbers, **others}, default=asdict))
    return found
