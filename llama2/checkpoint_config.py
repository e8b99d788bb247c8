"""A model's `config.json`, as transformers 4 and 5 write and read it, to and from `ModelConfig`."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from llama2.config import ModelConfig, RopeScaling

Architecture = Literal["LlamaForCausalLM", "LlamaForSequenceClassification"]
CAUSAL: Architecture = "LlamaForCausalLM"
SCALAR: Architecture = "LlamaForSequenceClassification"


def load_config(folder: str | Path) -> ModelConfig:
    """The config of a Hugging Face folder, from its `config.json`.

    Raises `FileNotFoundError` where there is no such file, `ValueError` naming the file and field
    where it is malformed or describes something other than a Llama.
    """
    return load_config_and_architecture(folder)[0]


def load_config_and_architecture(folder: str | Path) -> tuple[ModelConfig, Architecture]:
    """The config and which head stands on it. Raises as `load_config` does."""
    path = Path(folder) / "config.json"
    values = read_json(path)
    try:
        return config_from_hf(values), architecture_of(values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def save_config(
    config: ModelConfig, folder: str | Path, architecture: Architecture, dtype: torch.dtype
) -> None:
    """Write `config.json` into `folder`. `dtype` is that of the weights beside it."""
    name = str(dtype).removeprefix("torch.")
    values = config_to_hf(config, architecture) | {"dtype": name, "torch_dtype": name}
    text = json.dumps(values, indent=2, sort_keys=True) + "\n"
    (Path(folder) / "config.json").write_text(text, encoding="utf-8")


def config_from_hf(values: Mapping[str, Any]) -> ModelConfig:
    """The model that the contents of a `config.json` describe, with transformers' defaults.

    Rotary settings are read from `rope_parameters` (transformers 5) or from `rope_scaling` and
    `rope_theta` (transformers 4). Raises `ValueError` naming the field that is missing, malformed,
    or asks for what a Llama has not.
    """
    architecture_of(values)
    if values.get("hidden_act", "silu") not in ("silu", "swish"):
        raise ValueError(f"hidden_act {values['hidden_act']!r} is not Llama's; it must be 'silu'.")
    if values.get("quantization_config") is not None:
        raise ValueError("quantized weights are not supported; use the unquantized checkpoint.")
    heads = _integer(values, "num_attention_heads")
    theta, scaling = _rope(values)
    return ModelConfig(
        vocab_size=_integer(values, "vocab_size"),
        hidden_size=_integer(values, "hidden_size"),
        intermediate_size=_integer(values, "intermediate_size"),
        num_hidden_layers=_integer(values, "num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=_integer(values, "num_key_value_heads", heads),
        head_dim=None if values.get("head_dim") is None else _integer(values, "head_dim"),
        max_position_embeddings=_integer(values, "max_position_embeddings", 2048),
        rms_norm_eps=_number(values, "rms_norm_eps", 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        tie_word_embeddings=_flag(values, "tie_word_embeddings"),
        attention_bias=_flag(values, "attention_bias"),
        mlp_bias=_flag(values, "mlp_bias"),
        initializer_range=_number(values, "initializer_range", 0.02),
        bos_token_id=_token(values, "bos_token_id", 1),
        eos_token_id=_end_tokens(values),
        pad_token_id=_token(values, "pad_token_id", None),
    )


def config_to_hf(config: ModelConfig, architecture: Architecture) -> dict[str, Any]:
    """The contents of `config.json`, rotary settings in the spellings of transformers 4 and 5."""
    eos = config.eos_token_id
    labels: dict[str, Any] = {}
    if architecture == SCALAR:
        labels = {"id2label": {"0": "score"}, "label2id": {"score": 0}}
    return {
        "architectures": [architecture],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_width,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "tie_word_embeddings": config.tie_word_embeddings,
        "attention_bias": config.attention_bias,
        "attention_dropout": 0.0,
        "mlp_bias": config.mlp_bias,
        "initializer_range": config.initializer_range,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(eos) if isinstance(eos, tuple) else eos,
        "pad_token_id": config.pad_token_id,
        "use_cache": True,
        "pretraining_tp": 1,
        "rope_theta": config.rope_theta,
        "rope_scaling": _rope_scaling(config.rope_scaling),
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta}
        | _rope_parameters(config.rope_scaling),
        **labels,
    }


def architecture_of(values: Mapping[str, Any]) -> Architecture:
    """Which of the two a `config.json` describes. Raises `ValueError` where it is neither."""
    kind = values.get("model_type")
    if kind != "llama":
        raise ValueError(f"model_type is {kind!r}; only 'llama' is supported.")
    names = values.get("architectures") or [CAUSAL]
    if names == [CAUSAL]:
        return CAUSAL
    if names == [SCALAR]:
        return SCALAR
    raise ValueError(f"architectures is {names!r}; only {CAUSAL} and {SCALAR} are supported.")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises `FileNotFoundError` where folder or file is missing, `ValueError` where it is malformed.
    """
    if not path.parent.is_dir():
        raise FileNotFoundError(f"There is no folder {path.parent}; check the path.")
    if not path.is_file():
        raise FileNotFoundError(
            f"{path.parent} has no {path.name}; give the folder of a Llama model."
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path} line {error.lineno} is not valid JSON ({error.msg}); fetch the file again."
        ) from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text; fetch the file again.") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds no JSON object; fetch the file again.")
    return values


def _rope(values: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """Base and scaling; where both spellings are there, transformers 5 takes `rope_scaling`."""
    rope = values.get("rope_scaling") or values.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise ValueError(f"rope_scaling must be an object, not {rope!r}; fetch the file again.")
    theta = _number(rope, "rope_theta", _number(values, "rope_theta", 10_000.0))
    if rope.get("partial_rotary_factor", values.get("partial_rotary_factor")) not in (None, 1):
        raise ValueError("partial_rotary_factor is not Llama's; only whole heads are rotated.")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind == "linear":
        return theta, RopeScaling("linear", _number(rope, "factor"))
    if kind != "llama3":
        raise ValueError(f"rope_type {kind!r} is not supported; 'linear' and 'llama3' are.")
    context = _integer(values, "max_position_embeddings", 2048)
    return theta, RopeScaling(
        "llama3",
        _number(rope, "factor"),
        _number(rope, "low_freq_factor"),
        _number(rope, "high_freq_factor"),
        _integer(rope, "original_max_position_embeddings", context),
    )


def _rope_parameters(scaling: RopeScaling | None) -> dict[str, Any]:
    if scaling is None:
        return {}
    if scaling.kind == "linear":
        return {"rope_type": "linear", "factor": scaling.factor}
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_max_position_embeddings,
    }


def _rope_scaling(scaling: RopeScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    if scaling.kind == "linear":
        # Before 4.43 transformers took exactly these two fields, and later ones take them still.
        return {"type": "linear", "factor": scaling.factor}
    return _rope_parameters(scaling)


def _integer(values: Mapping[str, Any], name: str, default: int | None = None) -> int:
    value = values.get(name)
    value = default if value is None else value
    if value is None:
        raise ValueError(f"the field {name} is missing; fetch the file again.")
    if type(value) is not int or value < 1:
        raise ValueError(f"{name} must be a positive integer, not {value!r}; correct it.")
    return value


def _number(values: Mapping[str, Any], name: str, default: float | None = None) -> float:
    value = values.get(name)
    value = default if value is None else value
    if value is None:
        raise ValueError(f"the field {name} is missing; fetch the file again.")
    if type(value) not in (int, float) or value <= 0:
        raise ValueError(f"{name} must be a positive number, not {value!r}; correct it.")
    return float(value)


def _flag(values: Mapping[str, Any], name: str) -> bool:
    value = values.get(name) or False
    if value is not True and value is not False:
        raise ValueError(f"{name} must be true or false, not {value!r}; correct it.")
    return value


def _token(values: Mapping[str, Any], name: str, default: int | None) -> int | None:
    value = values.get(name, default)
    if value is not None and type(value) is not int:
        raise ValueError(f"{name} must be a token id, not {value!r}; correct it.")
    return value


def _end_tokens(values: Mapping[str, Any]) -> int | tuple[int, ...] | None:
    """Llama 3's chat models name several."""
    value = values.get("eos_token_id", 2)
    if isinstance(value, list) and all(type(i) is int for i in value):
        return tuple(value)
    return _token(values, "eos_token_id", 2)
