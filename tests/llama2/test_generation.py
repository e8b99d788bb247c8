"""The generation engine against full forward passes, transformers, and the distribution itself."""

import copy
from dataclasses import replace

import pytest
import torch
import transformers
from torch import Tensor

from cluster.placement import fast_bfloat16
from llama2.config import ModelConfig
from llama2.cpu.step import kernels_for
from llama2.generation import Engine, Sampling, Token, runner
from llama2.generation.product import Product
from llama2.generation.sampling import draw, settings
from llama2.model import Transformer, initialize

CONFIG = ModelConfig(
    vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
    initializer_range=0.3,
)  # fmt: skip
PROMPTS = [[1, 5, 9], [1], [1, 40, 41, 42, 43, 44, 45], [1, 7, 7], [1, 60, 3, 2]]


@pytest.fixture(scope="module")
def model() -> Transformer:
    model = Transformer(CONFIG)
    initialize(model, CONFIG, seed=3)
    return model.eval()


def test_greedy_equals_transformers(model: Transformer) -> None:
    reference = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
            rms_norm_eps=1e-5,
        )
    ).eval()  # fmt: skip
    reference.load_state_dict(model.state_dict())
    greedy = Sampling(temperature=0, max_new_tokens=20, stop_ids=(2,))
    together = Engine(model).generate(PROMPTS, greedy)
    for prompt, completion in zip(PROMPTS, together, strict=True):
        (alone,) = Engine(model).generate([prompt], greedy)
        expected = reference.generate(
            torch.tensor([prompt]), max_new_tokens=20, do_sample=False, eos_token_id=2,
            pad_token_id=0,
        )[0, len(prompt) :].tolist()  # fmt: skip
        assert completion.tokens == alone.tokens == expected
        assert completion.finish_reason == ("stop" if expected[-1] == 2 else "length")


def test_logprobs_equal_the_trainers(model: Transformer) -> None:
    completions = Engine(model).generate(PROMPTS, Sampling(max_new_tokens=25, seed=4))
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        tokens = torch.tensor([prompt + completion.tokens])
        targets = tokens[:, 1:].clone()
        targets[:, : len(prompt) - 1] = -100
        logprobs = model(tokens[:, :-1], targets_BT=targets)
        found = torch.tensor(completion.logprobs)
        torch.testing.assert_close(found, logprobs.detach(), atol=1e-4, rtol=0)


def test_alternatives_are_the_likeliest_and_change_nothing(model: Transformer) -> None:
    engine = Engine(model)
    plain = engine.generate(PROMPTS, Sampling(max_new_tokens=9, stop_ids=()), seeds=range(5))
    asked = [0, 3, 0, 100, 1]  # beside each other in one batch; 100 are more than there are
    for i, (prompt, count) in enumerate(zip(PROMPTS, asked, strict=True)):
        sampling = Sampling(max_new_tokens=9, stop_ids=(), alternatives=count)
        engine.submit(str(i), prompt, sampling, seed=i)
    found: dict[str, list[Token]] = {str(i): [] for i in range(5)}
    while engine.busy:
        for token in engine.step():
            found[token.id].append(token)
    for i, (prompt, count) in enumerate(zip(PROMPTS, asked, strict=True)):
        assert [t.token for t in found[str(i)]] == plain[i].tokens
        assert [t.logprob for t in found[str(i)]] == pytest.approx(plain[i].logprobs, abs=1e-5)
        log_probs_TV = model(torch.tensor([prompt + plain[i].tokens]))[0].log_softmax(-1)
        for place, token in enumerate(found[str(i)]):
            best = log_probs_TV[len(prompt) - 1 + place].topk(min(count, CONFIG.vocab_size))
            assert [id for id, _ in token.alternatives] == best.indices.tolist()
            told = torch.tensor([value for _, value in token.alternatives])
            torch.testing.assert_close(told, best.values, atol=1e-4, rtol=0)


@pytest.mark.parametrize("compiled", [True, False])
def test_logprobs_agree_in_bfloat16(monkeypatch: pytest.MonkeyPatch, compiled: bool) -> None:
    if not compiled:
        monkeypatch.setattr(runner, "kernels_for", lambda trunk: None)
    config = replace(CONFIG, initializer_range=0.1)  # logits as spread as a trained model's
    model = Transformer(config)
    initialize(model, config, seed=3)
    model = model.bfloat16().eval()
    completions = Engine(model).generate(PROMPTS, Sampling(max_new_tokens=25, stop_ids=()))
    differences = []
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        tokens = torch.tensor([prompt + completion.tokens])
        targets = tokens[:, 1:].clone()
        targets[:, : len(prompt) - 1] = -100
        logprobs = model(tokens[:, :-1], targets_BT=targets).detach()
        differences.append((torch.tensor(completion.logprobs) - logprobs).abs())
    assert torch.cat(differences).mean() < 0.02


@pytest.mark.skipif(not fast_bfloat16(), reason="bfloat16 matrices are not laid out here")
@pytest.mark.parametrize("rows", [1, 7, 32, 130])
def test_a_laid_out_matrix_gives_the_same_product(rows: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    weight, bias, x = (
        torch.randn(shape, generator=generator).bfloat16()
        for shape in ((96, 160), (96,), (rows, 160))
    )
    product = Product(weight, bias)
    assert torch.equal(product(x), torch.nn.functional.linear(x, weight, bias))


def test_new_bfloat16_weights_count(model: Transformer) -> None:
    changed = copy.deepcopy(model).bfloat16()
    engine, greedy = Engine(changed), Sampling(temperature=0, max_new_tokens=20, stop_ids=())
    before = engine.generate(PROMPTS, greedy)
    with torch.no_grad():
        changed.lm_head.weight.neg_()
        changed.model.layers[1].mlp.down_proj.weight.mul_(0.5)
    engine.weights_changed()
    after = engine.generate(PROMPTS, greedy)
    assert after == Engine(copy.deepcopy(changed)).generate(PROMPTS, greedy) != before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gap", [0, 64])
def test_new_weights_may_lie_in_other_memory(
    model: Transformer, dtype: torch.dtype, gap: int
) -> None:
    """Side by side, so that joined matrices are there already, or apart."""
    changed = copy.deepcopy(model).to(dtype)
    engine, greedy = Engine(changed), Sampling(temperature=0, max_new_tokens=20, stop_ids=())
    before = engine.generate(PROMPTS, greedy)
    sizes = [weight.numel() + gap for weight in changed.parameters()]
    memory = torch.zeros(sum(sizes), dtype=dtype)
    for weight, place in zip(changed.parameters(), memory.split(sizes), strict=True):
        view = place[: weight.numel()].view(weight.shape)
        weight.data = view.copy_(weight.detach() * 1.5)
    engine.weights_changed()
    after = engine.generate(PROMPTS, greedy)
    assert after == Engine(copy.deepcopy(changed)).generate(PROMPTS, greedy) != before
    inside = changed.model.layers[0].self_attn.k_proj.weight.untyped_storage().data_ptr()
    joins = kernels_for(changed.model) is None  # compiled code has copies of its own
    assert (inside == memory.data_ptr()) == (gap == 0 or not joins)


def test_draws_depend_on_the_seed_alone(model: Transformer) -> None:
    sampling = Sampling(max_new_tokens=15)
    seeds = [11, 12, 13, 14, 15]
    together = Engine(model).generate(PROMPTS, sampling, seeds)
    small = Engine(model, max_batch_size=2).generate(PROMPTS[::-1], sampling, seeds[::-1])
    assert [c.tokens for c in together] == [c.tokens for c in small[::-1]]
    other = Engine(model).generate(PROMPTS, sampling, [seed + 100 for seed in seeds])
    assert [c.tokens for c in together] != [c.tokens for c in other]


def test_frequencies_follow_the_model(model: Transformer) -> None:
    """Chi-square of the first token over a whole vocabulary; 0.999 quantile of 60 degrees: 99.6."""
    with torch.no_grad():
        expected = model(torch.tensor([PROMPTS[0]]))[0, -1].softmax(-1)
    count = 20_000
    sampling = Sampling(max_new_tokens=1)
    found = Engine(model, 1000).generate([PROMPTS[0]] * count, sampling)
    counts = torch.bincount(torch.tensor([c.tokens[0] for c in found]), minlength=61)
    statistic = ((counts - count * expected).square() / (count * expected)).sum()
    assert statistic < 99.6


def drawn(logits: Tensor, sampling: Sampling, uniforms: Tensor) -> Tensor:
    return draw(logits, uniforms, settings([sampling] * len(logits), logits.device))[0]


def test_truncation_keeps_the_likeliest() -> None:
    logits = torch.tensor([[0.1, 0.5, 0.3, 0.1]]).log().expand(1000, 4)
    uniforms = torch.linspace(0, 0.999, 1000)
    assert set(drawn(logits, Sampling(top_k=2), uniforms).tolist()) == {1, 2}
    assert set(drawn(logits, Sampling(top_p=0.5), uniforms).tolist()) == {1}
    assert set(drawn(logits, Sampling(top_p=0.6), uniforms).tolist()) == {1, 2}
    # Of the two likeliest, 0.5 / 0.8 = 0.625 falls to the first.
    assert set(drawn(logits, Sampling(top_k=2, top_p=0.62), uniforms).tolist()) == {1}
    assert set(drawn(logits, Sampling(top_k=2, top_p=0.63), uniforms).tolist()) == {1, 2}
    cold = drawn(logits, Sampling(temperature=0.25), uniforms)
    weights = torch.tensor([0.1, 0.5, 0.3, 0.1]) ** 4
    expected = weights / weights.sum()
    shares = torch.bincount(cold, minlength=4) / 1000
    torch.testing.assert_close(shares, expected, atol=2e-3, rtol=0)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(temperature=0.7),
        Sampling(top_p=0.4),  # within the candidates
        Sampling(temperature=3.0, top_p=0.9),  # beyond them
        Sampling(top_k=7),
        Sampling(top_k=500, top_p=0.95),
        Sampling(temperature=1.6, top_k=500, top_p=0.5),  # a share of 500, found among fewer
    ],
)
def test_frequencies_of_draws(sampling: Sampling) -> None:
    """Against probabilities worked out entry by entry, over evenly spread uniform numbers."""
    torch.manual_seed(0)
    vocabulary, count = 1000, 20_000
    logits = (torch.randn(vocabulary) * 2).double()
    weights = (logits / (sampling.temperature or 1)).softmax(0)
    kept, order = torch.zeros(vocabulary).double(), weights.argsort(descending=True).tolist()
    likeliest = order[: sampling.top_k or vocabulary]
    total, sum_before = float(weights[likeliest].sum()), 0.0
    for token in likeliest:
        if sum_before < sampling.top_p * total:
            kept[token] = weights[token]
        sum_before += float(weights[token])
    expected = kept / kept.sum()
    uniforms = ((torch.arange(count) + 0.5) / count)[torch.randperm(count)]
    tokens, logprobs = [], []
    for part in uniforms.split(1000):
        rows = logits.float().expand(len(part), vocabulary)
        # A row of another kind beside them changes nothing.
        mixed = settings([sampling] * (len(part) - 1) + [Sampling(top_p=0.5)], rows.device)
        found, of_found = draw(rows, part, mixed)
        tokens.append(found[:-1])
        logprobs.append(of_found[:-1])
    shares = torch.bincount(torch.cat(tokens), minlength=vocabulary) / (count - 20)
    assert (shares - expected).abs().max() < 2e-3
    assert not shares[expected == 0].any()
    exact = logits.log_softmax(0)[torch.cat(tokens)].float()
    torch.testing.assert_close(torch.cat(logprobs), exact, atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "sampling",
    [Sampling(temperature=1e-40), Sampling(top_p=1e-46), Sampling(temperature=1e-40, top_p=0.5)],
)
def test_the_smallest_temperature_and_share_leave_the_likeliest(
    sampling: Sampling, dtype: torch.dtype
) -> None:
    logits = (
        (torch.arange(1000) // 600 - (torch.arange(1000) > 600) * 0.5).to(dtype).expand(50, 1000)
    )
    assert set(drawn(logits, sampling, torch.linspace(0, 0.999, 50)).tolist()) == {600}


def test_length_limits(model: Transformer) -> None:
    endless = Sampling(max_new_tokens=500, stop_ids=())
    completions = Engine(model).generate(PROMPTS, endless)
    assert [len(p) + len(c.tokens) for p, c in zip(PROMPTS, completions, strict=True)] == [64] * 5


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([[1], []], "Prompt 1 is empty"),
        ([[1, 61]], "outside the vocabulary of 61"),
        ([[1] * 64], "64 tokens, which leaves no room for an answer in the context of 64"),
    ],
)
def test_bad_prompts(model: Transformer, prompts: list[list[int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Engine(model).generate(prompts)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -1.0},
        {"top_p": 0.0},
        {"top_k": -1},
        {"top_k": 1 << 63},
        {"max_new_tokens": 0},
        {"alternatives": -1},
    ],
)
def test_bad_sampling(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        Sampling(**options)  # type: ignore[arg-type]
