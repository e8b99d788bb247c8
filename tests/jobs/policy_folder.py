"""A policy for tests in which its answers follow a script."""

from pathlib import Path

from llama2 import checkpoint
from llama2.config import ModelConfig
from llama2.model import Transformer, initialize
from llama2.sources import world_of
from llama2.tokenizer import load_tokenizer, train_tokenizer


def policy_folder(folder: Path) -> Path:
    """A model's folder below `folder` for the world's words; nothing is computed with it."""
    texts = [prompt.text for prompt in world_of(0).prompts("train")[::40]]
    train_tokenizer(texts, 600, folder / "tokenizer")
    tokenizer = load_tokenizer(folder / "tokenizer")
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=1024,
    )  # fmt: skip
    model = Transformer(config)
    initialize(model, config, seed=0)
    checkpoint.save(model, folder / "model", tokenizer.files())
    return folder / "model"
