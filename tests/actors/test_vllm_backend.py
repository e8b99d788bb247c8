"""vLLM as a backend; in an environment of its own, which `make vllm-test` sets up and uses.

Shapes: T tokens, V vocabulary.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import nn

from actors.vllm_backend import VllmBackend
from cluster import weights
from cluster.weights import Version
from llama2 import checkpoint
from llama2.generation import Engine, Sampling
from llama2.model import Transformer
from tests.actors.small_vllm import (
    CONFIG,
    GENERATOR,
    GREEDY,
    PROMPTS,
    answers,
    finish,
    forward_logprobs,
    published,
    random_model,
    snapshot_of,
)

pytestmark = pytest.mark.vllm
if find_spec("vllm") is None:
    pytest.skip("vLLM is not installed here: make vllm-test", allow_module_level=True)


@pytest.fixture(scope="module")
def model() -> Transformer:
    return random_model(0)


@pytest.fixture(scope="module")
def folder(model: Transformer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    checkpoint.save(model, folder)
    return folder


@pytest.fixture(scope="module")
def backend(folder: Path) -> VllmBackend:
    return VllmBackend(folder, GENERATOR, "float32")


@pytest.fixture
def restored(backend: VllmBackend, model: Transformer) -> Iterator[VllmBackend]:
    """The backend, which gets its first weights back afterwards."""
    yield backend
    backend.load(published(model, 0))


def test_greedy_answers_are_those_of_our_engine(backend: VllmBackend, model: Transformer) -> None:
    ours = Engine(model).generate(PROMPTS, GREEDY)
    for together in (PROMPTS, PROMPTS[2:3]):
        for prompt, found in zip(together, answers(backend, together, GREEDY), strict=True):
            expected = ours[PROMPTS.index(prompt)]
            assert found.tokens == expected.tokens
            assert found.logprobs == pytest.approx(expected.logprobs, abs=1e-4)
            assert found.finish_reason == "length"


def test_logprobs_are_of_temperature_1_without_truncation(
    backend: VllmBackend, model: Transformer
) -> None:
    sampling = Sampling(temperature=0.5, top_p=0.9, top_k=7, max_new_tokens=12, stop_ids=())
    for prompt, found in zip(PROMPTS, answers(backend, PROMPTS, sampling), strict=True):
        expected = forward_logprobs(model, prompt, found.tokens)
        assert found.logprobs == pytest.approx(expected, abs=1e-4)


def test_alternatives_are_the_likeliest(backend: VllmBackend, model: Transformer) -> None:
    sampling = Sampling(temperature=2.0, max_new_tokens=6, stop_ids=())
    asked = [0, 1, 4, 20]
    for i, (prompt, count) in enumerate(zip(PROMPTS, asked, strict=True)):
        backend.submit(str(i), prompt, replace(sampling, alternatives=count), i)
    found = finish(backend)
    for i, (prompt, count) in enumerate(zip(PROMPTS, asked, strict=True)):
        answer = [token.token for token in found[str(i)]]
        with torch.no_grad():
            logprobs_TV = model(torch.tensor([[*prompt, *answer]]))[0].log_softmax(-1)
        for place, token in enumerate(found[str(i)]):
            best = logprobs_TV[len(prompt) - 1 + place].topk(count)
            assert [id for id, _ in token.alternatives] == best.indices.tolist()
            told = [value for _, value in token.alternatives]
            assert told == pytest.approx(best.values.tolist(), abs=1e-4)


def test_draws_follow_the_distribution(backend: VllmBackend, model: Transformer) -> None:
    """Chi-square of 1,600 first tokens, under temperature and both truncations."""
    sampling = Sampling(temperature=1.5, top_p=0.8, top_k=6, max_new_tokens=1, stop_ids=())
    with torch.no_grad():
        logits_V = model(torch.tensor([PROMPTS[0]]))[0, -1] / sampling.temperature
    values, likeliest = logits_V.topk(sampling.top_k)
    kept = values.softmax(-1)
    kept = kept[kept.cumsum(-1) - kept < sampling.top_p]
    wanted = kept / kept.sum()
    count = 1600
    found = answers(backend, [PROMPTS[0]] * count, sampling)
    drawn = torch.tensor([completion.tokens[0] for completion in found])
    seen = torch.tensor([int((drawn == token).sum()) for token in likeliest[: len(wanted)]])
    assert int(seen.sum()) == count
    chi_square = float(((seen - count * wanted) ** 2 / (count * wanted)).sum())
    assert 1 < len(wanted) <= 6
    assert chi_square < 25.7  # 1 in 10,000 for 5 degrees of freedom


def test_seeds(backend: VllmBackend) -> None:
    sampling = Sampling(max_new_tokens=10, stop_ids=())
    seeds = [3, -1, 2**63 - 2, 3]
    together = answers(backend, [PROMPTS[0]] * 4, sampling, seeds)
    alone = [answers(backend, [PROMPTS[0]], sampling, [seed])[0] for seed in seeds[:3]]
    assert [found.tokens for found in together[:3]] == [found.tokens for found in alone]
    assert together[3].tokens == together[0].tokens
    assert len({tuple(found.tokens) for found in together}) == 3


def test_stop_ids_end_an_answer_and_belong_to_it(backend: VllmBackend, model: Transformer) -> None:
    (free,) = Engine(model).generate(PROMPTS[:1], GREEDY)
    stop = free.tokens[5]
    first = free.tokens.index(stop)
    sampling = Sampling(temperature=0.0, max_new_tokens=16, stop_ids=(stop, 300))
    (found,) = answers(backend, PROMPTS[:1], sampling)
    assert found.tokens == free.tokens[: first + 1]
    assert found.finish_reason == "stop"


def test_end_of_sequence_is_a_token_as_any_other(folder: Path, restored: VllmBackend) -> None:
    """Unless `stop_ids` names it: config.json's has no say."""
    model = random_model(0)
    with torch.no_grad():
        model.lm_head.weight[2] = 50 * model.lm_head.weight[2].sign()
    (expected,) = Engine(model).generate(PROMPTS[:1], GREEDY)
    restored.load(published(model, 5))
    (found,) = answers(restored, PROMPTS[:1], GREEDY)
    assert 2 in expected.tokens[:-1], "the weights do not make the model say it"
    assert found.tokens == expected.tokens


def test_the_context_is_the_limit(backend: VllmBackend) -> None:
    prompt = [4] * (CONFIG.max_position_embeddings - 3)
    (found,) = answers(backend, [prompt], GREEDY)
    assert len(found.tokens) == 3
    assert found.finish_reason == "length"


def test_cancel(backend: VllmBackend) -> None:
    expected = answers(backend, PROMPTS[:2], GREEDY)
    for id, prompt in zip(("stays", "goes"), PROMPTS[:2], strict=True):
        backend.submit(id, prompt, GREEDY, 0)
    backend.cancel("unknown")
    before = [token for _ in range(3) for token in backend.step()]
    assert {token.id for token in before} == {"stays", "goes"}
    backend.cancel("goes")
    after = finish(backend)
    assert set(after) == {"stays"}
    both = [token.token for token in before if token.id == "stays"]
    assert both + [token.token for token in after["stays"]] == expected[0].tokens
    backend.submit("goes", PROMPTS[1], GREEDY, 0)
    backend.cancel("goes")
    assert not backend.busy
    backend.submit("goes", PROMPTS[1], GREEDY, 0)
    assert [token.token for token in finish(backend)["goes"]] == expected[1].tokens
    backend.cancel("goes")


def test_more_requests_than_rows_wait(backend: VllmBackend) -> None:
    (expected,) = answers(backend, PROMPTS[:1], GREEDY)
    found = answers(backend, PROMPTS[:1] * (2 * GENERATOR.max_batch_size + 1), GREEDY)
    assert all(completion.tokens == expected.tokens for completion in found)


def test_load_takes_weights_in_place_and_proves_it(
    restored: VllmBackend, model: Transformer
) -> None:
    other = random_model(1)
    old = Engine(model).generate(PROMPTS, GREEDY)
    new = Engine(other).generate(PROMPTS, GREEDY)
    assert all(a.tokens != b.tokens for a, b in zip(old, new, strict=True))
    # The long prompt's keys and values are in the cache by now, those of the old weights.
    assert answers(restored, PROMPTS, GREEDY)[1].tokens == old[1].tokens
    snapshot = published(other, 7)
    assert restored.load(snapshot) == snapshot.version == Version(7, snapshot.version.checksum)
    for found, expected in zip(answers(restored, PROMPTS, GREEDY), new, strict=True):
        assert found.tokens == expected.tokens
        assert found.logprobs == pytest.approx(expected.logprobs, abs=1e-4)
    assert restored.load(published(model, 8)) == published(model, 8).version
    assert answers(restored, PROMPTS, GREEDY)[1].tokens == old[1].tokens


def test_the_checksum_is_of_the_memory_that_is_computed_with(restored: VllmBackend) -> None:
    """One entry changed behind the backend's back shows, in the sum and in what is computed."""
    snapshot = published(random_model(0), 0)
    fields = [field for bucket in snapshot.buckets for field in bucket.fields]
    (before,) = answers(restored, PROMPTS[:1], GREEDY)
    (names,) = restored._engine.apply_model(lambda m: [name for name, _ in m.named_parameters()])
    assert len(names) == 3 + 6 * CONFIG.num_hidden_layers
    for name in names:
        restored._engine.apply_model(partial(enlarge, name=name))
        assert restored._engine.collective_rpc("held_checksum", args=(fields,)) != [
            snapshot.version.checksum
        ]
        restored._engine.reset_prefix_cache()
        (after,) = answers(restored, PROMPTS[:1], GREEDY)
        assert after.logprobs != before.logprobs, f"{name} is not what is computed with"
        assert restored.load(snapshot) == snapshot.version


@torch.no_grad()
def enlarge(model: nn.Module, name: str) -> None:
    model.get_parameter(name).mul_(1.5)


def test_an_incomplete_snapshot_is_refused(restored: VllmBackend, model: Transformer) -> None:
    named = list(model.named_parameters())
    with pytest.raises(AssertionError, match=r"no weights for .*model\.norm"):
        restored.load(snapshot_of(named[:-2], 3))
    restored._engine.collective_rpc("update_weights", args=({"bucket": weights.pack(named[-2:])},))
    restored._engine.collective_rpc("finish_weight_update")


def test_bad_prompts_are_refused_and_leave_nothing(backend: VllmBackend) -> None:
    context = CONFIG.max_position_embeddings
    for prompt, message in (
        ([], "is empty"),
        ([3] * context, f"has {context} tokens"),
        ([3, 301], "outside the vocabulary of 301"),
        ([-1], "outside the vocabulary"),
    ):
        with pytest.raises(ValueError, match=message):
            backend.submit("bad", prompt, GREEDY, 0)
    assert not backend.busy
