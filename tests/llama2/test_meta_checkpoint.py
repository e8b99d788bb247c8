"""Meta's layout: split over files, its order of rows, and what is refused."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from llama2 import checkpoint
from llama2.config import ModelConfig, feed_forward_width
from llama2.meta_checkpoint import _half_split
from llama2.rope import inverse_frequencies, rotate, rotation
from tests.llama2.model_folders import assert_same, causal, refusal


def interleaved(weight: Tensor, heads: int) -> Tensor:
    """Meta's order of rows, row by row: 2i of a head is our i, 2i + 1 our i + K/2."""
    width = len(weight) // heads
    rows = []
    for head in range(heads):
        for i in range(width // 2):
            rows += [weight[head * width + i], weight[head * width + i + width // 2]]
    return torch.stack(rows)


def meta_weights(model: LlamaForCausalLM) -> dict[str, Tensor]:
    heads, groups = model.config.num_attention_heads, model.config.num_key_value_heads
    weights = {
        "tok_embeddings.weight": model.model.embed_tokens.weight,
        "norm.weight": model.model.norm.weight,
        "output.weight": model.lm_head.weight,
        "rope.freqs": torch.ones(4),
    }
    for i, layer in enumerate(model.model.layers):
        weights |= {
            f"layers.{i}.attention.wq.weight": interleaved(layer.self_attn.q_proj.weight, heads),
            f"layers.{i}.attention.wk.weight": interleaved(layer.self_attn.k_proj.weight, groups),
            f"layers.{i}.attention.wv.weight": layer.self_attn.v_proj.weight,
            f"layers.{i}.attention.wo.weight": layer.self_attn.o_proj.weight,
            f"layers.{i}.feed_forward.w1.weight": layer.mlp.gate_proj.weight,
            f"layers.{i}.feed_forward.w2.weight": layer.mlp.down_proj.weight,
            f"layers.{i}.feed_forward.w3.weight": layer.mlp.up_proj.weight,
            f"layers.{i}.attention_norm.weight": layer.input_layernorm.weight,
            f"layers.{i}.ffn_norm.weight": layer.post_attention_layernorm.weight,
        }
    return {name: tensor.detach() for name, tensor in weights.items()}


def write_meta(
    folder: Path, model: LlamaForCausalLM, parts: int = 2, embedding_split: int = 1, **params: Any
) -> None:
    split = {"wo": 1, "w2": 1, "tok_embeddings": embedding_split}
    split |= dict.fromkeys(("wq", "wk", "wv", "w1", "w3", "output"), 0)
    files: list[dict[str, Tensor]] = [{} for _ in range(parts)]
    for name, tensor in meta_weights(model).items():
        kind = name.split(".")[-2]
        pieces = tensor.chunk(parts, dim=split[kind]) if kind in split else [tensor] * parts
        for file, piece in zip(files, pieces, strict=True):
            file[name] = piece.clone()
    for i, file in enumerate(files):
        torch.save(file, folder / f"consolidated.{i:02d}.pth")
    stated = {
        "dim": model.config.hidden_size,
        "n_layers": model.config.num_hidden_layers,
        "n_heads": model.config.num_attention_heads,
        "n_kv_heads": model.config.num_key_value_heads,
        "multiple_of": 16,
        "norm_eps": model.config.rms_norm_eps,
        "vocab_size": -1,
    }
    stated |= params
    kept = {name: value for name, value in stated.items() if value is not None}
    (folder / "params.json").write_text(json.dumps(kept))


META_SHAPE = {"vocab_size": 68, "intermediate_size": feed_forward_width(32, 16)}


@pytest.mark.parametrize(
    ("changes", "parts", "embedding_split", "params"),
    [
        ({}, 1, 1, {}),
        ({}, 2, 1, {}),
        ({"num_key_value_heads": 4}, 4, 1, {"n_kv_heads": None, "vocab_size": 68}),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
            2,
            0,
            {"rope_theta": 5e5},
        ),
        (
            {"intermediate_size": feed_forward_width(32, 16, 1.3)},
            2,
            1,
            {"ffn_dim_multiplier": 1.3},
        ),
    ],
)
@torch.no_grad()
def test_meta_layout_gives_the_same_logits(
    changes: dict[str, Any],
    parts: int,
    embedding_split: int,
    params: dict[str, Any],
    tmp_path: Path,
) -> None:
    theirs = causal(**META_SHAPE | changes)
    write_meta(tmp_path, theirs, parts, embedding_split, **params)
    ours = checkpoint.load(tmp_path)
    assert_same(ours.state_dict(), theirs.state_dict())
    tokens = torch.arange(40)[None]
    assert (ours(tokens) - theirs(tokens).logits).abs().max() < 1e-4
    assert checkpoint.check_folder(tmp_path, scalar=False) == ours.config
    assert_same(checkpoint.load_meta(tmp_path).state_dict(), theirs.state_dict())
    assert_same(checkpoint.scalar_from(tmp_path, 0).model.state_dict(), theirs.model.state_dict())


def test_meta_rows_are_reordered_as_its_rotation_wants() -> None:
    """Attention scores with Meta's own rotation, complex numbers over neighbouring rows."""
    config = ModelConfig(hidden_size=16, num_attention_heads=2, num_key_value_heads=2)
    x, weight = torch.randn(2, 5, 16), torch.randn(2, 16, 16)
    frequencies = inverse_frequencies(config)
    turns = torch.polar(torch.ones(5, 4), torch.outer(torch.arange(5.0), frequencies))[:, None]
    theirs = [
        torch.view_as_real(
            torch.view_as_complex((x[i] @ weight[i].T).view(5, 2, 4, 2)) * turns
        ).flatten(2)
        for i in range(2)
    ]
    angles = rotation(torch.arange(5)[None], frequencies, 2, torch.float32)
    ours = [
        rotate((x[i] @ _half_split(weight[i], 2).T).view(1, 5, 2, 8), *angles)[0] for i in range(2)
    ]
    torch.testing.assert_close(
        torch.einsum("thk,shk->hts", *ours), torch.einsum("thk,shk->hts", *theirs)
    )


@pytest.mark.parametrize(
    ("theta", "context", "eos"),
    [(None, 4096, 2), (500_000.0, 8192, 128_001), (1_000_000.0, 16_384, 2)],
)
def test_meta_context_is_that_published(
    theta: float | None, context: int, eos: int, tmp_path: Path
) -> None:
    write_meta(tmp_path, causal(**META_SHAPE), rope_theta=theta)
    config = checkpoint.check_folder(tmp_path)
    assert (config.max_position_embeddings, config.eos_token_id) == (context, eos)


class Payload:
    """Runs a command when a pickle of it is read without care."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path) -> None:
    write_meta(tmp_path, causal(**META_SHAPE))
    path = tmp_path / "consolidated.01.pth"
    torch.save({"tok_embeddings.weight": Payload(tmp_path / "harm")}, path)
    assert f"{path} holds something other than tensors" in refusal(tmp_path)
    assert not (tmp_path / "harm").exists()


def test_damaged_meta_files_are_refused(tmp_path: Path) -> None:
    write_meta(tmp_path, causal(**META_SHAPE))
    first, second = tmp_path / "consolidated.00.pth", tmp_path / "consolidated.01.pth"
    content = second.read_bytes()
    for kept in (0, 100, len(content) - 100):
        second.write_bytes(content[:kept])
        assert f"{second} is damaged or not complete" in refusal(tmp_path)
    torch.save([torch.ones(2)], second)
    assert f"{second} does not hold tensors by name" in refusal(tmp_path)
    second.unlink()
    assert "is 16 wide over the 1 consolidated.*.pth and dim" in refusal(tmp_path)
    second.write_bytes(content)
    first.unlink()
    assert "has no consolidated.00.pth" in refusal(tmp_path, FileNotFoundError)
    second.unlink()
    assert "has no consolidated.*.pth" in refusal(tmp_path, FileNotFoundError)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"dim": None}, "dim must be an integer, not None"),
        ({"n_layers": "2"}, "n_layers must be an integer, not '2'"),
        ({"n_heads": 0}, "num_attention_heads is 0"),
        ({"multiple_of": "many"}, "a field has the wrong type"),
        ({"rope_theta": [1]}, "a field has the wrong type"),
        ({"vocab_size": 100}, "vocab_size is 100 and tok_embeddings.weight has 68 rows"),
        ({"use_scaled_rope": True}, "use_scaled_rope needs a factor"),
    ],
)
def test_malformed_params_are_refused(params: dict[str, Any], message: str, tmp_path: Path) -> None:
    write_meta(tmp_path, causal(**META_SHAPE), **params)
    assert f"{tmp_path / 'params.json'}: {message}" in refusal(tmp_path)


def test_params_of_another_model_are_refused(tmp_path: Path) -> None:
    write_meta(tmp_path, causal(**META_SHAPE), n_layers=3)
    assert "lacks the tensor model.layers.2.input_layernorm.weight" in refusal(tmp_path)
    write_meta(tmp_path, causal(**META_SHAPE), multiple_of=64)
    assert "mlp.gate_proj.weight has shape [96, 32] where" in refusal(tmp_path)
    (tmp_path / "params.json").unlink()
    assert "has no params.json" in refusal(tmp_path, FileNotFoundError)
