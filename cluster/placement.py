"""How many workers a role has and what each of them holds of the cluster."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ray
import torch


@dataclass(frozen=True)
class Workers:
    """A role's share of the cluster."""

    count: int = 1
    """How many workers."""
    cpus: float = 1.0
    """CPUs that each worker reserves; fractions share a core."""
    gpus: float = 0.0
    """GPUs that each worker reserves; fractions share a device."""
    threads: int = 1
    """Threads that each worker computes with on the CPU."""

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"A role needs at least one worker, not {self.count}.")
        if self.cpus < 0 or self.gpus < 0 or self.threads < 1:
            raise ValueError("cpus and gpus must not be negative, and threads at least 1.")

    def actor_options(self) -> dict[str, Any]:
        """Options for a Ray actor or a Serve replica of this role."""
        return {"num_cpus": self.cpus, "num_gpus": self.gpus}


def fast_bfloat16() -> bool:
    """Whether this machine multiplies bfloat16 matrices in hardware; elsewhere it is no gain."""
    found = torch.cpu.get_capabilities()
    return torch.cuda.is_available() or bool(found.get("avx512_bf16") or found.get("amx_bf16"))


def check_capacity(roles: Mapping[str, Workers]) -> None:
    """Raise `ValueError` where the cluster, were it idle, could not hold all `roles` at once.

    Ray itself would wait for ever for what no node offers.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    for resource, unit in (("CPU", "cpus"), ("GPU", "gpus")):
        offered = sum(node.get(resource, 0.0) for node in nodes)
        wanted = {name: role.count * getattr(role, unit) for name, role in roles.items()}
        if sum(wanted.values()) > offered + 1e-9:
            parts = ", ".join(f"{name} {amount:g}" for name, amount in wanted.items() if amount)
            raise ValueError(
                f"The workers ask for {sum(wanted.values()):g} {unit} ({parts}) and the cluster "
                f"has {offered:g}; ask for fewer workers, or smaller shares, or add nodes."
            )
        largest = max((node.get(resource, 0.0) for node in nodes), default=0.0)
        for name, role in roles.items():
            if getattr(role, unit) > largest:
                raise ValueError(
                    f"Each {name} worker asks for {getattr(role, unit):g} {unit} and no node has "
                    f"more than {largest:g}; ask for less."
                )
    for name, role in roles.items():
        fitting = sum(min(role.count, _fitting(role, node)) for node in nodes)
        if fitting < role.count:
            raise ValueError(
                f"Only {fitting} of {role.count} {name} workers fit onto the nodes, as none can be "
                "parted between two; ask for fewer, or smaller ones."
            )


def _fitting(role: Workers, node: Mapping[str, float]) -> int:
    """How many workers of a role a node could hold."""
    rooms = [role.count]
    if role.cpus:
        rooms.append(int(node.get("CPU", 0.0) / role.cpus + 1e-9))
    if 0 < role.gpus < 1:  # a worker's share is of one GPU
        rooms.append(int(node.get("GPU", 0.0)) * int(1 / role.gpus + 1e-9))
    elif role.gpus:
        rooms.append(int(node.get("GPU", 0.0) / role.gpus + 1e-9))
    return min(rooms)
