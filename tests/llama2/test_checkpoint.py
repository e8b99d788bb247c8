"""Model folders: exchanged with transformers bit by bit, and written so that a crash is safe."""

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from llama2 import checkpoint, hugging_face_checkpoint
from llama2.config import RopeScaling
from llama2.model import Transformer
from tests.llama2.model_folders import SMALL, assert_same, causal, sequence_classifier

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "grouped-query": {},
    "multi-head": {"num_key_value_heads": 4, "rms_norm_eps": 1e-5},
    "tied": {"tie_word_embeddings": True},
    "llama3": {"rope_parameters": LLAMA3, "eos_token_id": [2, 7, 9], "bos_token_id": None},
    "linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
    "bias": {"attention_bias": True, "mlp_bias": True},
    "wide heads": {"head_dim": 12, "pad_token_id": 0},
}


def comparable(config: LlamaConfig) -> dict[str, Any]:
    """A config's fields without where it came from and the older spelling of a rotary type."""
    fields = config.to_dict()
    fields.pop("_name_or_path", None)
    fields["rope_parameters"].pop("type", None)
    return fields


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A causal model as transformers saves it."""
    causal().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def scalar_folder(tmp_path: Path) -> Path:
    sequence_classifier().save_pretrained(tmp_path / "scalar")
    return tmp_path / "scalar"


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip_through_transformers(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    theirs = causal(**VARIANTS[name]).to(dtype)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = checkpoint.load(tmp_path / "theirs", dtype=dtype)
    assert_same(ours.state_dict(), theirs.state_dict())
    checkpoint.save(ours, tmp_path / "ours")
    again = LlamaForCausalLM.from_pretrained(tmp_path / "ours", dtype="auto")
    assert_same(again.state_dict(), theirs.state_dict())
    assert comparable(again.config) == comparable(theirs.config)
    assert_same(
        load_file(tmp_path / "ours" / "model.safetensors"),
        load_file(tmp_path / "theirs" / "model.safetensors"),
    )
    assert checkpoint.load_config(tmp_path / "ours") == ours.config


def test_weights_are_converted_to_the_dtype_asked_for(folder: Path) -> None:
    wide, narrow = checkpoint.load(folder), checkpoint.load(folder, dtype=torch.bfloat16)
    for name, tensor in narrow.state_dict().items():
        assert torch.equal(tensor, wide.state_dict()[name].bfloat16())
    assert all(parameter.requires_grad for parameter in narrow.parameters())


def test_loaded_weights_outlive_their_file(folder: Path) -> None:
    model = checkpoint.load(folder)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with (folder / "model.safetensors").open("r+b") as file:
        file.write(b"\0" * (folder / "model.safetensors").stat().st_size)
    assert_same(model.state_dict(), before)


def test_shards_both_ways(tmp_path: Path) -> None:
    theirs = causal()
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 2
    ours = checkpoint.load(tmp_path / "theirs")
    assert_same(ours.state_dict(), theirs.state_dict())
    checkpoint.save(ours, tmp_path / "ours", shard_bytes=20_000)
    files = sorted((tmp_path / "ours").glob("*.safetensors"))
    assert [f.name for f in files] == [
        f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)
    ]
    sizes = [sum(tensor.nbytes for tensor in load_file(file).values()) for file in files]
    assert len(files) > 2 and max(sizes) <= 20_000
    index = json.loads((tmp_path / "ours" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(sizes)
    again = LlamaForCausalLM.from_pretrained(tmp_path / "ours")
    assert_same(again.state_dict(), theirs.state_dict())
    assert_same(dict(checkpoint.read_tensors(tmp_path / "ours")), theirs.state_dict())


def test_tied_embeddings_are_one_tensor(tmp_path: Path) -> None:
    causal(tie_word_embeddings=True).save_pretrained(tmp_path)
    model = checkpoint.load(tmp_path)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    weights = load_file(tmp_path / "model.safetensors")
    assert "lm_head.weight" not in weights
    # Some folders hold the head all the same.
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, tmp_path / "model.safetensors")
    assert_same(checkpoint.load(tmp_path).state_dict(), model.state_dict())
    weights["lm_head.weight"][3, 4] += 1
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"lm_head\.weight differs .* tie_word_embeddings to fals"):
        checkpoint.load(tmp_path)


def test_scalar_model_both_ways(scalar_folder: Path, tmp_path: Path) -> None:
    theirs = LlamaForSequenceClassification.from_pretrained(scalar_folder)
    ours = checkpoint.load_scalar(scalar_folder)
    assert_same(ours.state_dict(), theirs.state_dict())
    checkpoint.save(ours, tmp_path)
    again = LlamaForSequenceClassification.from_pretrained(tmp_path)
    assert again.config.num_labels == 1
    assert_same(again.state_dict(), theirs.state_dict())
    assert checkpoint.check_folder(tmp_path, scalar=True).pad_token_id == 0


def test_scalar_from_a_causal_model_draws_the_head(tmp_path: Path) -> None:
    theirs = causal(hidden_size=512, intermediate_size=16)
    theirs.save_pretrained(tmp_path)
    first, second, other = (checkpoint.scalar_from(tmp_path, seed) for seed in (1, 1, 2))
    assert_same(first.model.state_dict(), theirs.model.state_dict())
    assert torch.equal(first.score.weight, second.score.weight)
    assert not torch.equal(first.score.weight, other.score.weight)
    # The standard deviation of a sample of 512, over its expectation, is within 4 / sqrt(1024).
    assert abs(first.score.weight.std().item() * 513**0.5 - 1) < 0.125


def test_scalar_from_a_scalar_model_keeps_the_head(scalar_folder: Path) -> None:
    expected = checkpoint.load_scalar(scalar_folder).state_dict()
    assert_same(checkpoint.scalar_from(scalar_folder, 5).state_dict(), expected)


def test_scalar_from_a_tied_model(tmp_path: Path) -> None:
    theirs = causal(tie_word_embeddings=True)
    theirs.save_pretrained(tmp_path / "causal")
    scalar = checkpoint.scalar_from(tmp_path / "causal", 0)
    checkpoint.save(scalar, tmp_path / "scalar")
    loaded = checkpoint.load_scalar(tmp_path / "scalar")
    assert_same(loaded.model.state_dict(), theirs.model.state_dict())


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"attention_bias": True}])
def test_streamed_weights_are_those_of_the_parameters_each_once(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    theirs = causal(**changes).bfloat16()
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    for kind, (model, weights), expected in (
        ("causal", checkpoint.stream(tmp_path), checkpoint.load(tmp_path)),
        ("scalar", checkpoint.stream_scalar_from(tmp_path, 3), checkpoint.scalar_from(tmp_path, 3)),
    ):
        named = list(weights)
        found = dict(named)
        assert len(found) == len(named)
        wanted = dict(expected.named_parameters())
        assert set(found) == set(wanted) == {name for name, _ in model.named_parameters()}
        assert all(parameter.is_meta for parameter in model.parameters())
        for name, tensor in found.items():
            drawn = kind == "scalar" and name == "score.weight"
            assert tensor.dtype == (torch.float32 if drawn else torch.bfloat16)
            assert torch.equal(tensor.float(), wanted[name])


def test_a_tied_head_that_differs_is_met_at_the_end_of_the_stream(tmp_path: Path) -> None:
    causal(tie_word_embeddings=True).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"] + 1
    save_file(weights, tmp_path / "model.safetensors")
    for _, stream in (checkpoint.stream(tmp_path), checkpoint.stream_scalar_from(tmp_path, 0)):
        with pytest.raises(ValueError, match=r"lm_head\.weight differs"):
            list(stream)


HEAD: dict[str, Any] = {"model_type": "llama", **SMALL}
OLD_LLAMA3 = {k: v for k, v in LLAMA3.items() if k != "rope_theta"}


@pytest.mark.parametrize(
    ("fields", "theta", "scaling"),
    [
        ({}, 1e4, None),
        ({"rope_theta": 1e6, "rope_scaling": None}, 1e6, None),
        ({"rope_scaling": {"type": "linear", "factor": 4}}, 1e4, RopeScaling("linear", 4.0)),
        ({"rope_scaling": {"rope_type": "linear", "factor": 4}}, 1e4, RopeScaling("linear", 4.0)),
        (
            {"rope_theta": 5e5, "rope_scaling": OLD_LLAMA3},
            5e5,
            RopeScaling("llama3", 8.0, 1.0, 4.0, 32),
        ),
        ({"rope_parameters": LLAMA3}, 5e5, RopeScaling("llama3", 8.0, 1.0, 4.0, 32)),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 99.0}}, 99.0, None),
    ],
)
def test_rotary_settings_in_every_spelling(
    fields: dict[str, Any], theta: float, scaling: RopeScaling | None
) -> None:
    config = checkpoint.config_from_hf(HEAD | fields)
    assert (config.rope_theta, config.rope_scaling) == (theta, scaling)
    written = checkpoint.config_to_hf(config, "LlamaForCausalLM")
    assert checkpoint.config_from_hf(written) == config
    for spelling in (("rope_parameters",), ("rope_theta", "rope_scaling")):
        kept = {k: v for k, v in written.items() if not k.startswith("rope_") or k in spelling}
        assert checkpoint.config_from_hf(kept) == config


def test_absent_fields_have_the_defaults_of_transformers() -> None:
    shape = {k: v for k, v in HEAD.items() if k not in ("num_key_value_heads",)}
    del shape["max_position_embeddings"]
    assert checkpoint.config_from_hf(shape) == checkpoint.config_from_hf(
        LlamaConfig(**shape).to_dict()
    )
    assert checkpoint.config_from_hf(shape).rms_norm_eps == 1e-6


def test_frequencies_in_old_checkpoints_are_ignored(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    save_file(weights | extra, folder / "model.safetensors")
    assert_same(checkpoint.load(folder).state_dict(), weights)


def test_saving_again_replaces_all_weights_and_keeps_other_files(tmp_path: Path) -> None:
    first, second = checkpoint_model(1), checkpoint_model(2)
    checkpoint.save(first, tmp_path, {"tokenizer.model": b"pieces"}, shard_bytes=20_000)
    (tmp_path / "notes.txt").write_text("mine")
    checkpoint.save(second, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.json",
        "model.safetensors",
        "notes.txt",
        "tokenizer.model",
    ]
    assert (tmp_path / "tokenizer.model").read_bytes() == b"pieces"
    assert_same(checkpoint.load(tmp_path).state_dict(), second.state_dict())
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    modes = {path.stat().st_mode for path in tmp_path.iterdir()}
    assert len(modes) == 1, "whoever may read one file may read all"


def checkpoint_model(seed: int) -> Transformer:
    torch.manual_seed(seed)
    return Transformer(checkpoint.config_from_hf(HEAD))


class Killed(BaseException):
    """Nothing catches it, as nothing catches the end of a process."""


def test_an_interrupted_save_never_looks_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = checkpoint_model(1), checkpoint_model(2)
    allowed = 0

    def until_killed(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal allowed
            allowed -= 1
            if allowed < 0:
                raise Killed
            return function(*args, **kwargs)

        return call

    outcomes = set()
    for steps in range(100):
        folder = tmp_path / str(steps)
        checkpoint.save(old, folder, shard_bytes=20_000)
        allowed = steps
        with monkeypatch.context() as patch:
            patch.setattr(hugging_face_checkpoint, "save_file", until_killed(save_file))
            patch.setattr(os, "replace", until_killed(os.replace))
            patch.setattr(Path, "unlink", until_killed(Path.unlink))
            try:
                checkpoint.save(new, folder, shard_bytes=30_000)
            except Killed:
                outcomes.add(state_of(folder, old, new))
            else:
                break
        checkpoint.save(new, folder)
        assert state_of(folder, old, new) == "new"
    assert steps > 8
    assert outcomes == {"old", "incomplete"}


def state_of(folder: Path, old: Transformer, new: Transformer) -> str:
    if not (folder / "config.json").exists():
        with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
            checkpoint.check_folder(folder)
        return "incomplete"
    found = checkpoint.load(folder).state_dict()
    for name, model in (("old", old), ("new", new)):
        if all(torch.equal(found[k], tensor) for k, tensor in model.state_dict().items()):
            return name
    return "mixed"


def test_a_full_disk_is_told_with_the_systems_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which safetensors tells in its text alone."""

    def on_a_full_disk(*given: object, **options: object) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(hugging_face_checkpoint, "save_file", on_a_full_disk)
    with pytest.raises(OSError, match="No space left on device") as caught:
        hugging_face_checkpoint.save_tensors({}, tmp_path / "model.safetensors")
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename == str(tmp_path / "model.safetensors")
