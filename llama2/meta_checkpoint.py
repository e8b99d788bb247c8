"""Meta's original layout: `params.json` and `consolidated.*.pth`, one file per model-parallel rank.

Two things differ from Hugging Face's layout beside the names. Each file holds a slice of every
matrix: rows where the output is split over ranks, columns where the input is. And rotary positions
turn neighbouring pairs (0, 1), (2, 3), ... of a head instead of pairs (i, i + K/2), so the rows of
the query and key projections are put in another order.
"""

import pickle
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama2.checkpoint_config import read_json
from llama2.config import ModelConfig, feed_forward_width

# Meta's name, Hugging Face's, and the dimension that is split over files (None: each has it all).
LAYER_NAMES: dict[str, tuple[str, int | None]] = {
    "attention.wq": ("self_attn.q_proj", 0),
    "attention.wk": ("self_attn.k_proj", 0),
    "attention.wv": ("self_attn.v_proj", 0),
    "attention.wo": ("self_attn.o_proj", 1),
    "feed_forward.w1": ("mlp.gate_proj", 0),
    "feed_forward.w2": ("mlp.down_proj", 1),
    "feed_forward.w3": ("mlp.up_proj", 0),
    "attention_norm": ("input_layernorm", None),
    "ffn_norm": ("post_attention_layernorm", None),
}
EMBEDDING = "tok_embeddings.weight"
# `params.json` states no context and no token ids; each base was published with one of each:
# Llama 2, Llama 3, Code Llama. Context, beginning and end of text.
PUBLISHED = {
    10_000.0: (4096, 1, 2),
    500_000.0: (8192, 128_000, 128_001),
    1_000_000.0: (16_384, 1, 2),
}


class MetaFolder:
    """A folder of Llama 1, 2 or 3 or Code Llama as Meta publishes it."""

    scalar = False

    def __init__(self, folder: Path) -> None:
        """Open all files without reading their weights.

        Raises `FileNotFoundError` or `ValueError`, naming the file, where one is missing, damaged,
        malformed, or holds anything but tensors.
        """
        self.folder = folder
        path = folder / "params.json"
        params = read_json(path)
        for name in ("dim", "n_layers", "n_heads"):
            if type(params.get(name)) is not int:
                raise ValueError(
                    f"{path}: {name} must be an integer, not {params.get(name)!r}; correct it."
                )
        self._width: int = params["dim"]
        self._parts = [_open(path) for path in _files(folder)]
        vocabulary = self._vocabulary()
        try:
            self.config = _config(params, vocabulary)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor, by Hugging Face's name."""
        joined = ((n, self._join(meta_name, "meta")) for n, meta_name in self._names().items())
        return {name: tuple(tensor.shape) for name, tensor in joined}

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor by Hugging Face's name, joined and in its order of rows, one at a time."""
        for name, meta_name in self._names().items():
            tensor = self._join(meta_name, "cpu")
            if name.endswith("q_proj.weight"):
                tensor = _half_split(tensor, self.config.num_attention_heads)
            elif name.endswith("k_proj.weight"):
                tensor = _half_split(tensor, self.config.num_key_value_heads)
            yield name, tensor

    def _names(self) -> dict[str, str]:
        """Meta's name by Hugging Face's."""
        names = dict.fromkeys(name for part in self._parts for name in part)
        # Rotary frequencies, which follow from the config.
        return {_translated(name): name for name in names if not name.endswith("rope.freqs")}

    def _vocabulary(self) -> int:
        if any(EMBEDDING not in part or part[EMBEDDING].dim() != 2 for part in self._parts):
            raise ValueError(
                f"{self.folder}: a consolidated.*.pth has no matrix {EMBEDDING}; fetch it again."
            )
        rows, columns = self._join(EMBEDDING, "meta").shape
        if columns != self._width:
            raise ValueError(
                f"{self.folder}: {EMBEDDING} is {columns} wide over the {len(self._parts)} "
                f"consolidated.*.pth and dim in params.json is {self._width}; fetch all files."
            )
        return rows

    def _join(self, name: str, device: str) -> Tensor:
        parts = [part[name].to(device) for part in self._parts if name in part]
        split = _split_dimension(name)
        if name == EMBEDDING:
            # Llama 1 and 2 split the width, Llama 3 the vocabulary.
            split = 0 if parts[0].shape[1] == self._width else 1
        if split is None or len(parts) == 1:
            return parts[0]
        try:
            return torch.cat(parts, dim=split)
        except (RuntimeError, IndexError) as error:
            shapes = ", ".join(str(list(part.shape)) for part in parts)
            raise ValueError(
                f"{self.folder}: the parts of {name} do not fit together ({shapes}); fetch all "
                "consolidated.*.pth of one model."
            ) from error


def _config(params: Mapping[str, Any], vocabulary: int) -> ModelConfig:
    if params.get("vocab_size", -1) not in (-1, vocabulary):
        raise ValueError(
            f"vocab_size is {params['vocab_size']} and {EMBEDDING} has {vocabulary} rows; fetch "
            "all files of one model."
        )
    if params.get("use_scaled_rope"):
        raise ValueError(
            "use_scaled_rope needs a factor that is not stated here; use the model's Hugging Face "
            "folder."
        )
    try:
        theta = float(params.get("rope_theta") or 10_000.0)
        context, bos, eos = PUBLISHED.get(theta, PUBLISHED[10_000.0])
        return ModelConfig(
            vocab_size=vocabulary,
            hidden_size=params["dim"],
            intermediate_size=feed_forward_width(
                params["dim"],
                params.get("multiple_of") or 256,
                params.get("ffn_dim_multiplier") or 1.0,
            ),
            num_hidden_layers=params["n_layers"],
            num_attention_heads=params["n_heads"],
            num_key_value_heads=params.get("n_kv_heads") or params["n_heads"],
            max_position_embeddings=params.get("max_seq_len") or context,
            rms_norm_eps=params.get("norm_eps") or 1e-5,
            rope_theta=theta,
            bos_token_id=bos,
            eos_token_id=eos,
        )
    except TypeError as error:
        raise ValueError(f"a field has the wrong type ({error}); correct it.") from error


def _files(folder: Path) -> list[Path]:
    files = sorted(folder.glob("consolidated.*.pth"))
    if not files:
        raise FileNotFoundError(f"{folder} has no consolidated.*.pth; fetch the model's weights.")
    for i, path in enumerate(files):
        if path.name != f"consolidated.{i:02d}.pth":
            raise FileNotFoundError(f"{folder} has no consolidated.{i:02d}.pth; fetch it.")
    return files


def _open(path: Path) -> dict[str, Tensor]:
    """The tensors of one file, mapped into memory. Its pickle may hold nothing but tensors."""
    try:
        part = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds something other than tensors, which could run code when read; fetch it "
            "from a source that you trust."
        ) from error
    except (RuntimeError, OSError, EOFError, ValueError) as error:
        raise ValueError(f"{path} is damaged or not complete; fetch it again.") from error
    if not isinstance(part, dict) or not all(isinstance(t, Tensor) for t in part.values()):
        raise ValueError(f"{path} does not hold tensors by name; fetch it again.")
    return part


def _split_dimension(name: str) -> int | None:
    if name == "output.weight":
        return 0
    match = re.fullmatch(r"layers\.\d+\.(.+)\.weight", name)
    return LAYER_NAMES.get(match[1], ("", None))[1] if match else None


def _translated(name: str) -> str:
    """Hugging Face's name; a name that is not Meta's stays, to be reported as unexpected."""
    match = re.fullmatch(r"layers\.(\d+)\.(.+)\.weight", name)
    if match and match[2] in LAYER_NAMES:
        return f"model.layers.{match[1]}.{LAYER_NAMES[match[2]][0]}.weight"
    whole = {
        EMBEDDING: "model.embed_tokens.weight",
        "norm.weight": "model.norm.weight",
        "output.weight": "lm_head.weight",
    }
    return whole.get(name, name)


def _half_split(weight: Tensor, heads: int) -> Tensor:
    """Reorder the rows of each head from pairs (2i, 2i + 1) to pairs (i, i + K/2)."""
    rows, columns = weight.shape
    pairs = weight.view(heads, rows // heads // 2, 2, columns)
    return pairs.transpose(1, 2).reshape(rows, columns)
