"""The compiled step against the model itself, and its draws against float64."""

import copy
import platform
import shutil
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from llama2.config import ModelConfig, RopeScaling
from llama2.cpu import kernels, step
from llama2.cpu.library import NotCompiled, library
from llama2.cpu.step import kernels_for
from llama2.generation import Engine, Sampling
from llama2.generation.cpu_decoder import CpuDecoder, TileCache
from llama2.generation.decoder import Span
from llama2.generation.sampling import draw, settings
from llama2.model import Transformer, initialize

CONFIG = ModelConfig(
    vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
    initializer_range=0.2,
)  # fmt: skip
SHAPES = {
    "grouped": CONFIG,
    "no group": replace(CONFIG, num_key_value_heads=4, hidden_size=192, head_dim=48),
    "wide heads": replace(CONFIG, head_dim=80, tie_word_embeddings=True),
    "biases": replace(CONFIG, attention_bias=True, mlp_bias=True),
    "odd sizes": replace(CONFIG, hidden_size=50, head_dim=6, intermediate_size=57, vocab_size=131),
    "more heads than a tile": replace(CONFIG, num_attention_heads=30, head_dim=16),
    "long context": replace(CONFIG, rope_scaling=RopeScaling("linear", 4.0)),
}
PAGE = TileCache.page_size


def made(config: ModelConfig) -> Transformer:
    model = Transformer(config)
    initialize(model, config, seed=3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.2, generator=torch.Generator().manual_seed(len(name)))
    return model.bfloat16().eval()


needed = pytest.mark.skipif(
    kernels_for(made(CONFIG).model) is None, reason="this processor or machine has no compiled step"
)


def decoder(model: Transformer, pages: int) -> CpuDecoder:
    cache = TileCache(model.config, pages, torch.bfloat16, torch.device("cpu"))
    kernels = kernels_for(model.model)
    assert kernels is not None
    return CpuDecoder(model, cache, kernels)


def logits_of(model: Transformer, rows: list[list[int]], parts: list[int]) -> list[Tensor]:
    """Logits behind every token of each row, which is computed `parts` tokens at a time, the rest
    one by one; pages lie in an order of their own."""
    per_row = -(-max(map(len, rows)) // PAGE)
    decoding = decoder(model, per_row * len(rows))
    pages = [[i * per_row + j for j in reversed(range(per_row))] for i in range(len(rows))]
    found: list[list[Tensor]] = [[] for _ in rows]
    past = 0
    for length in [*parts, *[1] * max(map(len, rows))]:
        spans, tokens, active = [], [], []
        for i, row in enumerate(rows):
            part = row[past : past + length]
            if part:
                spans.append(Span(pages[i], past, len(part), length == 1))
                tokens += part
                active += [i] * len(part)
        if not spans:
            break
        logits = decoding.forward(tokens, spans, range(len(tokens)))
        for i, logits_V in zip(active, logits, strict=True):
            found[i].append(logits_V)
        past += length
    return [torch.stack(own) for own in found]


def random_rows(config: ModelConfig, lengths: list[int]) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randint(0, config.vocab_size, (length,), generator=generator).tolist()
        for length in lengths
    ]


@needed
@pytest.mark.parametrize("name", SHAPES)
@torch.no_grad()
def test_logits_are_as_near_to_float32_as_the_models_own(name: str) -> None:
    """In parts that end within pages, at their ends and within pairs of tokens."""
    model = made(SHAPES[name])
    rows = random_rows(model.config, [150, 1, 64, 129, 7])
    exact = copy.deepcopy(model).float()
    own, ours = [], []
    for row, logits_TV in zip(rows, logits_of(model, rows, [63, 2, 64]), strict=True):
        tokens = torch.tensor([row])
        expected_TV = exact(tokens)[0]
        own.append((model(tokens)[0].float() - expected_TV).abs().mean(dim=-1))
        ours.append((logits_TV.float() - expected_TV).abs().mean(dim=-1))
    own_N, ours_N = torch.cat(own), torch.cat(ours)
    assert ours_N.mean() < 1.15 * own_N.mean()
    assert ours_N.max() < 2.5 * own_N.max()  # so that no token is wrong by itself


@needed
@pytest.mark.parametrize("groups", [1, 2, 4])
@torch.no_grad()
def test_nothing_but_the_row_itself_counts_to_the_bit(groups: int, threads: None) -> None:
    """Neither other rows nor how many threads share the groups, evenly or not."""
    config = replace(CONFIG, num_key_value_heads=groups)
    model = made(config)
    rows = random_rows(config, [130, 70, 65, 64, 3, 1, 20, 33, 2, 2, 9, 100, 41, 17, 18, 99, 12])
    for parts in ([1], [33, 40]):
        torch.set_num_threads(2)
        together = logits_of(model, rows, parts)
        for count in (1, 3, 5):
            torch.set_num_threads(count)
            for a, b in zip(logits_of(model, rows, parts), together, strict=True):
                assert torch.equal(a, b)
        torch.set_num_threads(2)
        for row, expected in zip(rows, together, strict=True):
            assert torch.equal(logits_of(model, [row], parts)[0], expected)


@needed
@pytest.mark.parametrize("groups", [1, 4])
@torch.no_grad()
def test_only_those_that_draw_get_logits(groups: int, threads: None) -> None:
    config = replace(CONFIG, num_key_value_heads=groups)
    model = made(config)
    rows = random_rows(config, [40, 30, 1, 19])
    spans = [Span([i], 0, len(row), False) for i, row in enumerate(rows)]
    tokens = list(chain.from_iterable(rows))
    every = decoder(model, 4).forward(tokens, spans, range(90))
    drawing = [5, 39, 40, 89]
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        assert torch.equal(decoder(model, 4).forward(tokens, spans, drawing), every[drawing])


@needed
def test_tokens_outside_the_vocabulary_are_refused() -> None:
    for token in (61, -1):
        with pytest.raises(IndexError, match="tokens outside the vocabulary of 61"):
            logits_of(made(CONFIG), [[1, token]], [2])


@needed
def test_damaged_weights_leave_nothing_behind() -> None:
    """What is no number stays in pages that others are given later."""
    model = made(CONFIG)
    good = copy.deepcopy(model.state_dict())
    prompts, sampling = random_rows(CONFIG, [3, 64, 90]), Sampling(max_new_tokens=9, stop_ids=())
    expected = Engine(model).generate(prompts, sampling)
    engine = Engine(model, cache_tokens=6 * PAGE)
    with torch.no_grad():
        model.model.layers[0].self_attn.v_proj.weight.fill_(float("nan"))
    engine.weights_changed()
    with pytest.raises(FloatingPointError, match="The model gives no number"):
        engine.generate(prompts, sampling)
    model.load_state_dict(good)
    engine.weights_changed()
    assert engine.generate(prompts, sampling) == expected


@needed
@pytest.mark.parametrize("vocabulary", [61, 128, 1000, 32_000])
def test_draws_invert_the_distribution(vocabulary: int) -> None:
    decoding = decoder(made(CONFIG), 1)
    rng = np.random.default_rng(vocabulary)
    logits = torch.tensor(rng.normal(0, 3, (200, vocabulary)), dtype=torch.bfloat16)
    logits[:100, ::3] = float("-inf")
    uniforms = torch.tensor(rng.random(200), dtype=torch.float32)
    uniforms[:3] = torch.tensor([0.0, 1 - 2**-24, 0.5])
    temperatures = [(1.0, 0.0, 0.3, 2.0)[i % 4] for i in range(200)]
    rows = settings([Sampling(temperature=t) for t in temperatures], logits.device)
    tokens, logprobs = decoding.draw(logits, uniforms, rows)
    whole = settings([Sampling(temperature=2)] * 200, logits.device)  # an integer
    float_ = settings([Sampling(temperature=2.0)] * 200, logits.device)
    drawn = [decoding.draw(logits, uniforms, each)[0] for each in (whole, float_)]
    assert torch.equal(*drawn)
    wide = logits.double()
    torch.testing.assert_close(
        logprobs.double(), wide.log_softmax(-1).gather(1, tokens[:, None])[:, 0], atol=1e-5, rtol=0
    )
    for row, token, uniform, temperature in zip(wide, tokens, uniforms, temperatures, strict=True):
        if temperature == 0:
            assert row[token] == row.max()
            continue
        ends = (row / temperature).softmax(-1).cumsum(-1)
        before = ends[token - 1] if token else 0.0
        assert before - 1e-6 <= uniform <= ends[token] + 1e-6
        assert row[token] > float("-inf")


@needed
def test_truncated_draws_are_drawn_as_elsewhere_and_leave_the_others_alone() -> None:
    decoding = decoder(made(CONFIG), 1)
    generator = torch.Generator().manual_seed(5)
    logits = (torch.randn((40, 1000), generator=generator) * 3).bfloat16()
    uniforms = torch.rand(40, generator=generator)
    kinds = [Sampling(), Sampling(top_p=0.6), Sampling(temperature=0, top_k=3), Sampling(top_k=4)]
    rows = [kinds[i % 4] for i in range(40)]
    tokens, logprobs = decoding.draw(logits, uniforms, settings(rows, logits.device))
    for i, own in enumerate(rows):
        alone = settings([own], logits.device)
        here = slice(i, i + 1)
        token, logprob = decoding.draw(logits[here], uniforms[here], alone)
        assert (token, logprob) == (tokens[i], logprobs[i])
        expected, expected_logprob = draw(logits[here], uniforms[here], alone)
        assert token == expected
        assert logprob.item() == pytest.approx(expected_logprob.item(), abs=1e-5)


def test_without_a_compiler_operators_do_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(kernels, "_suits_processor", lambda: True)
    kernels._kernels.cache_clear()
    try:
        engine = Engine(made(CONFIG))
        completions = engine.generate([[1, 5, 9]], Sampling(max_new_tokens=5, stop_ids=()))
    finally:
        kernels._kernels.cache_clear()
    assert len(completions[0].tokens) == 5
    assert "There is no C++ compiler" in caplog.text


@pytest.mark.skipif(
    shutil.which("g++") is None or platform.machine() != "x86_64",
    reason="there is no C++ compiler, or one for other processors",
)
def test_the_sources_compile() -> None:
    """Else all other tests of compiled code would be skipped."""
    library(Path(step.__file__).parent)


def test_a_library_is_made_once_and_anew_for_other_sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    sources = tmp_path / "sources"
    sources.mkdir()
    source = sources / "three.cpp"
    source.write_text('extern "C" int number() { return 3; }')
    try:
        assert library(sources).number() == 3
    except NotCompiled as reason:
        pytest.skip(str(reason))
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert library(sources).number() == 3  # from the cache
    source.write_text('extern "C" int number() { return 4; }')
    with pytest.raises(NotCompiled, match=r"There is no C\+\+ compiler"):
        library(sources)
    monkeypatch.delenv("CXX")
    assert library(sources).number() == 4
    source.write_text("not C++")
    with pytest.raises(NotCompiled, match=r"refuses .*sources.*error"):
        library(sources)
    assert len(list((tmp_path / "cache" / "llama2-ray").iterdir())) == 2
