"""What a model's folder says of how to ask it."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from llama2.chat import Message, encode_prompt
from llama2.prompting import Prompting, TooLong, sample_seed
from llama2.tokenizer import load_tokenizer
from tests.actors.endpoint import CONTEXT, model_folder


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    shutil.copytree(original, tmp_path / "model")
    return tmp_path / "model"


def change(path: Path, **values: Any) -> None:
    before = json.loads(path.read_bytes()) if path.exists() else {}
    path.write_text(json.dumps(before | values))


def test_prompts_as_training_writes_them(folder: Path) -> None:
    found, tokenizer = Prompting.read(folder), load_tokenizer(folder)
    assert (found.context, found.vocab_size, found.stop_ids) == (CONTEXT, 310, (2,))
    assert found.encode_text("the cat") == [1, *tokenizer.encode("the cat")]
    messages = [Message("system", "in"), Message("user", "who")]
    assert found.encode_chat(messages) == encode_prompt(tokenizer, messages)
    assert found.check_ids([5, 309]) == [5, 309]


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        (3, None, (2, 3)),
        ([4, 3], None, (2, 3, 4)),
        (2, 7, (2, 7)),
        (2, [7, 8], (2, 7, 8)),
        (None, None, (2,)),
        ([2, 5000], None, (2,)),
    ],
)
def test_tokens_that_end_an_answer(
    folder: Path, config: Any, generation: Any, expected: tuple[int, ...]
) -> None:
    """The tokenizer's own is 2; ids that the model lacks can never come."""
    change(folder / "config.json", eos_token_id=config)
    if generation is not None:
        change(folder / "generation_config.json", eos_token_id=generation)
    assert Prompting.read(folder).stop_ids == expected


@pytest.mark.parametrize(
    "content", ["{", "[1]", '{"eos_token_id": "two"}', '{"eos_token_id": [1.5]}']
)
def test_a_generation_config_that_is_none(folder: Path, content: str) -> None:
    (folder / "generation_config.json").write_text(content)
    with pytest.raises(ValueError, match=r"generation_config.json cannot be read") as caught:
        Prompting.read(folder)
    assert "\n" not in str(caught.value)


def test_whether_there_is_a_chat_template(folder: Path) -> None:
    assert Prompting.read(folder).has_chat_template
    change(folder / "tokenizer_config.json", chat_template=None)
    assert not Prompting.read(folder).has_chat_template
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    assert Prompting.read(folder).has_chat_template


def test_prompts_that_cannot_be_asked(folder: Path) -> None:
    found = Prompting.read(folder)
    assert len(found.check_ids([5] * (CONTEXT - 1))) == CONTEXT - 1
    with pytest.raises(TooLong, match=f"has {CONTEXT} tokens, which leaves no room"):
        found.check_ids([5] * CONTEXT)
    with pytest.raises(TooLong, match="shorten it"):
        found.encode_chat([Message("user", "the cat " * 60)])
    for tokens in ([310], [-1]):
        with pytest.raises(ValueError, match="outside the vocabulary of 310"):
            found.check_ids(tokens)
    for empty in (lambda: found.encode_text(""), lambda: found.check_ids([])):
        with pytest.raises(ValueError, match="The prompt is empty"):
            empty()
    with pytest.raises(ValueError, match=re.escape("the user message contains the tag [INST]")):
        found.encode_chat([Message("user", "[INST]")])


def test_seeds_of_samples_do_not_meet() -> None:
    seeds = {
        sample_seed(seed, str(id), s) for seed in range(9) for id in range(9) for s in range(9)
    }
    assert len(seeds) == 9**3
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert sample_seed(1, "a", 0) == sample_seed(1, "a", 0)
    assert sample_seed(1, 1, 0) != sample_seed(1, "1", 0) != sample_seed(11, "", 0)
