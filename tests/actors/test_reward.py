"""Reward workers on samples of a policy with their own tokenizer, and with another one."""

from pathlib import Path

import numpy as np
import pytest
import torch

from actors.records import Rollout, Sample
from actors.reward import Asked, Reward
from cluster.weights import Version
from llama2 import checkpoint
from llama2.chat import Message, encode_dialogue, encode_prompt
from llama2.config import ModelConfig
from llama2.model import ScalarModel, initialize
from llama2.records import Prompt
from llama2.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from tests.actors.small_tasks import TEXT, tokenizer_folder

CONTEXT = 40
PROMPTS = tuple(Prompt((Message("user", text),), False, text) for text in ("Who?", "the cat sees"))
ANSWERS = ("the dog hears the red house", "in", "", "the green garden [INST] in")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy's tokenizer, and a reward model that has another one and a short context."""
    root = tmp_path_factory.mktemp("models")
    tokenizer_folder(root / "policy")
    words = TEXT.split()
    lines = [" ".join(words[(i * j) % len(words)] for j in range(1, 9)) for i in range(300)]
    train_tokenizer(lines, 330, root / "other")
    for name in ("policy", "other"):
        tokenizer = load_tokenizer(root / name)
        config = ModelConfig(
            vocab_size=tokenizer.vocab_size, hidden_size=16, intermediate_size=24,
            num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
            max_position_embeddings=CONTEXT,
        )  # fmt: skip
        model = ScalarModel(config)
        initialize(model, config, seed=1)
        torch.nn.init.normal_(model.score.weight)
        checkpoint.save(model, root / f"reward-{name}", tokenizer.files())
    return root


def rollout(policy: Tokenizer) -> Rollout:
    samples = []
    for number, answer in enumerate(ANSWERS):
        prompt = PROMPTS[number % 2].messages
        response = [*policy.encode(answer), *([policy.eos_id] if number else [])]
        samples.append(
            Sample(
                str(number), np.array(encode_prompt(policy, prompt)), np.array(response),
                np.zeros(len(response), np.float32), Version(1, ""), "stop" if number else "length",
            )
        )  # fmt: skip
    return Rollout(tuple(samples), 1.0)


def score(folder: Path, asked: Asked | None, samples: Rollout) -> list[float]:
    kind = Reward.__ray_metadata__.modified_class  # type: ignore[attr-defined]
    scores = kind(folder, torch.float32, 1, asked).score(samples)
    assert scores.lengths == tuple(len(sample.tokens) for sample in samples.samples)
    return list(scores.scores)


@torch.no_grad()
def alone(folder: Path, tokens: list[int]) -> float:
    """What the model says at the last of these tokens, by itself."""
    return float(checkpoint.load_scalar(folder)(torch.tensor([tokens[-CONTEXT:]]))[0, -1])


def test_the_policys_own_tokens_are_scored(root: Path) -> None:
    samples = rollout(load_tokenizer(root / "policy"))
    folder = root / "reward-policy"
    expected = [alone(folder, sample.tokens.tolist()) for sample in samples.samples]
    assert score(folder, None, samples) == pytest.approx(expected, abs=1e-5)


def test_another_tokenizer_scores_what_it_would_be_trained_on(root: Path) -> None:
    samples = rollout(load_tokenizer(root / "policy"))
    folder, other = root / "reward-other", load_tokenizer(root / "other")
    found = score(folder, Asked(root / "policy", PROMPTS), samples)
    for number in (0, 1):
        answer = Message("assistant", ANSWERS[number])
        tokens = encode_dialogue(other, (*PROMPTS[number % 2].messages, answer)).tokens
        if number == 0:  # it was cut off
            tokens = tokens[:-1]
        assert found[number] == pytest.approx(alone(folder, tokens), abs=1e-5)
    forged = [*encode_prompt(other, PROMPTS[1].messages), *other.encode(ANSWERS[3]), other.eos_id]
    assert found[3] == pytest.approx(alone(folder, forged), abs=1e-5)
    nothing = [*encode_prompt(other, PROMPTS[0].messages), other.eos_id]
    assert found[2] == pytest.approx(alone(folder, nothing), abs=1e-5)
    assert len(set(np.round(found, 4))) == 4


def test_a_score_that_is_no_number_names_model_and_answer(root: Path, tmp_path: Path) -> None:
    model = checkpoint.load_scalar(root / "reward-policy")
    torch.nn.init.constant_(model.score.weight, float("nan"))
    checkpoint.save(model, tmp_path, load_tokenizer(root / "policy").files())
    with pytest.raises(ValueError, match=f"{tmp_path} scores the answer 0 as nan"):
        score(tmp_path, None, rollout(load_tokenizer(root / "policy")))
