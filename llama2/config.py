"""The shape of a Llama model, and the published sizes (Llama 2 paper, section 2 and A.2.1)."""

from dataclasses import dataclass


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched for contexts longer than the one first trained on.

    `kind` is "linear" (all wavelengths times `factor`) or "llama3" (long wavelengths times
    `factor`, short ones untouched, a ramp between, as Llama 3.1 publishes it).
    """

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192

    def __post_init__(self) -> None:
        if self.kind not in ("linear", "llama3"):
            raise ValueError(
                f"RoPE scaling {self.kind!r} is not supported; use 'linear' or 'llama3'."
            )


SIZE_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
)


@dataclass(frozen=True)
class ModelConfig:
    """Hyperparameters of a decoder-only Llama, named as in Hugging Face's `config.json`.

    Raises `ValueError` where a size is not positive, heads do not divide the width or each other,
    or a head has no pairs to rotate.
    """

    vocab_size: int = 32_000
    """Token ids that the model has embeddings for."""
    hidden_size: int = 4096
    """D, the width of the residual stream."""
    intermediate_size: int = 11_008
    """Width inside the SwiGLU feed-forward."""
    num_hidden_layers: int = 32
    """How many layers."""
    num_attention_heads: int = 32
    """Query heads of a layer."""
    num_key_value_heads: int = 32
    """Key and value heads of a layer, each shared by a group of query heads."""
    head_dim: int | None = None
    """K, the width of a head; None divides the hidden size by the query heads."""
    max_position_embeddings: int = 4096
    """The context: most tokens in a sequence."""
    rms_norm_eps: float = 1e-5
    """Added to the mean square in every norm."""
    rope_theta: float = 10_000.0
    """Base of the rotary wavelengths."""
    rope_scaling: RopeScaling | None = None
    """Stretching of the rotary wavelengths for a longer context; None for none."""
    tie_word_embeddings: bool = False
    """Whether the output layer shares the weights of the embeddings."""
    attention_bias: bool = False
    """Whether the attention's projections have biases."""
    mlp_bias: bool = False
    """Whether the feed-forward's projections have biases."""
    initializer_range: float = 0.02
    """Standard deviation of fresh weights."""
    bos_token_id: int | None = 1
    """Token that begins a sequence, as config.json states it."""
    eos_token_id: int | tuple[int, ...] | None = 2
    """Token, or tokens, that end a sequence, as config.json states it."""
    pad_token_id: int | None = None
    """Token that fills a batch, as config.json states it; Llama has none."""

    def __post_init__(self) -> None:
        for name in SIZE_FIELDS:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                raise ValueError(
                    f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads "
                    f"{self.num_attention_heads}; give head_dim or change one of them."
                )
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}; change one of them."
            )
        if self.head_width < 2 or self.head_width % 2:
            raise ValueError(
                f"head_dim {self.head_width} is not even, and positions turn pairs; change it."
            )

    @property
    def head_width(self) -> int:
        """K, the width of one attention head."""
        assert self.head_dim is not None
        return self.head_dim

    def num_parameters(self) -> int:
        """Exact number of parameters of the causal language model."""
        attention = self.head_width * (2 * self.num_attention_heads + 2 * self.num_key_value_heads)
        per_layer = self.hidden_size * (attention + 3 * self.intermediate_size + 2)
        if self.attention_bias:
            per_layer += self.head_width * (self.num_attention_heads + 2 * self.num_key_value_heads)
            per_layer += self.hidden_size
        if self.mlp_bias:
            per_layer += 2 * self.intermediate_size + self.hidden_size
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        return embeddings + self.num_hidden_layers * per_layer + self.hidden_size


def feed_forward_width(hidden_size: int, multiple_of: int = 256, multiplier: float = 1.0) -> int:
    """SwiGLU width of the reference code: 2/3 of 4 D by `multiplier`, up to a `multiple_of`."""
    width = int(multiplier * int(2 * 4 * hidden_size / 3))
    return multiple_of * -(-width // multiple_of)


SIZES: dict[str, ModelConfig] = {
    # The embedded default: about a million parameters, a vocabulary that `jobs/prepare.py` trains.
    "tiny": ModelConfig(
        vocab_size=1024,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
    ),
    "7b": ModelConfig(),
    "13b": ModelConfig(
        hidden_size=5120,
        intermediate_size=feed_forward_width(5120),
        num_hidden_layers=40,
        num_attention_heads=40,
        num_key_value_heads=40,
    ),
    "34b": ModelConfig(
        hidden_size=8192,
        intermediate_size=feed_forward_width(8192),
        num_hidden_layers=48,
        num_attention_heads=64,
        num_key_value_heads=8,
    ),
    "70b": ModelConfig(
        hidden_size=8192,
        intermediate_size=feed_forward_width(8192, multiple_of=4096, multiplier=1.3),
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
    ),
}
