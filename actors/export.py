"""The result of training as a Hugging Face folder."""

from pathlib import Path

import torch

from cluster import training
from cluster.engine import Engine
from llama2 import checkpoint
from llama2.lora import LoraConfig, merged_weights, save_adapter
from llama2.model import ScalarModel, Transformer
from llama2.tokenizer import load_tokenizer


def export(
    engine: Engine, tokenizer: Path, folder: Path, lora: LoraConfig | None = None, base: str = ""
) -> None:
    """Gather the engine's weights and write model and tokenizer into `folder` (collective).

    Under LoRA the model has the updates merged into its weights; the updates alone lie in
    `folder/adapter`, as those of the model that `base` names.
    """
    lead = training.rank() == 0
    weights = {}
    for name, tensor in engine.weights():  # sharded weights are gathered by all together
        if lead:
            weights[name] = tensor.cpu().clone()
    if not lead:
        return
    assert isinstance(engine.module, Transformer | ScalarModel)
    if lora is not None and lora.rank:
        save_adapter(weights.items(), lora, folder / "adapter", base)
        weights = dict(merged_weights(weights.items(), lora))
    with torch.device("meta"):
        model = type(engine.module)(engine.module.config)
    model.load_state_dict(weights, assign=True)
    checkpoint.save(model, folder, load_tokenizer(tokenizer).files())
