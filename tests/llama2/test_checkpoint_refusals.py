"""Model folders that cannot be loaded: each refused in one sentence, before weights are read."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llama2 import checkpoint
from llama2.hugging_face_checkpoint import HuggingFaceFolder
from tests.llama2.model_folders import causal, refusal, sequence_classifier


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A causal model as transformers saves it."""
    causal().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_the_check_reads_no_weights(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(_: HuggingFaceFolder) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(HuggingFaceFolder, "tensors", read)
    started = time.perf_counter()
    config = checkpoint.check_folder(folder)
    assert time.perf_counter() - started < 1
    assert config.hidden_size == 32


def test_missing_pieces_are_named(folder: Path, tmp_path: Path) -> None:
    assert "There is no folder" in refusal(tmp_path / "absent", FileNotFoundError)
    (folder / "model.safetensors").unlink()
    assert "has neither model.safetensors nor" in refusal(folder, FileNotFoundError)
    (folder / "pytorch_model.bin").touch()
    assert "convert its pytorch_model.bin" in refusal(folder, FileNotFoundError)
    (folder / "config.json").unlink()
    assert "has no config.json" in refusal(folder, FileNotFoundError)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mistral"}, "model_type is 'mistral'; only 'llama' is supported"),
        ({"architectures": ["LlamaModel"]}, "architectures is ['LlamaModel']; only LlamaForCausa"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not Llama's; it must be 'silu'"),
        ({"quantization_config": {"bits": 4}}, "quantized weights are not supported"),
        ({"rope_scaling": {"type": "yarn", "factor": 2}}, "rope_type 'yarn' is not supported"),
        ({"rope_scaling": {"type": "linear"}}, "the field factor is missing"),
        ({"rope_scaling": 3}, "rope_scaling must be an object, not 3"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"hidden_size": "32"}, "hidden_size must be a positive integer, not '32'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be a positive integer, not 0"),
        ({"vocab_size": None}, "the field vocab_size is missing"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps must be a positive number, not 'small'"),
        ({"attention_bias": 2}, "attention_bias must be true or false, not 2"),
        ({"eos_token_id": [2, "x"]}, "eos_token_id must be a token id, not [2, 'x']"),
        (
            {"num_attention_heads": 3, "head_dim": None},
            "hidden_size 32 is not a multiple of num_at",
        ),
    ],
)
def test_configs_of_something_else_are_refused(
    changes: dict[str, Any], message: str, folder: Path
) -> None:
    edit_config(folder, **changes)
    assert f"{folder / 'config.json'}: {message}" in refusal(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'{\n "model_type": "llama",\n', "line 3 is not valid JSON"),
        (b"[1]", "holds no JSON object"),
        (b"\xff\xfe", "is not UTF-8 text"),
    ],
)
def test_malformed_config_is_refused(text: bytes, message: str, folder: Path) -> None:
    (folder / "config.json").write_bytes(text)
    assert f"{folder / 'config.json'} {message}" in refusal(folder)


@pytest.mark.parametrize("kept", [0, 5, 200, -1])
def test_truncated_weights_are_refused(kept: int, folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    assert f"{path} is truncated or corrupt" in refusal(folder)


def test_corrupt_weights_are_refused(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(b"\xff" * 500)
    assert f"{path} is truncated or corrupt" in refusal(folder)


def test_wrong_tensors_are_named(folder: Path) -> None:
    path = folder / "model.safetensors"
    weights = load_file(path)
    name = "model.layers.1.mlp.up_proj.weight"
    save_file({k: v for k, v in weights.items() if k != name}, path)
    assert f"lacks the tensor {name} [48, 32]" in refusal(folder)
    save_file(weights | {name: torch.zeros(47, 32)}, path)
    assert f"{name} has shape [47, 32] where the config asks for [48, 32]" in refusal(folder)
    save_file(weights | {"model.layers.2.mlp.up_proj.weight": torch.zeros(1)}, path)
    assert "holds a tensor model.layers.2.mlp.up_proj.weight that" in refusal(folder)
    save_file(weights, path)
    edit_config(folder, vocab_size=66)
    assert "embed_tokens.weight has shape [67, 32] where the config asks for [66, 32]" in refusal(
        folder
    )


def test_missing_shard_and_malformed_index_are_refused(folder: Path) -> None:
    checkpoint.save(checkpoint.load(folder), folder, shard_bytes=20_000)
    shard, index = sorted(folder.glob("*.safetensors"))[1], folder / "model.safetensors.index.json"
    content = shard.read_bytes()
    shard.unlink()
    assert f"{index} names {shard.name}, which is absent" in refusal(folder, FileNotFoundError)
    shard.write_bytes(content[:-8])
    assert f"{shard} is truncated or corrupt" in refusal(folder)
    index.write_text('{"weight_map": [1]}')
    assert f"{index} has no weight_map" in refusal(folder)


def test_the_other_kind_of_model_is_refused(folder: Path, tmp_path: Path) -> None:
    scalar_folder = tmp_path / "scalar"
    sequence_classifier().save_pretrained(scalar_folder)
    causal_wanted = "holds a scalar .* model; give the folder of a causal language model"
    scalar_wanted = "holds a causal language model; give the folder of a scalar"
    with pytest.raises(ValueError, match=causal_wanted):
        checkpoint.load(scalar_folder)
    with pytest.raises(ValueError, match=causal_wanted):
        checkpoint.check_folder(scalar_folder, scalar=False)
    with pytest.raises(ValueError, match=scalar_wanted):
        checkpoint.load_scalar(folder)
    with pytest.raises(ValueError, match=scalar_wanted):
        checkpoint.check_folder(folder, scalar=True)


def test_a_classifier_of_several_labels_is_refused(tmp_path: Path) -> None:
    sequence_classifier(labels=3).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"score\.weight has shape \[3, 32\] .* \[1, 32\]"):
        checkpoint.load_scalar(tmp_path)
