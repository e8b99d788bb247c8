"""vLLM as a backend; in an environment of its own, which `make vllm-test` sets up and uses.

Shapes: T tokens, V vocabulary.
"""

import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from ray import serve
from torch import nn

from actors.backend import PRECISIONS
from actors.generator import deploy
from actors.generator_config import GeneratorConfig
from actors.records import Request
from actors.vllm_backend import VllmBackend
from cluster import publishing, weights
from cluster.session import WORKER_ENVIRONMENT
from cluster.weights import Snapshot, Version, WeightStore
from llama2 import checkpoint
from llama2.config import ModelConfig
from llama2.generation import Completion, Engine, Sampling, Token
from llama2.model import Transformer

pytestmark = pytest.mark.vllm
if find_spec("vllm") is None:
    pytest.skip("vLLM is not installed here: make vllm-test", allow_module_level=True)

# Heads are grouped and the vocabulary is not a multiple of what vLLM pads it to.
CONFIG = ModelConfig(
    vocab_size=301,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    max_position_embeddings=288,
    initializer_range=0.2,
)
GENERATOR = GeneratorConfig(backend="vllm", max_batch_size=8, threads=1, cache_gib=0.05)
GREEDY = Sampling(temperature=0.0, max_new_tokens=16, stop_ids=())
PROMPTS = [[1, 5, 9, 33], list(range(2, 262)), [7], list(range(100, 120))]


def random_model(seed: int, config: ModelConfig = CONFIG) -> Transformer:
    torch.manual_seed(seed)
    return Transformer(config).eval()


def published(model: Transformer, number: int) -> Snapshot:
    """What replicas fetch: tied weights once."""
    return snapshot_of(
        [(name, weight.detach()) for name, weight in model.named_parameters()], number
    )


def snapshot_of(named: list[tuple[str, torch.Tensor]], number: int) -> Snapshot:
    """These weights in two buckets."""
    buckets = (weights.pack(named[:5]), weights.pack(named[5:]))
    return Snapshot(Version(number, weights.checksum(named)), buckets)


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


def finish(backend: VllmBackend) -> dict[str, list[Token]]:
    """Step until nothing is left to do."""
    found: dict[str, list[Token]] = {}
    while backend.busy:
        for token in backend.step():
            found.setdefault(token.id, []).append(token)
    return found


def answers(
    backend: VllmBackend,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    seeds: Sequence[int] | None = None,
) -> list[Completion]:
    for i, prompt in enumerate(prompts):
        backend.submit(str(i), prompt, sampling, seeds[i] if seeds else i)
    found = finish(backend)
    for tokens in found.values():
        assert all(token.finish_reason is None for token in tokens[:-1])
    return [
        Completion(
            [token.token for token in found[str(i)]],
            [token.logprob for token in found[str(i)]],
            found[str(i)][-1].finish_reason,  # type: ignore[arg-type]
        )
        for i in range(len(prompts))
    ]


@torch.no_grad()
def forward_logprobs(
    model: Transformer, prompt: Sequence[int], answer: Sequence[int]
) -> list[float]:
    """What a trainer computes for the answer's tokens."""
    tokens_T = torch.tensor([*prompt, *answer])
    logprobs_TV = model(tokens_T[None])[0].log_softmax(-1)
    places = range(len(prompt) - 1, len(tokens_T) - 1)
    return [float(logprobs_TV[place, tokens_T[place + 1]]) for place in places]


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


VARIANTS = {
    "tied": replace(CONFIG, tie_word_embeddings=True),
    "biases": replace(CONFIG, attention_bias=True, mlp_bias=True),
    "bfloat16": CONFIG,
}


@pytest.mark.parametrize("name", VARIANTS)
def test_other_models_and_precisions(name: str, tmp_path: Path) -> None:
    precision = "bfloat16" if name == "bfloat16" else "float32"
    check(VARIANTS[name], precision, 1, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("heads", [2, 1])
def test_two_workers(heads: int, tmp_path: Path) -> None:
    """With one key/value head both have a copy of it; with two, one each.

    In a process of its own, since vLLM reads its environment once.
    """
    config = replace(CONFIG, num_key_value_heads=heads, attention_bias=True)
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        pool.submit(check, config, "float32", 2, tmp_path).result()


def check(config: ModelConfig, precision: str, workers: int, folder: Path) -> None:
    """Checksums, log-probabilities and greedy tokens, before and after new weights."""
    models = [random_model(seed, config).to(PRECISIONS[precision]) for seed in (2, 3)]
    checkpoint.save(models[0], folder)
    backend = VllmBackend(folder, replace(GENERATOR, tensor_parallel=workers), precision)
    for number, model in enumerate(models):
        if number:
            snapshot = published(model, number)
            assert backend.load(snapshot) == snapshot.version
        tolerance = 0.15 if precision == "bfloat16" else 1e-4
        found = answers(backend, PROMPTS, GREEDY)
        for prompt, completion in zip(PROMPTS, found, strict=True):
            expected = forward_logprobs(model.float(), prompt, completion.tokens)
            assert completion.logprobs == pytest.approx(expected, abs=tolerance)
        if precision == "float32":
            for completion, ours in zip(
                found, Engine(model).generate(PROMPTS, GREEDY), strict=True
            ):
                assert completion.tokens == ours.tokens


def test_models_that_vllm_cannot_take(tmp_path: Path) -> None:
    config = replace(CONFIG, head_dim=16)
    checkpoint.save(random_model(0, config), tmp_path)
    with pytest.raises(ValueError, match="no attention for heads 16 wide on a CPU"):
        VllmBackend(tmp_path, GENERATOR, "float32")
    with pytest.raises(ValueError, match="tensor_parallel 3 does not divide the model's 4"):
        VllmBackend(tmp_path, replace(GENERATOR, tensor_parallel=3), "float32")


@ray.remote(num_cpus=0, max_concurrency=2)
class Learner:
    """Publishes random weights."""

    def publish(self, store: Any, number: int) -> Version:
        named = [list(random_model(number).named_parameters())]
        return publishing.put(named, number, publishing.enter(store, 30), store, 30)


def test_a_replica_on_serve(folder: Path) -> None:
    """It starts with the newest weights, loads those that are published later, and streams."""
    root = str(Path(__file__).resolve().parents[2])
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        _temp_dir=tempfile.mkdtemp(prefix="r-", dir="/tmp"),
        runtime_env={"env_vars": WORKER_ENVIRONMENT | {"PYTHONPATH": root}},
    )
    try:
        store, learner = WeightStore.remote(), Learner.remote()  # type: ignore[attr-defined]
        versions = [ray.get(learner.publish.remote(store, 1))]
        handle = deploy("vllm", folder, store, "float32", replace(GENERATOR, cpus=0.5))
        requests = [Request(f"r-{i}", np.array(p), i) for i, p in enumerate(PROMPTS)]
        for number in (1, 2):
            if number == 2:
                versions.append(ray.get(learner.publish.remote(store, 2)))
                assert handle.refresh.remote().result(timeout_s=120).version == versions[1]
            rollout = handle.generate.remote(requests, GREEDY).result(timeout_s=120)
            expected = Engine(random_model(number)).generate(PROMPTS, GREEDY)
            for sample, ours in zip(rollout.samples, expected, strict=True):
                assert sample.response.tolist() == ours.tokens
                assert sample.logprobs.tolist() == pytest.approx(ours.logprobs, abs=1e-4)
                assert sample.version == versions[-1]
        streaming = handle.options(stream=True)
        abandoned = streaming.stream.remote(replace(requests[1], id="s"), GREEDY)
        next(iter(abandoned))
        abandoned.cancel()
        pieces = list(streaming.stream.remote(replace(requests[0], id="t"), GREEDY))
        assert [token for piece in pieces for token in piece.tokens] == expected[0].tokens
        assert pieces[-1].finish_reason == "length"
    finally:
        serve.shutdown()
        ray.shutdown()
