"""Compiled operators of a training step against the same in float64, and torch's in bfloat16."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llama2.causal_attention import causal_attention
from llama2.config import ModelConfig
from llama2.cpu import operators
from llama2.cpu.kernels import kernels
from llama2.log_probs import selected_log_probs
from llama2.losses import IGNORE
from llama2.model import RMSNorm, Transformer, initialize
from llama2.rope import rotate, rotation
from llama2.swiglu import swiglu

pytestmark = pytest.mark.skipif(
    kernels() is None, reason="this processor or machine has no compiled operators"
)

Function = Callable[..., Tensor]


def random(*shape: int) -> Tensor:
    return torch.randn(*shape).bfloat16().requires_grad_()


def results(function: Function, inputs: list[Tensor], upstream: Tensor) -> list[Tensor]:
    """What it gives, and the gradients by its inputs."""
    found = function(*inputs)
    return [found, *torch.autograd.grad(found, inputs, upstream.to(found.dtype))]


def check(function: Function, plain: Function, inputs: list[Tensor], error: float = 0.006) -> None:
    """`function` is as near to `plain` in float64 as to be expected, and nearly as near, or nearer,
    as torch's operators; it does not depend on the number of threads."""
    upstream = torch.randn(plain(*inputs).shape).bfloat16()
    assert operators.fits(*inputs)
    wide = [x.detach().double().requires_grad_() for x in inputs]
    exact = results(plain, wide, upstream)
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            found.append(results(function, inputs, upstream))
    finally:
        torch.set_num_threads(threads)
    for one, three in zip(*found, strict=True):
        assert torch.equal(one, three)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(operators, "fits", lambda *tensors: False)
        others = results(function, inputs, upstream)
    for mine, theirs, right in zip(found[0], others, exact, strict=True):
        off, away = ((x.double() - right).norm() for x in (mine, theirs))
        assert off <= max(error * right.norm(), 1.3 * away) + 1e-6


@pytest.mark.parametrize("shape", [(1, 2), (3, 34), (200, 48), (2, 65, 31)])
def test_normalisation(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    eps = 1e-5

    def normalized(x: Tensor, scale: Tensor) -> Tensor:
        norm = RMSNorm(shape[-1], eps)
        del norm.weight
        norm.weight = scale  # type: ignore[assignment]
        return norm(x)

    def plain(x: Tensor, scale: Tensor) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * scale

    check(normalized, plain, [random(*shape), random(shape[-1])])


@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (3, 40, 129)])
def test_swiglu(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    check(swiglu, lambda gate, up: F.silu(gate) * up, [random(*shape), random(*shape)])


def test_swiglu_of_numbers_whose_exponential_overflows() -> None:
    gate = torch.tensor([-300.0, -95.0, 0.0, 95.0, 300.0]).bfloat16()
    assert swiglu(gate, torch.ones_like(gate)).tolist() == F.silu(gate).tolist()


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(("heads", "width"), [(1, 2), (3, 48), (2, 18)])
def test_turning(heads: int, width: int, rows: int) -> None:
    """Fewer heads than the table has; one table for all rows, and a table each."""
    torch.manual_seed(0)
    positions = torch.randint(0, 90, (rows, 7))
    frequencies = 10_000.0 ** (-torch.arange(width // 2) / (width / 2))
    cos, sin = rotation(positions, frequencies, heads + 1, torch.bfloat16)

    def turned(x: Tensor) -> Tensor:
        return rotate(x, cos.to(x.dtype), sin.to(x.dtype))

    check(turned, turned, [random(3, 7, heads, width)])


@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 2), (2, 37, 3, 34), (3, 14, 2, 48), (1, 57, 2, 16), (2, 200, 1, 64)]
)
def test_attention(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)

    def plain(*inputs: Tensor) -> Tensor:
        rows = (x.transpose(1, 2) for x in inputs)
        return F.scaled_dot_product_attention(*rows, is_causal=True).transpose(1, 2)

    check(causal_attention, plain, [random(*shape) for _ in range(3)])


def test_attention_sees_nothing_of_later_tokens() -> None:
    torch.manual_seed(0)
    inputs = [random(2, 60, 2, 8).detach() for _ in range(3)]
    before = causal_attention(*inputs)
    for x in inputs:
        x[:, 41:] = 1000 * torch.randn(2, 19, 2, 8)
    assert torch.equal(causal_attention(*inputs)[:, :41], before[:, :41])


@pytest.mark.parametrize(("tokens", "vocabulary"), [(1, 1), (9, 31), (20, 1000)])
def test_log_probabilities(tokens: int, vocabulary: int) -> None:
    torch.manual_seed(0)
    targets = torch.randint(vocabulary, (tokens,))

    def plain(hidden: Tensor, weight: Tensor) -> Tensor:
        return -F.cross_entropy(hidden @ weight.T, targets, reduction="none")

    hidden, weight = random(tokens, 12), random(vocabulary, 12)
    check(lambda h, w: selected_log_probs(h, w, targets), plain, [hidden, weight], 0.02)


def test_a_most_improbable_token_keeps_its_log_probability() -> None:
    hidden = torch.tensor([[1.0, 0.0]]).bfloat16()
    weight = torch.tensor([[200.0, 0.0], [0.0, 1.0]]).bfloat16()
    assert selected_log_probs(hidden, weight, torch.tensor([1])).item() == -200.0


def test_targets_outside_of_the_vocabulary_are_refused() -> None:
    hidden, weight = random(2, 4), random(7, 4)
    for target in (-1, 7):
        with pytest.raises(IndexError, match="outside the vocabulary of 7"):
            selected_log_probs(hidden, weight, torch.tensor([0, target]))


def operations() -> list[tuple[Function, list[Tensor]]]:
    """Each operator as a function of all that it has gradients by."""
    torch.manual_seed(0)
    norm = RMSNorm(16, 1e-5).bfloat16()
    targets = torch.randint(7, (20,))
    cos, sin = rotation(torch.arange(5)[None], torch.rand(4), 2, torch.bfloat16)
    return [
        (norm, [random(3, 20, 16)]),
        (swiglu, [random(3, 20, 16) for _ in range(2)]),
        (lambda x: rotate(x, cos, sin), [random(4, 5, 2, 8)]),
        (causal_attention, [random(2, 20, 2, 8) for _ in range(3)]),
        (lambda h, w: selected_log_probs(h, w, targets), [random(20, 16), random(7, 16)]),
    ]


@pytest.mark.parametrize("number", range(5))
def test_what_is_no_number_stays_none(number: int) -> None:
    """A gradient that is not finite must be seen, not lost."""
    function, inputs = operations()[number]
    nothing = [torch.full_like(x, float("nan")) for x in inputs]
    assert function(*nothing).isnan().all()
    found = function(*inputs)
    upstream = torch.ones_like(found)
    upstream.view(-1)[-1] = float("nan")
    for gradient in torch.autograd.grad(found, inputs, upstream):
        assert gradient.isnan().any()


@pytest.mark.parametrize("number", range(5))
def test_inputs_and_gradients_may_lie_anyhow(number: int) -> None:
    """Inputs whose last dimension is not the inner one; gradients as those of a sum."""
    function, near = operations()[number]
    far = [x.detach().mT.contiguous().mT.requires_grad_() for x in near]
    assert not far[0].is_contiguous()
    found, expected = function(*far), function(*near)
    assert torch.equal(found, expected)
    spread = torch.ones((), dtype=found.dtype).expand(found.shape)
    mine = torch.autograd.grad(found, far, spread)
    theirs = torch.autograd.grad(expected, near, spread.contiguous())
    for one, other in zip(mine, theirs, strict=True):
        assert torch.equal(one, other)


def test_a_whole_model_learns_as_by_torchs_operators() -> None:
    """Packed and padded rows, grouped queries, sizes that fill no vector."""
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=61, hidden_size=36, intermediate_size=50, num_hidden_layers=2,
        num_attention_heads=6, num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    model = Transformer(config)
    initialize(model, config, seed=0)
    model = model.bfloat16()
    tokens = torch.randint(61, (3, 40))
    segments = torch.tensor([[1] * 40, [1] * 13 + [2] * 20 + [0] * 7, [1] * 29 + [0] * 11])
    targets = torch.where(segments > 0, tokens.roll(-1, 1), IGNORE)

    def gradients() -> list[Tensor]:
        loss = -model(tokens, segments, targets).mean()
        return list(torch.autograd.grad(loss, list(model.parameters())))

    found = gradients()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(operators, "fits", lambda *tensors: False)
        expected = gradients()
    for mine, theirs in zip(found, expected, strict=True):
        assert (mine.float() - theirs.float()).norm() < 0.03 * theirs.float().norm()
