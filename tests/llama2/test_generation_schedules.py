"""Who is computed when, and where: random schedules with a stand-in for the model, and the model
itself on pages so small that everything happens."""

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from cluster.placement import fast_bfloat16
from llama2.config import ModelConfig
from llama2.generation import Completion, Engine, Sampling, Token, bag_cache, runner
from llama2.generation.bag_cache import BagCache
from llama2.generation.request import Alternatives, Request
from llama2.model import Transformer, initialize

CONFIG = ModelConfig(
    vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
    initializer_range=0.3,
)  # fmt: skip
PAGE = 4


@pytest.fixture(autouse=True)
def small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bag_cache, "PAGE", PAGE)
    monkeypatch.setattr(BagCache, "page_size", PAGE)


@pytest.fixture(scope="module")
def model() -> Transformer:
    model = Transformer(CONFIG)
    initialize(model, CONFIG, seed=3)
    return model.eval()


def following(tokens: list[int]) -> int:
    """The stand-in's next token: a function of every token before it."""
    return hash(tuple(tokens)) % 25


class StandIn:
    """Remembers tokens where the model would keep their keys and values, and reads them back from
    there to find the next one: a page that is lost, mixed up or overwritten changes it."""

    def __init__(self, engine: Engine) -> None:
        self.memory = [-1] * (engine._pages.count * PAGE)
        self.most_rows = 0
        engine._runner = self  # type: ignore[assignment]
        engine._scheduler._copy = self.copy

    def copy(self, source: int, target: int) -> None:
        content = self.memory[source * PAGE : (source + 1) * PAGE]
        self.memory[target * PAGE : (target + 1) * PAGE] = content

    def slots(self, request: Request, end: int) -> list[int]:
        return [request.pages[i // PAGE] * PAGE + i % PAGE for i in range(end)]

    def weights_changed(self) -> None:
        """It has none."""

    def run(
        self, plan: list[tuple[Request, int]]
    ) -> tuple[list[int], list[float], list[Alternatives]]:
        for request, count in plan:
            end = request.computed + count
            for i, slot in list(enumerate(self.slots(request, end)))[request.computed :]:
                self.memory[slot] = request.tokens[i]
        self.most_rows = max(self.most_rows, len(plan))
        drawing = [request for request, _ in plan if request.draws]
        found = [
            following([self.memory[slot] for slot in self.slots(request, len(request.tokens))])
            for request in drawing
        ]
        return found, [0.0] * len(found), [()] * len(found)


def expected(prompt: list[int], longest: int) -> list[int]:
    tokens = list(prompt)
    while len(tokens) < len(prompt) + longest:
        tokens.append(following(tokens))
        if tokens[-1] == 0:
            break
    return tokens[len(prompt) :]


def schedule(engine: Engine, rng: random.Random, name: int) -> None:
    """Submit, step and cancel at random until nothing is left; check every token."""
    beginnings = [[rng.randrange(1, 9) for _ in range(rng.randrange(1, 18))] for _ in range(2)]
    waiting, wanted = [], {}
    for i in range(rng.randrange(1, 11)):
        prompt = rng.choice(beginnings) + [rng.randrange(1, 9) for _ in range(rng.randrange(6))]
        waiting.append((f"{name}-{i}", prompt, rng.randrange(1, 26)))
        wanted[f"{name}-{i}"] = expected(prompt, waiting[-1][2])
    drawn: dict[str, list[Token]] = {id: [] for id in wanted}
    cancelled: set[str] = set()
    steps = 0
    while waiting or engine.busy:
        action = rng.random()
        if waiting and action < 0.4:
            id, prompt, longest = waiting.pop()
            engine.submit(id, prompt, Sampling(max_new_tokens=longest, stop_ids=(0,)), seed=0)
        elif action < 0.43:
            cancelled.add(rng.choice(list(wanted)))
            for id in cancelled & {id for id in wanted if not any(id == w[0] for w in waiting)}:
                engine.cancel(id)
        else:
            for token in engine.step():
                drawn[token.id].append(token)
            steps += 1
            assert steps < 2000, "the engine does not come to an end"
    for id, tokens in drawn.items():
        found = [token.token for token in tokens]
        ended = [token.finish_reason for token in tokens]
        if id not in cancelled:
            assert found == wanted[id]
            assert ended[-1] == ("stop" if found[-1] == 0 else "length")
        assert found == wanted[id][: len(found)]
        assert not any(ended[:-1])


def test_ten_thousand_schedules(model: Transformer) -> None:
    preempted = reused = 0
    for number, (rows, pages, chunk) in enumerate(
        [(1, 12, 5), (3, 13, 3), (4, 12, 64), (8, 14, 7), (8, 40, 4), (2, 100, 2), (5, 12, 9)]
    ):
        rng = random.Random(number)
        engine = Engine(model, rows, cache_tokens=pages * PAGE, chunk=chunk)
        stand_in = StandIn(engine)
        for i in range(1430):
            schedule(engine, rng, i)
            assert engine._pages.available == pages
            if rng.random() < 0.02:
                engine.weights_changed()
                assert len(engine._pages._free) == pages
        assert stand_in.most_rows <= rows
        preempted += engine.counters.preempted
        reused += engine.counters.reused
    assert preempted > 1000
    assert reused > 10_000


PROMPTS = [
    [1, 5, 9], [1], [1, 40, 41, 42, 43, 44, 45], [1, 7, 7, 3], [1, 7, 7, 3, 8, 2, 2, 5, 9, 20],
    [1, 7, 7, 3, 8, 2, 2, 5, 9, 20], [1, 7, 7, 3, 8, 2, 2, 5, 30],
]  # fmt: skip
SAMPLING = Sampling(max_new_tokens=20, stop_ids=(2,))


@pytest.fixture(scope="module")
def alone(model: Transformer) -> Iterator[list[list[int]]]:
    """Each prompt by itself, its tokens fed to the whole model anew for every token."""
    answers = []
    with torch.no_grad():
        for i, prompt in enumerate(PROMPTS):
            uniforms = torch.rand(20, generator=torch.Generator().manual_seed(i)).double()
            tokens = list(prompt)
            for uniform in uniforms:
                weights = model(torch.tensor([tokens]))[0, -1].double().softmax(-1)
                tokens.append(int((weights.cumsum(0) > uniform).nonzero()[0]))
                if tokens[-1] == 2:
                    break
            answers.append(tokens[len(prompt) :])
    yield answers


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_batch_size": 3},
        {"chunk": 3},
        {"cache_tokens": 36},  # one page more than the longest needs
        {"cache_tokens": 32},
        {"cache_tokens": 32, "chunk": 2},
        {"cache_tokens": 48, "chunk": 5, "max_batch_size": 4},
        {"share_prefixes": False, "cache_tokens": 48},
    ],
)
def test_tokens_do_not_depend_on_the_schedule(
    model: Transformer, alone: list[list[int]], options: dict[str, Any]
) -> None:
    engine = Engine(model, **options)
    for _ in range(2):  # the second time with what the first left in the cache
        completions = engine.generate(PROMPTS, SAMPLING, seeds=range(len(PROMPTS)))
        assert [completion.tokens for completion in completions] == alone
    small = "cache_tokens" in options
    assert (engine.counters.preempted > 0) == small
    assert (engine.counters.reused > 0) == options.get("share_prefixes", True)


@pytest.mark.skipif(not fast_bfloat16(), reason="other processors' products may round by size")
@pytest.mark.parametrize("compiled", [True, False])
def test_in_bfloat16_not_even_rounding_depends_on_the_schedule(
    monkeypatch: pytest.MonkeyPatch, compiled: bool
) -> None:
    monkeypatch.undo()  # pages of the usual size
    if not compiled:
        monkeypatch.setattr(runner, "kernels_for", lambda trunk: None)
    config = ModelConfig(  # of widths that are whole vectors, as real models' are
        vocab_size=61, hidden_size=128, intermediate_size=96, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=400,
        initializer_range=0.3,
    )  # fmt: skip
    model = Transformer(config)
    initialize(model, config, seed=3)
    model = model.bfloat16().eval()
    generator = torch.Generator().manual_seed(0)
    head = torch.randint(3, 61, (130,), generator=generator).tolist()
    prompts = [
        head[:n] + torch.randint(3, 61, (m,), generator=generator).tolist()
        for n, m in ((0, 1), (0, 2), (0, 63), (0, 66), (130, 0), (130, 1), (64, 30), (129, 140))
    ] * 2
    sampling = Sampling(max_new_tokens=70, stop_ids=())

    def answers(engine: Engine) -> list[Completion]:
        return engine.generate(prompts, sampling, seeds=range(len(prompts)))

    one_by_one = Engine(model, max_batch_size=1, share_prefixes=False)
    expected_answers = answers(one_by_one)
    for engine in (
        Engine(model),
        Engine(model, chunk=64),
        Engine(model, max_batch_size=5),
        Engine(model, cache_tokens=10 * 64),
    ):
        for _ in range(2):
            assert answers(engine) == expected_answers
    assert engine.counters.preempted > 0
    assert engine.counters.reused > 0


def test_a_cache_of_one_page_less_than_a_request_needs(model: Transformer) -> None:
    with pytest.raises(
        ValueError, match="Prompt 4 and its answer may have 30 tokens and the cache holds 28"
    ):
        Engine(model, cache_tokens=28).generate(PROMPTS, SAMPLING)


def test_cancelled_requests_leave_the_others_alone(
    model: Transformer, alone: list[list[int]]
) -> None:
    engine = Engine(model, cache_tokens=48, chunk=4)
    for i, prompt in enumerate(PROMPTS):
        engine.submit(str(i), prompt, SAMPLING, seed=i)
    drawn: dict[str, list[int]] = {str(i): [] for i in range(len(PROMPTS))}
    for step in range(200):
        for token in engine.step():
            drawn[token.id].append(token.token)
        if step == 3:
            engine.cancel("4")
            engine.cancel("6")
            engine.cancel("nobody")
        if step == 6:  # again from the beginning, under an id that is free again
            drawn["4"].clear()
            engine.submit("4", PROMPTS[4], SAMPLING, seed=4)
    assert not engine.busy
    assert [drawn[str(i)] for i in range(6)] == alone[:6]
    assert drawn["6"] == alone[6][: len(drawn["6"])]


def test_one_prompt_is_computed_once_for_all_its_samples(model: Transformer) -> None:
    engine = Engine(model)
    prompt = list(range(1, 31))
    engine.generate([prompt] * 16, Sampling(max_new_tokens=3, stop_ids=()), seeds=range(16))
    assert engine.counters.computed == 29
    assert engine.counters.reused == 15 * 29


def test_new_weights_see_nothing_of_the_old(model: Transformer) -> None:
    changed = Transformer(CONFIG)
    changed.load_state_dict(model.state_dict())
    engine = Engine(changed.eval())
    engine.generate(PROMPTS, SAMPLING)
    with torch.no_grad():
        changed.model.layers[0].self_attn.k_proj.weight.mul_(-1)
        changed.model.layers[1].mlp.up_proj.weight.mul_(0.5)
    engine.weights_changed()
    fresh = Transformer(CONFIG)
    fresh.load_state_dict(changed.state_dict())
    expected_answers = Engine(fresh.eval()).generate(PROMPTS, SAMPLING)
    assert engine.generate(PROMPTS, SAMPLING) == expected_answers
    assert expected_answers != Engine(model).generate(PROMPTS, SAMPLING)


def test_weights_that_are_no_numbers_are_told(model: Transformer) -> None:
    broken = Transformer(CONFIG)
    broken.load_state_dict(model.state_dict())
    with torch.no_grad():
        broken.lm_head.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="no number behind token 3 of request 0"):
        Engine(broken).generate([[1, 2, 3]])


def test_damaged_weights_leave_nothing_in_pages(model: Transformer) -> None:
    damaged = Transformer(CONFIG).eval()
    damaged.load_state_dict(model.state_dict())
    engine = Engine(damaged, cache_tokens=256)
    with torch.no_grad():
        damaged.model.layers[0].self_attn.v_proj.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="no number"):
        engine.generate([[5] * 40] * 4)
    damaged.load_state_dict(model.state_dict())
    engine.weights_changed()
    assert engine.generate(PROMPTS, SAMPLING) == Engine(model).generate(PROMPTS, SAMPLING)
