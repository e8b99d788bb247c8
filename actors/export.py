"""The result of training as a Hugging Face folder."""

from pathlib import Path

import torch

from cluster import training
from cluster.engine import Engine
from llama2 import checkpoint
from llama2.model import ScalarModel, Transformer
from llama2.tokenizer import load_tokenizer


def export(engine: Engine, tokenizer: Path, folder: Path) -> None:
    """Gather the engine's weights and write model and tokenizer into `folder` (collective)."""
    weights = {name: tensor.cpu().clone() for name, tensor in engine.weights()}
    if training.rank() != 0:
        return
    assert isinstance(engine.module, Transformer | ScalarModel)
    with torch.device("meta"):
        model = type(engine.module)(engine.module.config)
    model.load_state_dict(weights, assign=True)
    checkpoint.save(model, folder, load_tokenizer(tokenizer).files())
