"""Decontamination: thirteen words in a row are found, twelve are not, short texts as a whole."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama2.cleaning import Decontamination
from llama2.cleaning.words import ngram_hashes, normalized_words, word_hashes

QUESTION = (
    "A farmer has seventeen sheep and all but nine of them run away during the night; how many "
    "sheep does the farmer still have in the morning?"
)
WORDS = QUESTION.split()
EIGHT = "Which planet of our system is the largest?"
INDEX = Decontamination({"riddles": [QUESTION], "facts": [EIGHT, "Jupiter.", "In the year 1610"]})


def inside(words: list[str]) -> str:
    return "Before it stood other text, " + " ".join(words) + " and other text came after."


@pytest.mark.parametrize("start", range(len(WORDS) - 12))
def test_thirteen_words_hit_wherever_they_stand(start: int) -> None:
    assert INDEX.hit(inside(WORDS[start : start + 13])) == "riddles"


@pytest.mark.parametrize("start", range(len(WORDS) - 11))
def test_twelve_words_pass(start: int) -> None:
    assert INDEX.hit(inside(WORDS[start : start + 12])) is None
    around = [*WORDS[start : start + 12], "otherwise", *WORDS[start + 13 : start + 25]]
    assert INDEX.hit(inside(around)) is None


def test_case_punctuation_and_spaces_do_not_matter() -> None:
    assert INDEX.hit(QUESTION.upper().replace(" ", " -- \n")) == "riddles"
    composed, decomposed = "é", "é"
    text = " ".join(f"caf{composed}{i}" for i in range(13))
    assert Decontamination({"b": [text]}).hit(text.replace(composed, decomposed)) == "b"


def test_numbers_matter() -> None:
    """One arithmetic problem is not another."""
    problem = "What is 17 plus 25 if you add them one after the other slowly?"
    index = Decontamination({"sums": [problem]})
    assert index.hit(problem) == "sums"
    assert index.hit(problem.replace("17", "18")) is None


def test_short_texts() -> None:
    """Of 8 to 12 words anywhere, but whole; of fewer only where there is nothing else."""
    assert INDEX.hit(inside(EIGHT.split())) == "facts"
    assert INDEX.hit(inside(EIGHT.split()[:7])) is None
    assert INDEX.hit("jupiter") == INDEX.hit("in the year 1610!") == "facts"
    assert INDEX.hit("Jupiter is large.") is None
    assert INDEX.hit("It was in the year 1610.") is None
    assert INDEX.hit("") is INDEX.hit("...") is None


def test_the_first_of_benchmarks_that_share_a_text_is_named() -> None:
    assert Decontamination({"b": [QUESTION], "a": [QUESTION]}).hit(QUESTION) == "b"


def test_saved_bytes_are_those_of_the_benchmarks(tmp_path: Path) -> None:
    INDEX.save(tmp_path / "one")
    texts = ["In the year 1610", "Jupiter.", EIGHT, EIGHT]
    Decontamination({"riddles": iter([QUESTION]), "facts": iter(texts)}).save(tmp_path / "two")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    loaded = Decontamination.load(tmp_path / "one")
    assert loaded.names == ["riddles", "facts"]
    assert loaded.hit(inside(WORDS[3:16])) == "riddles"
    assert loaded.hit("Jupiter") == "facts"
    assert loaded.hit(inside(WORDS[3:15])) is None
    assert [path.name for path in tmp_path.iterdir() if "part" in path.name] == []


def test_bad_files_and_benchmarks_are_named(tmp_path: Path) -> None:
    path = tmp_path / "index"
    for damage in (b"", b"text", b"PK\x03\x04 cut off"):
        path.write_bytes(damage)
        with pytest.raises(ValueError, match=f"{path} is not an index of benchmarks"):
            Decontamination.load(path)
    INDEX.save(path)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ValueError, match="is not an index of benchmarks"):
        Decontamination.load(path)
    with pytest.raises(FileNotFoundError):
        Decontamination.load(tmp_path / "absent")
    with pytest.raises(ValueError, match="benchmark empty holds no words"):
        Decontamination({"good": [QUESTION], "empty": ["", "?!"]})


@given(
    st.lists(st.sampled_from("abcd"), max_size=40), st.lists(st.sampled_from("abcd"), max_size=40)
)
@settings(max_examples=200, deadline=None)
def test_hits_are_those_of_a_plain_search(benchmark: list[str], document: list[str]) -> None:
    if not benchmark:
        return
    n = min(13, len(benchmark))
    runs = {tuple(benchmark[i : i + n]) for i in range(len(benchmark) - n + 1)}
    found = {tuple(document[i : i + n]) for i in range(len(document) - n + 1)}
    expected = bool(runs & found) and (n >= 8 or n == len(document))
    hit = Decontamination({"b": [" ".join(benchmark)]}).hit(" ".join(document))
    assert hit == ("b" if expected else None)


def test_hashes_of_runs_against_big_integers() -> None:
    """The same numbers as the definition gives with Python's integers."""
    hashes = word_hashes(normalized_words(QUESTION))
    mask = 2**64 - 1
    for n in (1, 5, 13):
        expected = []
        for start in range(len(hashes) - n + 1):
            value = n
            for word in hashes[start : start + n].tolist():
                value = (value * 0x9E3779B97F4A7C15 + word) & mask
            value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & mask
            value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & mask
            expected.append(value ^ (value >> 31))
        assert ngram_hashes(hashes, n).tolist() == expected
    assert len(ngram_hashes(hashes, len(hashes) + 1)) == 0


def test_scripts_without_spaces_have_words_of_one_character() -> None:
    assert normalized_words("中文字 und C3PO_x don’t") == [
        *"中文字",
        "und",
        "c3po",
        "x",
        "don",
        "t",
    ]
