"""The Llama 2 transformer: pre-norm RMSNorm, rotary positions, SwiGLU, grouped-query attention.

Parameter names are those of Hugging Face's Llama, so that a checkpoint needs no renaming.
Shapes: B batch, T tokens, D model width, V vocabulary, N tokens that are asked for.
"""

from collections.abc import Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llama2.attention import Attention, Layout, at, positions_in_segments
from llama2.config import ModelConfig
from llama2.cpu import operators
from llama2.documents import Documents
from llama2.log_probs import selected_log_probs
from llama2.losses import IGNORE
from llama2.rope import inverse_frequencies, rotation
from llama2.sequence_parallel import SequenceParallel
from llama2.swiglu import SwiGLULinear, swiglu


class _Normalize(torch.autograd.Function):
    """x / rms(x) times the scale. Keeps x, which leaves one hidden state less to allocate."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale_D: Tensor, eps: float) -> Tensor:
        if operators.fits(x, scale_D):
            normal, inverse = operators.normalize(x, scale_D, eps)
            ctx.save_for_backward(x, inverse, scale_D)
            return normal
        wide = _wide_copy(x)
        norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        inverse = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, inverse, scale_D)
        return wide.mul_(inverse).to(x.dtype).mul_(scale_D)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, inverse, scale_D = ctx.saved_tensors
        if operators.fits(x, scale_D):
            return *operators.normalize_back(x, inverse, scale_D, gradients[0]), None
        gradient, scale = gradients[0].float(), scale_D.float()
        normal = x.to(torch.float32, copy=True).mul_(inverse)
        product = gradient * normal
        grad_scale = None
        if ctx.needs_input_grad[1]:
            grad_scale = product.flatten(0, -2).sum(0).to(scale_D.dtype)
        along = (product @ scale)[..., None] / x.shape[-1]
        grad_x = torch.mul(gradient, scale, out=product).addcmul_(normal, along, value=-1)
        return grad_x.mul_(inverse).to(x.dtype), grad_scale, None


def _wide_copy(x: Tensor) -> Tensor:
    """In float32, with a few bytes to spare: into the hole that it leaves two tensors like x then
    fit. glibc wants more room for an aligned tensor than the tensor takes."""
    spare = 64
    return x.new_empty(x.numel() + spare, dtype=torch.float32)[:-spare].view(x.shape).copy_(x)


class RMSNorm(nn.Module):
    """Root-mean-square normalisation, computed in float32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, _Normalize.apply(x, self.weight, self.eps))


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        wide = config.intermediate_size
        self.gate_proj = nn.Linear(config.hidden_size, wide, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, wide, bias=config.mlp_bias)
        self.down_proj = SwiGLULinear(wide, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        if isinstance(self.down_proj, SwiGLULinear):
            return cast(Tensor, self.down_proj(gate, up))
        # An adapter in its place has products of its own with the inputs.
        return cast(Tensor, self.down_proj(swiglu(gate, up)))


class Layer(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = FeedForward(config)

    def forward(self, x: Tensor, layout: Layout, places_N: Tensor | None = None) -> Tensor:
        x = at(places_N, x) + self.self_attn(self.input_layernorm(x), layout, places_N)
        return x + self.mlp(self.post_attention_layernorm(x))


class Trunk(nn.Module):
    """Embeddings and layers: what every head stands on."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.activation_checkpointing = False
        self.sequence_parallel = SequenceParallel()

    def forward(
        self,
        tokens_BT: Tensor,
        segments_BT: Tensor | None = None,
        places_N: Tensor | None = None,
    ) -> Tensor:
        """Hidden states [B, T, D]; with `places_N`, [N, D] of these tokens of the flattened batch:
        in the last layer the others take part in attention, but have neither its output projection
        nor a feed-forward part."""
        hidden = self.embed_tokens(tokens_BT)
        layout = self._layout(tokens_BT, segments_BT, hidden.dtype)
        for number, layer in enumerate(self.layers, start=1):
            asked = places_N if number == len(self.layers) else None
            if self.activation_checkpointing and torch.is_grad_enabled():
                hidden = checkpoint(layer, hidden, layout, asked, use_reentrant=False)
            else:
                hidden = layer(hidden, layout, asked)
        return cast(Tensor, self.norm(hidden))

    def _layout(self, tokens_BT: Tensor, segments_BT: Tensor | None, dtype: torch.dtype) -> Layout:
        documents = None
        if segments_BT is not None:
            positions = self.sequence_parallel.mine(positions_in_segments(segments_BT))
            documents = Documents(segments_BT)
        else:
            positions = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)[None]
        # No buffer: an engine that casts the module to bf16 must not round the frequencies.
        frequencies = inverse_frequencies(self.config).to(tokens_BT.device)
        cos, sin = rotation(positions, frequencies, self.config.num_attention_heads, dtype)
        return Layout(cos, sin, documents, self.sequence_parallel)


class Unembedding(nn.Linear):
    """The language-model head; given targets, without the logits of all tokens."""

    def forward(self, hidden: Tensor, targets_N: Tensor | None = None) -> Tensor:
        """Logits [..., V]; with `targets_N`, log-probabilities [N] of `hidden` [N, D] instead."""
        if targets_N is None:
            return F.linear(hidden, self.weight)
        return selected_log_probs(hidden, self.weight, targets_N)


class Transformer(nn.Module):
    """Causal language model."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Trunk(config)
        self.lm_head = Unembedding(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(
        self,
        tokens_BT: Tensor,
        segments_BT: Tensor | None = None,
        targets_BT: Tensor | None = None,
    ) -> Tensor:
        """Logits [B, T, V]; with `targets_BT`, log-probabilities [N] of the targets that are not
        `IGNORE` instead.

        tokens_BT: token ids. segments_BT: document of each token, 0 for padding; None means one
        document a row.
        """
        if targets_BT is None:
            return cast(Tensor, self.lm_head(self.model(tokens_BT, segments_BT)))
        places_N = places_of(targets_BT != IGNORE)
        hidden = self.model(tokens_BT, segments_BT, places_N)
        return cast(Tensor, self.lm_head(hidden.flatten(0, -2), at(places_N, targets_BT).flatten()))


class ScalarModel(nn.Module):
    """A trunk with one number per token: a reward model reads the last, a value model those of the
    answer."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Trunk(config)
        self.score = nn.Linear(config.hidden_size, 1, bias=False)

    def forward(
        self,
        tokens_BT: Tensor,
        segments_BT: Tensor | None = None,
        wanted_BT: Tensor | None = None,
    ) -> Tensor:
        """Scalars [B, T], float32; with `wanted_BT`, 0 where that is false."""
        places_N = None if wanted_BT is None else places_of(wanted_BT)
        hidden = self.model(tokens_BT, segments_BT, places_N)
        scores = cast(Tensor, self.score(hidden)).squeeze(-1).float()
        if places_N is None:
            return scores
        nothing_N = scores.new_zeros(tokens_BT.numel())
        return nothing_N.index_copy(0, places_N, scores).view(tokens_BT.shape)


def places_of(wanted_BT: Tensor) -> Tensor | None:
    """Where a mask is true, as indices [N] into the flattened batch; None where it is true
    everywhere, so that nothing need be picked."""
    return None if wanted_BT.all() else wanted_BT.flatten().nonzero()[:, 0]


def initial_weights(
    model: nn.Module, config: ModelConfig, seed: int
) -> Iterator[tuple[str, Tensor]]:
    """Name and float32 value of each parameter of a fresh model, one at a time.

    Of `model`, which may be on the meta device, only names and shapes are asked for, at once.
    Matrices are drawn from N(0, initializer_range), those of residual outputs sqrt(2 layers)
    smaller (GPT-2). Biases are 0, the scales of norms 1.
    """
    generator = torch.Generator().manual_seed(seed)
    shapes = [(name, parameter.shape) for name, parameter in model.named_parameters()]
    return ((name, _initial(name, shape, config, generator)) for name, shape in shapes)


def _initial(
    name: str, shape: torch.Size, config: ModelConfig, generator: torch.Generator
) -> Tensor:
    if len(shape) < 2:
        return torch.zeros(shape) if name.endswith(".bias") else torch.ones(shape)
    residual = name.endswith(("o_proj.weight", "down_proj.weight"))
    std = config.initializer_range / (2 * config.num_hidden_layers) ** (0.5 if residual else 0)
    return torch.empty(shape).normal_(0, std, generator=generator)


def initialize(model: nn.Module, config: ModelConfig, seed: int) -> None:
    """Give `model` its `initial_weights`."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in initial_weights(model, config, seed):
            parameters[name].copy_(value)
