"""A model while it is evaluated: what the engine and the forward pass say, here or on a cluster."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import ray
import torch

from actors.generator_config import GeneratorConfig
from actors.measured_model import ClusterModel, Continuation, LocalModel, Question
from actors.text_rewards import Reply, TextRewards
from llama2 import checkpoint
from llama2.batches import TokenSequence
from llama2.chat import Message, encode_dialogue
from llama2.generation import Engine, Sampling
from llama2.model import ScalarModel
from llama2.prompting import Prompting
from llama2.scoring import continuations
from llama2.transcripts import encode_answered
from tests.actors.endpoint import CONTEXT, model_folder

TEXTS = ["the cat", "who is not there", "green dog", "the dog sees the red house"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("model"))


def questions(folder: Path, stop: tuple[str, ...] = ()) -> list[Question]:
    """Some greedy, some drawn, so that they cannot share one call."""
    prompting = Prompting.read(folder)
    drawn = Sampling(max_new_tokens=20, stop_ids=prompting.stop_ids)
    greedy = Sampling(temperature=0.0, max_new_tokens=12, stop_ids=prompting.stop_ids)
    return [
        Question(prompting.encode_text(text), (drawn, greedy)[i % 2], 7 * i, stop)
        for i, text in enumerate(TEXTS * 2)
    ]


def texts_of(answers: list[Continuation]) -> list[str]:
    return [answer.text for answer in answers]


def test_answers_are_the_engines(folder: Path) -> None:
    asked = questions(folder)
    found = LocalModel(folder, "float32", GeneratorConfig(max_batch_size=3)).answer(asked)
    engine, tokenizer = Engine(checkpoint.load(folder)), Prompting.read(folder).tokenizer
    for question, answer in zip(asked, found, strict=True):
        (alone,) = engine.generate([question.tokens], question.sampling, [question.seed])
        assert list(answer.tokens) == alone.tokens
        assert answer.finish_reason == alone.finish_reason
        assert answer.text == tokenizer.decode([*tokenizer.encode("x"), *alone.tokens])[1:]


def test_stop_strings_cut_the_same_answers(folder: Path) -> None:
    """With a string to end at, an answer is the one without it, up to there."""
    model = LocalModel(folder, "float32", GeneratorConfig())
    whole = texts_of(model.answer(questions(folder)))
    stop = tuple({text[len(text) // 2] for text in whole[:3]} | {"never said"})
    found = model.answer(questions(folder, stop))
    assert texts_of(found) == [min((t.partition(s)[0] for s in stop), key=len) for t in whole]
    stopped = [a for a, text in zip(found, whole, strict=True) if a.text != text]
    assert len(stopped) >= 3
    assert all(answer.finish_reason == "stop" for answer in stopped)


def test_reward_of_text_is_that_of_its_tokens(folder: Path, tmp_path: Path) -> None:
    """A finished answer is scored as reward models are trained; one that is no message (empty, or
    with a forged tag) is scored too."""
    causal = checkpoint.load(folder)
    scalar = ScalarModel(causal.config)
    scalar.model.load_state_dict(causal.model.state_dict())
    tokenizer = Prompting.read(folder).tokenizer
    checkpoint.save(scalar, tmp_path, tokenizer.files())
    prompt = (Message("user", "who sees the cat"),)
    answers = ["the dog", "", "red [INST] green"]
    found = TextRewards(tmp_path, "float32", 1).scores([Reply(prompt, text) for text in answers])
    dialogue = encode_dialogue(tokenizer, (*prompt, Message("assistant", "the dog")))
    assert encode_answered(tokenizer, prompt, "the dog", True, CONTEXT) == dialogue.tokens
    with torch.no_grad():
        for text, score in zip(answers, found, strict=True):
            tokens = encode_answered(tokenizer, prompt, text, True, CONTEXT)
            assert tokens[-1] == tokenizer.eos_id
            assert score == pytest.approx(scalar(torch.tensor([tokens]))[0, -1].item(), abs=1e-4)


@pytest.fixture
def cluster() -> Iterator[None]:
    ray.init(
        num_cpus=2, include_dashboard=False, _temp_dir=tempfile.mkdtemp(prefix="r", dir="/tmp")
    )
    yield
    ray.shutdown()


@pytest.mark.slow
def test_cluster_says_what_one_process_says(folder: Path, cluster: None) -> None:
    """Two replicas, then two workers that score, then replicas again."""
    local = LocalModel(folder, "float32", GeneratorConfig())
    model = ClusterModel(folder, "float32", GeneratorConfig(count=2, cpus=0.5), timeout=120)
    asked = questions(folder, stop=("cat",))
    pairs = [(question.tokens, [5 + i, 9]) for i, question in enumerate(asked)]
    everything = np.array([False, *[True] * 9])
    sequences = [TokenSequence(np.arange(3 + i, 13 + i), everything) for i in range(3)]
    try:
        for _ in range(2):
            assert texts_of(model.answer(asked)) == texts_of(local.answer(asked))
            expected = continuations(checkpoint.load(folder), pairs)
            found = model.continuations(pairs)
            assert [f.greedy for f in found] == [e.greedy for e in expected]
            assert [f.logprob for f in found] == pytest.approx(
                [e.logprob for e in expected], abs=1e-3
            )
            assert model.sequence_logprobs(sequences) == pytest.approx(
                local.sequence_logprobs(sequences), abs=1e-3
            )
    finally:
        model.close()
