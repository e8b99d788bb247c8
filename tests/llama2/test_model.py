"""The model against transformers, packed and checkpointed; and the published sizes."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from llama2.checkpoint import config_from_hf
from llama2.config import SIZES, ModelConfig, RopeScaling
from llama2.losses import IGNORE
from llama2.model import ScalarModel, Transformer, initialize
from llama2.rope import inverse_frequencies

SMALL: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 88,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "pad_token_id": None,
}
# With heads of 16, wavelengths from 6 to 20,000 tokens: some short, some long, one on the ramp.
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}
VARIANTS: dict[str, dict[str, Any]] = {
    "multi-head": {},
    "grouped-query": {"num_key_value_heads": 2},
    "multi-query": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "llama3": {"rope_parameters": LLAMA3},
    "linear": {"rope_parameters": LINEAR},
    "theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    "bias": {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 2},
    "wide heads": {"head_dim": 24, "num_key_value_heads": 2},
    "epsilon": {"rms_norm_eps": 0.1},
}


def randomize(module: nn.Module) -> None:
    """Weights large enough that attention and positions matter; no bias or scale left as it was."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            centre, spread = (0.0, 0.15) if parameter.dim() > 1 else (1.0, 0.3)
            parameter.normal_(centre, spread, generator=generator)


def pair(**changes: Any) -> tuple[Transformer, LlamaForCausalLM]:
    config = LlamaConfig(**SMALL | changes, attn_implementation="eager")
    theirs = LlamaForCausalLM(config).eval()
    randomize(theirs)
    ours = Transformer(config_from_hf(config.to_dict()))
    ours.load_state_dict(theirs.state_dict())
    return ours.eval(), theirs


def grouped() -> Transformer:
    return pair(num_key_value_heads=2)[0]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(97, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_logits_are_those_of_transformers(name: str) -> None:
    ours, theirs = pair(**VARIANTS[name])
    tokens = draw(3, 70)
    logits = ours(tokens)
    assert (logits - theirs(tokens).logits).abs().max() < 1e-4
    if "rope_parameters" in VARIANTS[name]:
        # The agreement would show nothing if stretched positions made no difference here.
        assert (logits - pair()[0](tokens)).abs().max() > 0.1


def test_rope_scaling_by_hand() -> None:
    def frequencies(scaling: RopeScaling | None) -> list[float]:
        config = ModelConfig(
            hidden_size=8, num_attention_heads=1, num_key_value_heads=1, rope_scaling=scaling
        )
        return inverse_frequencies(config).tolist()

    # K = 8 and theta 10,000: 10,000 ** (-i / 4).
    assert frequencies(None) == pytest.approx([1, 0.1, 0.01, 0.001])
    assert frequencies(RopeScaling("linear", 4.0)) == pytest.approx([0.25, 0.025, 0.0025, 0.00025])
    # Turns within 100 tokens: 15.9, 1.59, 0.159 and 0.0159. The second lies on the ramp from 1 to
    # 4, at (1.5915 - 1) / 3 = 0.19718: 0.1 * (0.19718 + 0.80282 / 2) = 0.059859.
    scaling = RopeScaling("llama3", 2.0, 1.0, 4.0, 100)
    assert frequencies(scaling) == pytest.approx([1, 0.059859, 0.005, 0.0005], rel=1e-4)


@torch.no_grad()
def test_packed_documents_are_as_each_alone() -> None:
    model = grouped()
    documents = [draw(n, seed=n) for n in (9, 1, 14, 3)]
    tokens = torch.cat([*documents, torch.zeros(5, dtype=torch.long)])[None]
    lengths = [len(document) for document in documents]
    segments = torch.repeat_interleave(torch.tensor([1, 2, 3, 4, 0]), torch.tensor([*lengths, 5]))
    packed = model(tokens, segments[None])[0]
    for document, found in zip(documents, packed.split([*lengths, 5]), strict=False):
        torch.testing.assert_close(found, model(document[None])[0], atol=1e-5, rtol=1e-5)
    # One document and no padding is the path without a mask.
    whole = torch.ones_like(tokens)
    torch.testing.assert_close(model(tokens, whole), model(tokens), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_padded_rows_are_as_each_alone() -> None:
    model = grouped()
    # Of like length, so that they are one group as they stand; then not.
    for lengths in ([12, 9, 7], [9, 9, 9], [12, 7, 2]):
        rows = [draw(n, seed=n) for n in lengths]
        tokens = torch.full((3, max(lengths)), 5)
        segments = torch.zeros_like(tokens)
        for row, (n, document) in enumerate(zip(lengths, rows, strict=True)):
            tokens[row, :n], segments[row, :n] = document, 1
        found = model(tokens, segments)
        for row, document in enumerate(rows):
            alone = model(document[None])[0]
            torch.testing.assert_close(found[row, : len(document)], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_what_is_asked_for_has_the_values_and_gradients_that_it_has_among_all(
    share: float, checkpointing: bool
) -> None:
    causal = grouped()
    model = ScalarModel(causal.config)
    randomize(model)
    model.model.activation_checkpointing = checkpointing
    tokens, segments = draw(2, 12), torch.tensor([[1] * 5 + [2] * 7, [1] * 9 + [0] * 3])
    wanted = torch.rand(2, 12, generator=torch.Generator().manual_seed(1)) < share
    widths: list[tuple[int, ...]] = []
    model.model.norm.register_forward_pre_hook(lambda _, inputs: widths.append(inputs[0].shape))
    gradients = []
    for found in (model(tokens, segments, wanted), model(tokens, segments) * wanted):
        model.zero_grad()
        (found.sin() * torch.linspace(0, 1, 24).view(2, 12)).sum().backward()
        gradients.append([found.detach(), *(p.grad.clone() for p in model.parameters())])
    assert widths == [(2, 12, 64) if share == 1 else (int(wanted.sum()), 64), (2, 12, 64)]
    for first, second in zip(*gradients, strict=True):
        torch.testing.assert_close(first, second, atol=2e-5, rtol=1e-5)


def test_activation_checkpointing_leaves_gradients_as_they_are() -> None:
    model = grouped()
    tokens, segments = draw(2, 12), torch.tensor([[1] * 5 + [2] * 7, [1] * 9 + [0] * 3])

    def gradients() -> list[Tensor]:
        model.zero_grad()
        logprobs = model(tokens, segments, targets_BT=tokens.roll(-1, dims=1))
        (-logprobs.mean()).backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    plain = gradients()
    model.model.activation_checkpointing = True
    runs: list[int] = []
    model.model.layers[0].register_forward_pre_hook(lambda *_: runs.append(1))
    again = gradients()
    assert len(runs) == 2, "the layer must run once more in the backward pass"
    for first, second in zip(plain, again, strict=True):
        assert first.abs().max() > 0
        torch.testing.assert_close(first, second, atol=1e-7, rtol=1e-6)


PUBLISHED = {
    "7b": 6_738_415_616,
    "13b": 13_015_864_320,
    "34b": 33_743_970_304,
    "70b": 68_976_648_192,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes_are_those_published(name: str) -> None:
    with torch.device("meta"):
        model = Transformer(SIZES[name])
    assert SIZES[name].num_parameters() == PUBLISHED[name]
    assert sum(p.numel() for p in model.parameters()) == PUBLISHED[name]


@pytest.mark.parametrize("name", VARIANTS)
def test_parameters_are_counted_exactly(name: str) -> None:
    ours, theirs = pair(**VARIANTS[name])
    assert ours.config.num_parameters() == sum(p.numel() for p in theirs.parameters())


def test_log_probabilities_are_those_of_the_logits() -> None:
    model = grouped()
    tokens = draw(2, 10)
    targets = tokens.roll(-1, dims=1)
    targets[:, -1] = targets[0, 3:6] = IGNORE
    logprobs = model(tokens, targets_BT=targets)
    loss = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten(), ignore_index=IGNORE)
    torch.testing.assert_close(-logprobs.mean(), loss)
    assert len(logprobs) == 15


@torch.no_grad()
def test_scalar_model_is_that_of_transformers() -> None:
    config = LlamaConfig(**SMALL | {"num_key_value_heads": 2, "pad_token_id": 0}, num_labels=1)
    theirs = LlamaForSequenceClassification(config).eval()
    randomize(theirs)
    ours = ScalarModel(config_from_hf(config.to_dict()))
    ours.load_state_dict(theirs.state_dict())
    lengths = torch.tensor([12, 5, 1])
    segments = (torch.arange(12) < lengths[:, None]).long()
    tokens = draw(3, 12).clamp(min=1) * segments
    expected = theirs(tokens, attention_mask=segments).logits[:, 0]
    found = ours(tokens, segments).gather(1, lengths[:, None] - 1)[:, 0]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_initialization_is_a_function_of_the_seed() -> None:
    config = ModelConfig(
        vocab_size=500,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_bias=True,
    )
    first, second, other = (Transformer(config) for _ in range(3))
    for model, seed in ((first, 1), (second, 1), (other, 2)):
        initialize(model, config, seed)
    weights = dict(first.named_parameters())
    for name, parameter in second.named_parameters():
        assert torch.equal(parameter, weights[name])
    assert not torch.equal(other.lm_head.weight, first.lm_head.weight)
    layer = "model.layers.3.self_attn."
    assert weights[layer + "q_proj.weight"].std().item() == pytest.approx(0.02, rel=0.05)
    assert weights[layer + "o_proj.weight"].std().item() == pytest.approx(0.02 / 4, rel=0.05)
    assert not weights[layer + "q_proj.bias"].any()
    assert bool((weights["model.norm.weight"] == 1).all())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_attention_heads": 0}, "num_attention_heads is 0; it must be at least 1"),
        ({"hidden_size": 66}, "hidden_size 66 is not a multiple of num_attention_heads 4"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of num_key_value_h"),
        ({"head_dim": 9}, "head_dim 9 is not even"),
    ],
)
def test_shapes_that_cannot_be_are_refused(changes: dict[str, int], message: str) -> None:
    shape = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4}
    with pytest.raises(ValueError, match=message):
        ModelConfig(**shape | changes)


def test_unknown_rope_scaling_is_refused() -> None:
    with pytest.raises(ValueError, match="'yarn' is not supported; use 'linear' or 'llama3'"):
        RopeScaling("yarn", 2.0)
