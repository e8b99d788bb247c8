"""Models on disk: Hugging Face's folders, written and read, and Meta's original layout, read.

A folder holds a causal language model (`Transformer`; in Hugging Face's terms `LlamaForCausalLM`)
or a scalar one (`ScalarModel`; `LlamaForSequenceClassification` with one label). Here are the
checks and the way into a model; each layout has its own file.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from llama2.checkpoint_config import (
    CAUSAL,
    SCALAR,
    config_from_hf,
    config_to_hf,
    load_config,
    save_config,
)
from llama2.config import ModelConfig
from llama2.hugging_face_checkpoint import HuggingFaceFolder, write_folder
from llama2.meta_checkpoint import MetaFolder
from llama2.model import ScalarModel, Transformer

__all__ = [
    "check_folder",
    "config_from_hf",
    "config_to_hf",
    "load",
    "load_config",
    "load_meta",
    "load_scalar",
    "read_tensors",
    "save",
    "save_config",
    "scalar_from",
    "stream",
    "stream_scalar",
    "stream_scalar_from",
    "unfilled",
]

Model = TypeVar("Model", bound=nn.Module)
Weights = Iterator[tuple[str, Tensor]]
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


class Folder(Protocol):
    """A model on disk, whatever the layout; tensors go by Hugging Face's names."""

    folder: Path
    config: ModelConfig
    scalar: bool

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor, without reading weights."""
        ...

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor, one at a time."""
        ...


def load(
    folder: str | Path, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> Transformer:
    """The causal language model in a folder of Hugging Face's or Meta's layout.

    Raises as `check_folder` does, before any weight is read, and `ValueError` where embeddings that
    the config ties differ. Memory holds the model once.
    """
    return _filled(*stream(folder), dtype, device)


def load_meta(
    folder: str | Path, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> Transformer:
    """`load` of Meta's layout only, `params.json` and `consolidated.*.pth`."""
    source = _checked(MetaFolder(Path(folder)), scalar=False)
    return _filled(unfilled(Transformer, source.config), _weights(source), dtype, device)


def load_scalar(
    folder: str | Path, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> ScalarModel:
    """The reward or value model in a Hugging Face folder. Raises as `check_folder` does."""
    return _filled(*stream_scalar(folder), dtype, device)


def scalar_from(folder: str | Path, seed: int) -> ScalarModel:
    """A float32 reward or value model that starts from the weights in any folder.

    A scalar model keeps its head (the critic starts as the reward model). On the trunk of a causal
    one the head is drawn from N(0, 1 / (D + 1)) by `seed`, so that scores begin near unit variance
    (Stiennon et al. 2020, appendix B). Raises as `check_folder` does.
    """
    return _filled(*stream_scalar_from(folder, seed), torch.float32, "cpu")


def stream(folder: str | Path) -> tuple[Transformer, Weights]:
    """What `load` loads: the model on the meta device, and its weights one at a time.

    Names are those of `named_parameters`, each once; tensors have the files' dtype and may share
    their memory. Raises as `check_folder` does, at once; the weights, as `load` does, at their end.
    """
    source = _checked(_open(folder), scalar=False)
    return unfilled(Transformer, source.config), _weights(source)


def stream_scalar(folder: str | Path) -> tuple[ScalarModel, Weights]:
    """What `load_scalar` loads, as `stream` gives it."""
    source = _checked(_open(folder), scalar=True)
    return unfilled(ScalarModel, source.config), _weights(source)


def stream_scalar_from(folder: str | Path, seed: int) -> tuple[ScalarModel, Weights]:
    """What `scalar_from` makes, as `stream` gives it."""
    source = _checked(_open(folder), scalar=None)
    weights = _weights(source)
    if not source.scalar:
        weights = _with_new_head(weights, source.config.hidden_size, seed)
    return unfilled(ScalarModel, source.config), weights


def unfilled(kind: Callable[[ModelConfig], Model], config: ModelConfig) -> Model:
    """A model on the meta device: shapes without weights."""
    with torch.device("meta"), _WithoutInitialization():
        return kind(config)


def check_folder(folder: str | Path, scalar: bool | None = None) -> ModelConfig:
    """The config of a model folder, once all is checked that can be without reading weights.

    Names, shapes and file sizes are compared with what the config implies. `scalar` says which kind
    of model is wanted; None takes both. Raises `FileNotFoundError` where the folder, its config or
    weights are missing, and `ValueError`, naming the first thing wrong, where the config is
    malformed or of another architecture or kind, a file is truncated or corrupt, or a tensor is
    missing, unknown or of another shape.
    """
    return _checked(_open(folder), scalar).config


def read_tensors(folder: str | Path) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor of every weight in a folder, file by file, in the files' own dtype.

    Names and order of rows are Hugging Face's in either layout. Tensors may share the files'
    memory: copy what is to be kept or changed. Raises as `check_folder` does, at once.
    """
    return _checked(_open(folder), scalar=None).tensors()


def save(
    model: Transformer | ScalarModel,
    folder: str | Path,
    tokenizer_files: Mapping[str, bytes] | None = None,
    shard_bytes: int = 5_000_000_000,
) -> None:
    """Write a Hugging Face folder in the weights' own dtype, in files of at most `shard_bytes`.

    `tokenizer_files` (as `Tokenizer.files()` gives them) come beside the weights; other files in
    the folder stay. A model that it held is replaced. A crash leaves the old model, the new one, or
    no `config.json`.
    """
    weights = model.state_dict()
    if model.config.tie_word_embeddings:
        weights.pop(HEAD, None)
    architecture = SCALAR if isinstance(model, ScalarModel) else CAUSAL
    write_folder(
        Path(folder), weights, model.config, architecture, tokenizer_files or {}, shard_bytes
    )


def _open(folder: str | Path) -> Folder:
    folder = Path(folder)
    meta = (folder / "params.json").is_file() or any(folder.glob("consolidated.*.pth"))
    if meta and not (folder / "config.json").is_file():
        return MetaFolder(folder)
    return HuggingFaceFolder(folder)


def _checked(source: Folder, scalar: bool | None) -> Folder:
    kinds = {True: "scalar (reward or value) model", False: "causal language model"}
    if scalar is not None and scalar != source.scalar:
        raise ValueError(
            f"{source.folder} holds a {kinds[source.scalar]}; give the folder of a {kinds[scalar]}."
        )
    kind: Callable[[ModelConfig], nn.Module] = ScalarModel if source.scalar else Transformer
    model = unfilled(kind, source.config)
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = source.shapes()
    optional = {HEAD} if source.config.tie_word_embeddings else set()
    for name, shape in wanted.items():
        if name not in found and name not in optional:
            raise ValueError(
                f"{source.folder} lacks the tensor {name} {list(shape)} that its config asks for; "
                "fetch the weights again or correct the config."
            )
        if found.get(name, shape) != shape:
            raise ValueError(
                f"{source.folder}: {name} has shape {list(found[name])} where the config asks for "
                f"{list(shape)}; correct the config or use the weights that belong to it."
            )
    for name in found:
        if name not in wanted:
            raise ValueError(
                f"{source.folder} holds a tensor {name} that its config has no place for; correct "
                "the config or use the weights that belong to it."
            )
    return source


def _weights(source: Folder) -> Weights:
    """Every weight that has a place of its own in the model, which a tied head has not."""
    if source.scalar or not source.config.tie_word_embeddings:
        yield from source.tensors()
        return
    tied: dict[str, Tensor] = {}
    for name, tensor in source.tensors():
        if name in (EMBEDDING, HEAD):
            tied[name] = tensor
        if name != HEAD:
            yield name, tensor
    if not torch.equal(tied.get(HEAD, tied[EMBEDDING]), tied[EMBEDDING]):
        raise ValueError(
            f"{source.folder}: {HEAD} differs from {EMBEDDING}, which the config ties; set "
            "tie_word_embeddings to false there."
        )


def _with_new_head(weights: Weights, width: int, seed: int) -> Weights:
    for name, tensor in weights:
        if name != HEAD:
            yield name, tensor
    generator = torch.Generator().manual_seed(seed)
    yield "score.weight", torch.randn(1, width, generator=generator) * (width + 1) ** -0.5


class _WithoutInitialization(TorchFunctionMode):
    """Leaves new weights undrawn: on the meta device, drawing alone imports torch's compiler."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(function, "__module__", None) == "torch.nn.init":
            return None
        return function(*args, **(kwargs or {}))


def _filled(
    model: Model, weights: Weights, dtype: torch.dtype, device: str | torch.device
) -> Model:
    # Copied: the mapped files may be replaced or lie on a slow disk.
    state = {name: tensor.to(device=device, dtype=dtype, copy=True) for name, tensor in weights}
    tied = isinstance(model, Transformer) and model.config.tie_word_embeddings
    if tied:
        state[HEAD] = state[EMBEDDING]
    model.load_state_dict(state, assign=True)
    if isinstance(model, Transformer) and tied:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model
