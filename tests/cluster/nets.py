"""Small modules whose weights are published."""

import torch
from torch import nn


def net(seed: int, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 3), nn.Embedding(4, 2)).to(dtype)


def same(module: nn.Module, other: nn.Module) -> bool:
    there = other.state_dict()
    return all(torch.equal(tensor, there[name]) for name, tensor in module.state_dict().items())


class Tied(nn.Module):
    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 3, False), nn.Linear(3, 3, False)
        if tied:
            self.last.weight = self.first.weight
