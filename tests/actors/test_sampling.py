"""Samples with scores: a function of seed and prompt, in chunks that are done once."""

import asyncio
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from actors.records import Sample
from actors.sampling import Question, chunk_file, read_chunks, run_chunks
from llama2 import checkpoint
from llama2.chat import Message
from llama2.generation import Engine, Sampling
from llama2.prompting import Prompting, sample_seed
from tests.actors.endpoint import model_folder
from tests.actors.in_process_roles import sampler_of


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("model"))


def question(id: str, text: str, safety: bool = False) -> Question:
    return Question(id, (Message("user", text),), safety)


ASKED = [question("3", "the cat"), question("8", "who is there", safety=True)]


def length(sample: Sample) -> float:
    return len(sample.response) / 4


def zero(sample: Sample) -> float:
    return 0.0


def test_samples_are_those_of_the_engine_with_the_samples_own_seeds(model: Path) -> None:
    source, _ = sampler_of(model, length, zero, seed=5)
    found = asyncio.run(source.sample(ASKED, 1.25, 3))
    prompting = Prompting.read(model)
    engine = Engine(checkpoint.load(model).eval())
    sampling = Sampling(temperature=1.25, max_new_tokens=12, stop_ids=prompting.stop_ids)
    for asked, several in zip(ASKED, found, strict=True):
        for number, sample in enumerate(several):
            (alone,) = engine.generate(
                [prompting.encode_chat(asked.messages)],
                sampling,
                [sample_seed(5, f"{asked.id}/1.25", number)],
            )
            tokens = [token for token in alone.tokens if token not in prompting.stop_ids]
            assert sample.response == prompting.tokenizer.decode(tokens).strip()
            assert sample.logprob == pytest.approx(sum(alone.logprobs), abs=1e-3)
            assert (sample.id, sample.tokens) == (f"{asked.id}/1.25/{number}", len(alone.tokens))
            assert sample.finished == (alone.tokens[-1] in prompting.stop_ids)
            assert (sample.round, sample.model) == ("here", "weights")
    assert len({sample.response for several in found for sample in several}) == 6


def test_samples_depend_on_nothing_else_that_is_asked(model: Path) -> None:
    source, _ = sampler_of(model, length, zero)
    together = asyncio.run(source.sample(ASKED, 1.0, 4))
    alone = asyncio.run(source.sample(ASKED[1:], 1.0, 2))
    assert [s.response for s in together[1][:2]] == [s.response for s in alone[0]]
    other, _ = sampler_of(model, length, zero, seed=1)
    assert [s.response for s in asyncio.run(other.sample(ASKED, 1.0, 4))[0]] != [
        s.response for s in together[0]
    ]


def test_rewards_by_hand(model: Path) -> None:
    """Safety counts where the prompt is tagged, or below 0.15, which has the logit -1.7346."""

    def safety(sample: Sample) -> float:
        return -1.8 if sample.id.endswith("/1") else -1.7

    source, _ = sampler_of(model, lambda sample: 2.0, safety)
    plain, tagged = asyncio.run(source.sample(ASKED, 1.0, 2))
    assert [sample.reward for sample in plain] == pytest.approx([2.0, -1.8])
    assert [sample.reward for sample in tagged] == pytest.approx([-1.7, -1.8])
    assert [(s.helpfulness, s.safety) for s in plain] == [(2.0, -1.7), (2.0, -1.8)]


def test_reward_models_see_the_prompt_that_they_are_told(model: Path) -> None:
    seen: list[list[int]] = []

    def spying(sample: Sample) -> float:
        seen.append(sample.prompt.tolist())
        return 0.0

    source, _ = sampler_of(model, spying, zero)
    prompting = Prompting.read(model)
    bare = (Message("user", "the cat"),)
    under = Question("1", (Message("system", "who hears"), *bare), True, scored_as=bare)
    (one,), (other,) = asyncio.run(source.sample([under, replace(under, scored_as=None)], 1.0))
    assert seen == [prompting.encode_chat(bare), prompting.encode_chat(under.messages)]
    assert one.response == other.response


def test_a_score_that_is_no_number_ends_it(model: Path) -> None:
    source, _ = sampler_of(model, zero, lambda sample: math.nan)
    with pytest.raises(ValueError, match=r"^The scorer scores the answer 3/1/0 as nan;"):
        asyncio.run(source.sample(ASKED, 1.0))


def test_scoring_again_reads_the_same_text(model: Path) -> None:
    """An answer that was written as text is scored again as prompt, answer and end of turn."""
    seen: list[list[int]] = []

    def spying(sample: Sample) -> float:
        seen.append(sample.tokens.tolist())
        return float(len(seen))

    source, _ = sampler_of(model, spying, zero, max_new_tokens=40)
    sampled = [s for several in asyncio.run(source.sample(ASKED, 1.0, 8)) for s in several]
    tokens = dict(zip([s.id for s in sampled], seen, strict=True))
    tokenizer = Prompting.read(model).tokenizer
    usable = [s for s in sampled if s.response and not set("[<") & set(s.response)]
    assert len(usable) > 3
    seen.clear()
    asked = [ASKED[0] if s.id.startswith("3/") else ASKED[1] for s in usable]
    again = asyncio.run(source.score_again(asked, usable))
    for before, after, read in zip(usable, again, seen, strict=True):
        texts = ["".join(tokenizer.decode(t).split()) for t in (read, tokens[before.id])]
        assert texts[0] == texts[1] and read[-1] == tokenizer.eos_id
        assert after.reward_then == before.reward and after.response == before.response
    assert [after.helpfulness for after in again] == [i + 1.0 for i in range(len(again))]
    twice = asyncio.run(source.score_again(asked, again))
    assert [s.reward_then for s in twice] == [s.reward for s in usable]


def test_chunks_are_done_once_whatever_is_killed(tmp_path: Path) -> None:
    calls: list[int] = []
    broken = {2}

    async def work(chunk: Sequence[int]) -> list[dict[str, Any]]:
        calls.append(chunk[0])
        await asyncio.sleep(0.01 * (3 - chunk[0]))
        if chunk[0] in broken:
            raise ConnectionError("lost")
        return [{"number": n} for n in chunk]

    chunks = [[0], [1, 10], [2]]

    def run() -> None:
        asyncio.run(run_chunks(tmp_path / "out", {"seed": 1}, chunks, work, at_once=2))

    with pytest.raises(ConnectionError, match="lost"):
        run()
    assert chunk_file(tmp_path / "out", 1).exists()
    broken.clear()
    before = list(calls)
    run()
    assert sorted(calls[len(before) :]) == [2] and sorted(set(before)) == [0, 1, 2]
    assert read_chunks(tmp_path / "out") == [{"number": n} for n in (0, 1, 10, 2)]
    assert not list((tmp_path / "out").glob(".*"))


def test_chunks_of_something_else_are_refused(tmp_path: Path) -> None:
    async def work(chunk: Sequence[int]) -> list[dict[str, Any]]:
        return [{"n": chunk[0]}]

    asyncio.run(run_chunks(tmp_path, {"seed": 1, "weights": ("a",)}, [[1]], work, 1))
    asyncio.run(run_chunks(tmp_path, {"seed": 1, "weights": ("a",)}, [[1]], work, 1))
    with pytest.raises(ValueError, match=r"was begun with another seed \(1, now 2\)"):
        asyncio.run(run_chunks(tmp_path, {"seed": 2, "weights": ("a",)}, [[1]], work, 1))


def test_lines_hold_any_text(tmp_path: Path) -> None:
    said = [{"response": "line\u2028 one\r\nand \ud800 two"}]

    async def work(chunk: Sequence[int]) -> list[dict[str, Any]]:
        return said

    asyncio.run(run_chunks(tmp_path, {}, [[1]], work, 1))
    assert read_chunks(tmp_path)[0]["response"].startswith("line\u2028 one\r\nand")
    assert json.dumps(asdict(ASKED[0]))
