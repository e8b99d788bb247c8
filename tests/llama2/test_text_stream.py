"""Text that comes token by token: whole characters, stop strings, the same however it is cut."""

from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Fast

from llama2.text_stream import LONGEST_WAIT, TextStream
from llama2.tokenizer import HuggingFaceTokenizer, Tokenizer, load_tokenizer, train_tokenizer

TEXT = "the cat dog sees hears green red house garden in and who is not there"


@pytest.fixture(scope="module", params=["sentencepiece", "transformers", "byte-level"])
def tokenizer(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Tokenizer:
    """The same vocabulary read by both libraries, and one of bytes alone, as Llama 3's is."""
    folder = tmp_path_factory.mktemp("tokenizer")
    if request.param == "byte-level":
        return byte_level(folder)
    words = TEXT.split()
    lines = [" ".join(words[(i * j) % len(words)] for j in range(1, 9)) for i in range(300)]
    found = train_tokenizer(lines, 310, folder)
    return found if request.param == "sentencepiece" else HuggingFaceTokenizer(folder)


def byte_level(folder: Path) -> Tokenizer:
    """Every byte is a token, and so are the two halves of a word: "ca" and "t is"."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*alphabet, "ca"]
    fast = Fast(models.BPE({piece: i for i, piece in enumerate(pieces)}, [("c", "a")]))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens([AddedToken("<end>", special=True)])
    fast.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<end>"}'
    )
    return load_tokenizer(folder)


def streamed(
    tokenizer: Tokenizer, tokens: Sequence[int], stop: Sequence[str] = (), trim: bool = False
) -> tuple[list[str], bool]:
    stream = TextStream(tokenizer, stop, trim)
    return [*map(stream.add, tokens), stream.close()], stream.stopped


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(text=st.text(st.characters(exclude_characters="\ufffd", exclude_categories=["Cs"])))
def test_any_text_comes_back_in_whole_characters(tokenizer: Tokenizer, text: str) -> None:
    # Behind a word, as an answer is, so that SentencePiece's own first space is none of the text.
    tokens = tokenizer.encode("x" + text)[len(tokenizer.encode("x")) :]
    if tokenizer.encode("x" + text) != [*tokenizer.encode("x"), *tokens]:
        return  # "x" joined what follows
    parts, _ = streamed(tokenizer, tokens)
    assert "".join(parts) == text
    assert not any("\ufffd" in part for part in parts)


def test_words_keep_the_space_before_them(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode("x the cat")[len(tokenizer.encode("x")) :]
    assert "".join(streamed(tokenizer, tokens)[0]) == " the cat"
    assert "".join(streamed(tokenizer, tokens, trim=True)[0]) == "the cat"


def test_half_a_character_waits_and_garbage_does_not_wait_for_ever(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode("x€")[len(tokenizer.encode("x")) :]
    assert len(tokens) == 3
    assert streamed(tokenizer, tokens)[0] == ["", "", "€", ""]
    assert "".join(streamed(tokenizer, tokens[:2])[0]).strip("\ufffd") == ""
    stream = TextStream(tokenizer)
    parts = [stream.add(tokens[1]) for _ in range(2 * LONGEST_WAIT)]
    assert sum(map(len, parts)) == 2 * LONGEST_WAIT
    assert all(set(part) <= {"\ufffd"} for part in parts)


@pytest.mark.parametrize(
    ("stop", "expected", "stops"),
    [
        (["cat"], "the ", True),
        (["t sees"], "the ca", True),
        (["e c", "sees"], "th", True),
        (["s the dog", "sees th"], "the cat ", True),
        (["the cat sees the dog!"], "the cat sees the dog", False),
        (["dogs", "ogr", "g "], "the cat sees the dog", False),
        ([" the dog"], "the cat sees", True),
    ],
)
def test_stop_strings(tokenizer: Tokenizer, stop: list[str], expected: str, stops: bool) -> None:
    tokens = tokenizer.encode("x the cat sees the dog")[len(tokenizer.encode("x")) :]
    parts, stopped = streamed(tokenizer, tokens, stop, trim=False)
    assert "".join(parts) == " " + expected
    assert stopped is stops
    parts, stopped = streamed(tokenizer, tokens, stop, trim=True)
    assert "".join(parts) == expected.strip()
    assert stopped is stops


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    text=st.text("ab \n", max_size=12),
    stop=st.lists(st.text("ab \n", min_size=1, max_size=4), max_size=2),
    trim=st.booleans(),
)
def test_stop_strings_as_a_search_finds_them(
    tokenizer: Tokenizer, text: str, stop: list[str], trim: bool
) -> None:
    """Every token of these texts is a character or two, so the first stop string to be complete is
    found by looking at ever longer beginnings."""
    before = tokenizer.encode("x")
    tokens = tokenizer.encode("x" + text)[len(before) :]
    if tokenizer.encode("x" + text) != [*before, *tokens]:
        return
    expected, stops = text, False
    for end in range(len(tokens) + 1):
        seen = "".join(streamed(tokenizer, tokens[:end])[0])
        places = [seen.find(s) for s in stop if s in seen]
        if places:
            expected, stops = seen[: min(places)], True
            break
    parts, stopped = streamed(tokenizer, tokens, stop, trim)
    assert "".join(parts) == (expected.strip() if trim else expected)
    assert stopped is stops


def test_what_may_become_a_stop_string_is_held_back(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode("x the cat sees")[len(tokenizer.encode("x")) :]
    stream = TextStream(tokenizer, ["cat sees the"])
    shown = "".join(map(stream.add, tokens))
    assert shown == " the "
    assert stream.close() == "cat sees"
    assert not stream.stopped


def test_control_tokens_are_no_text(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode("x cat")[len(tokenizer.encode("x")) :]
    parts, _ = streamed(tokenizer, [*tokens, tokenizer.eos_id, tokenizer.vocab_size + 3])
    assert "".join(parts) == " cat"
