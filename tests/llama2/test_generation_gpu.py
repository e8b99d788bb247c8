"""The engine on a GPU: attention of variable length over pages, and captured graphs."""

import pytest
import torch

from llama2.config import ModelConfig
from llama2.generation import Engine, Sampling
from llama2.generation.varlen_cache import VarlenCache
from llama2.model import Transformer, initialize

pytestmark = pytest.mark.gpu

CONFIG = ModelConfig(
    vocab_size=1000, hidden_size=256, intermediate_size=512, num_hidden_layers=3,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1024,
    initializer_range=0.05,
)  # fmt: skip


def model(dtype: torch.dtype) -> Transformer:
    made = Transformer(CONFIG)
    initialize(made, CONFIG, seed=3)
    return made.to("cuda", dtype).eval().requires_grad_(False)


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    lengths = (1, 2, 30, 255, 256, 257, 600)
    made = [torch.randint(3, 1000, (n,), generator=generator).tolist() for n in lengths]
    return [*made, made[-1], [*made[-1][:300], 5, 6]]


def logprobs(checked: Transformer, prompt: list[int], answer: list[int]) -> torch.Tensor:
    tokens = torch.tensor([prompt + answer], device="cuda")
    with torch.no_grad():
        every = checked(tokens[:, :-1])[0].float().log_softmax(-1)
    found = every.gather(1, tokens[0, 1:, None])[:, 0]
    return found[len(prompt) - 1 :].cpu()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_logprobs_are_those_of_the_model(dtype: torch.dtype) -> None:
    checked = model(dtype)
    engine = Engine(checked, chunk=200)
    if torch.__version__ >= "2.13":
        assert isinstance(engine._runner.cache, VarlenCache) == (dtype == torch.bfloat16)
    made = engine.generate(prompts(), Sampling(max_new_tokens=40, stop_ids=()))
    assert engine.counters.reused > 0
    for prompt, completion in zip(prompts(), made, strict=True):
        expected = logprobs(checked, prompt, completion.tokens)
        difference = (torch.tensor(completion.logprobs) - expected).abs().mean()
        assert difference < (0.03 if dtype == torch.bfloat16 else 1e-4)


@pytest.mark.skipif(torch.__version__ < "2.13", reason="older torch reads no pages")
def test_graphs_compute_what_single_launches_do() -> None:
    sampling = Sampling(max_new_tokens=60, stop_ids=())
    captured, launched = Engine(model(torch.bfloat16)), Engine(model(torch.bfloat16))
    launched._runner._decoding._graphs = None  # type: ignore[attr-defined]
    pairs = zip(
        captured.generate(prompts(), sampling), launched.generate(prompts(), sampling), strict=True
    )
    for one, other in pairs:
        assert one.tokens[:10] == other.tokens[:10]
        same = sum(a == b for a, b in zip(one.tokens, other.tokens, strict=True))
        assert same > 0
    assert captured._runner._decoding._graphs._graphs  # type: ignore[attr-defined]


def test_greedy_equals_the_cpu_in_float32() -> None:
    greedy = Sampling(temperature=0, max_new_tokens=30, stop_ids=())
    on_gpu = Engine(model(torch.float32)).generate(prompts(), greedy)
    on_cpu = Engine(model(torch.float32).cpu()).generate(prompts(), greedy)
    assert [c.tokens for c in on_gpu] == [c.tokens for c in on_cpu]


def test_captured_graphs_follow_the_weights() -> None:
    """Which are written over those that were there when the graphs were captured."""
    changed, greedy = model(torch.bfloat16), Sampling(temperature=0, max_new_tokens=20, stop_ids=())
    engine = Engine(changed)
    before = engine.generate(prompts(), greedy)
    changed.lm_head.weight.neg_()
    changed.model.layers[1].self_attn.k_proj.weight.mul_(-1)
    engine.weights_changed()
    after = engine.generate(prompts(), greedy)
    assert [c.tokens for c in after] != [c.tokens for c in before]
    fresh = model(torch.bfloat16)
    fresh.load_state_dict(changed.state_dict())
    assert [c.tokens for c in after] == [
        c.tokens for c in Engine(fresh).generate(prompts(), greedy)
    ]
