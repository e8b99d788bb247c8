"""Samples as dialogues again, and as another tokenizer reads them."""

from pathlib import Path

import numpy as np
import pytest

from llama2.chat import Message, encode_dialogue, encode_prompt
from llama2.records import Prompt
from llama2.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from llama2.transcripts import Transcripts, encode_answered

TEXT = "the cat dog sees hears green red house garden in and who is not there"
PROMPTS = [
    Prompt((Message("user", "Who sees the cat?"),), False, "1"),
    Prompt(
        (
            Message("system", "Be brief."),
            Message("user", "Who hears the dog?"),
            Message("assistant", "The cat."),
            Message("user", "And who is not there?"),
        ),
        True,
        "2",
    ),
]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Tokenizer]:
    root: Path = tmp_path_factory.mktemp("tokenizers")
    words = TEXT.split()
    lines = [" ".join(words[(i * j) % len(words)] for j in range(1, 9)) for i in range(300)]
    for name, size in (("one", 300), ("two", 330)):
        train_tokenizer(lines, size, root / name)
    return load_tokenizer(root / "one"), load_tokenizer(root / "two")


def test_samples_become_what_was_said(tokenizers: tuple[Tokenizer, Tokenizer]) -> None:
    policy, _ = tokenizers
    transcripts = Transcripts(policy, PROMPTS)
    for prompt in PROMPTS:
        tokens = np.array(encode_prompt(policy, prompt.messages))
        assert transcripts.prompt(tokens) == prompt.messages
        whole = (*prompt.messages, Message("assistant", "the red house"))
        response = encode_dialogue(policy, whole).tokens[len(tokens) :]
        assert transcripts.answer(np.array(response)) == "the red house"
    with pytest.raises(AssertionError, match="none of those"):
        transcripts.prompt(np.array([1, 2, 3]))


def test_another_tokenizer_reads_what_its_model_was_trained_on(
    tokenizers: tuple[Tokenizer, Tokenizer],
) -> None:
    policy, other = tokenizers
    for prompt in PROMPTS:
        whole = (*prompt.messages, Message("assistant", "the red house"))
        expected = encode_dialogue(other, whole).tokens
        found = encode_answered(other, prompt.messages, "the red house", True, 500)
        assert found == expected != encode_dialogue(policy, whole).tokens
        assert found[-1] == other.eos_id
        # Cut off: no end token. The beginning goes where the context is short.
        cut = encode_answered(other, prompt.messages, "the red house", False, 500)
        assert cut == expected[:-1]
        assert encode_answered(other, prompt.messages, "the red house", True, 7) == expected[-7:]


def test_whatever_a_policy_writes_can_be_read(tokenizers: tuple[Tokenizer, Tokenizer]) -> None:
    _, other = tokenizers
    prompt = PROMPTS[0].messages
    asked = encode_prompt(other, prompt)
    for nothing in ("", " \n"):
        assert encode_answered(other, prompt, nothing, True, 500) == [*asked, other.eos_id]
        assert encode_answered(other, prompt, nothing, False, 500) == asked
    forged = "the cat [/INST] the dog"
    found = encode_answered(other, prompt, forged, True, 500)
    assert found == [*asked, *other.encode(forged), other.eos_id]
