"""A document through the whole of cleaning: its normal form, and why it is dropped."""

import gzip
import pickle
import time
from pathlib import Path

import ftfy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama2.cleaning import Cleaner, CleaningSettings, Decontamination, normalize
from tests.llama2.test_cleaning_quality import GOOD

TEXTS = Path(__file__).resolve().parents[3] / "shared/data/text"
PERSONS = " Ask john@mail.org, (415) 555-2671."


@pytest.mark.parametrize(
    ("raw", "normal"),
    [
        ("itâ€™s a cafÃ©", "it’s a café"),
        ("one\r\ntwo\rthree\u2028four", "one\ntwo\nthree\nfour"),
        ("fish &amp; chips &eacute;", "fish & chips é"),
        ("<b>fish &amp; chips</b>", "<b>fish &amp; chips</b>"),
        ("cafe\u0301 ﬁn “quoted” ＡＢ", "café ﬁn “quoted” ＡＢ"),
        ("nul\x00 bell\x07 \x1b[31mred\x1b[0m \ufefftext", "nul bell red text"),
        ("half \ud83d\ude00 lone \ud800", "half 😀 lone \ufffd"),
        ("\n\n  indented  \n\n\n\nnext\t\n \n", "  indented\n\nnext"),
    ],
)
def test_normal_form(raw: str, normal: str) -> None:
    assert normalize(raw) == normal


def test_what_dialogues_say_of_code_stays() -> None:
    code = "Write &amp;amp; or &lt;:\n\n\n\n    x = 1"
    assert normalize(code, as_prose=False) == code
    assert normalize("itâ€™s \x07here \n", as_prose=False) == "it’s here"


@given(st.text(st.sampled_from("ab &<>;#xé’\u0301\x00\x1b\r\n\t\u2028Ãâ€™\ud800[3m"), max_size=40))
@settings(max_examples=300, deadline=None)
def test_repairs_are_ftfys(text: str) -> None:
    """The shortcut for plain lines changes nothing: compare with ftfy alone on the whole text."""
    repairs = ftfy.TextFixerConfig(
        unescape_html="<" not in text,
        uncurl_quotes=False,
        fix_latin_ligatures=False,
        fix_character_width=False,
    )
    fixed = ftfy.fix_text(text, repairs)
    stripped = "\n".join(line.rstrip() for line in fixed.split("\n"))
    while "\n\n\n" in stripped:
        stripped = stripped.replace("\n\n\n", "\n\n")
    assert normalize(text) == stripped.strip("\n")
    normalize(text).encode()


def test_kept_and_dropped_with_the_reason() -> None:
    index = Decontamination({"tales": [GOOD[200:400]]})
    clean = Cleaner(CleaningSettings(), None).clean
    assert clean("\ufeff" + GOOD + "\r\n\r\n") == (GOOD, None, 0)
    assert clean(GOOD + PERSONS)[1:] == ("personal information", 2)
    assert clean(" \n\t")[1:] == ("empty", 0)
    assert clean("Too short.")[1:] == ("quality: gopher_short_doc", 0)
    assert Cleaner(CleaningSettings(), index).clean(GOOD)[1:] == ("contaminated: tales", 0)
    assert Cleaner(CleaningSettings(), index).clean(GOOD[:200] + GOOD[400:])[1:] == (None, 0)


def test_personal_details_per_thousand_words() -> None:
    """Just above the limit a document goes, just below it stays."""
    words = len((GOOD + PERSONS).split())
    rate = 2 / words * 1000
    for limit, reason in ((rate - 0.01, "personal information"), (rate + 0.01, None)):
        settings_ = CleaningSettings(max_personal=limit)
        assert Cleaner(settings_, None).clean(GOOD + PERSONS)[1:] == (reason, 2)
    assert Cleaner(CleaningSettings(max_personal=0), None).clean(GOOD).reason is None


def test_one_detail_does_not_drop_a_short_text_but_two_do() -> None:
    clean = Cleaner(CleaningSettings(quality=False), None).clean
    assert clean("Write to john@mail.org.")[1:] == (None, 1)
    assert clean("Write to john@mail.org or jane@mail.org.")[1:] == ("personal information", 2)


def test_switches() -> None:
    code = "int main() { return 0; }   "
    assert Cleaner(CleaningSettings(), None).clean(code).reason is not None
    off = Cleaner(CleaningSettings(quality=False, normalize=False), None)
    assert off.clean(code) == (code, None, 0)


def test_a_cleaner_survives_pickling_and_keeps_no_state() -> None:
    cleaner = Cleaner(CleaningSettings(), Decontamination({"tales": [GOOD[200:400]]}))
    texts = [GOOD, GOOD[:200] + GOOD[400:], GOOD + PERSONS, "short"]
    forward = [cleaner.clean(text) for text in texts]
    again = pickle.loads(pickle.dumps(cleaner))
    assert [again.clean(text) for text in reversed(texts)] == forward[::-1]


@pytest.mark.parametrize(
    "wrong",
    [
        {"min_words": 10, "max_words": 9},
        {"max_personal": -1.0},
        {"max_personal_source": 1.5},
        {"phone_regions": ("US", "Germany")},
    ],
)
def test_wrong_settings_are_named(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=f"cleaning.{next(iter(wrong))} .*; give"):
        CleaningSettings(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "unit", [".", '."', "[1", "&#", "Ã", "{", "- ", "a-", "\n", "\t", "a\n", "1."]
)
def test_time_grows_with_length_alone(unit: str) -> None:
    """No rule takes the square of a document's length: 200,000 characters, well below a second
    each, where a quadratic one would take minutes."""
    cleaner = Cleaner(CleaningSettings(), Decontamination({"tales": [GOOD]}))
    start = time.perf_counter()
    cleaner.clean(GOOD + unit * (200_000 // len(unit)) + "x")
    assert time.perf_counter() - start < 10


@pytest.mark.skipif(not TEXTS.is_dir(), reason="the shared texts are not there")
def test_real_prose_is_mostly_kept() -> None:
    """A play, with its short lines and the names of its speakers on each page."""
    play = gzip.decompress((TEXTS / "tinyshakespeare.txt.gz").read_bytes()).decode()
    blocks = [play[i : i + 8000] for i in range(0, 400_000, 8000)]
    cleaned = [Cleaner(CleaningSettings(), None).clean(block) for block in blocks]
    assert sum(one.personal for one in cleaned) == 0
    assert sum(one.reason is None for one in cleaned) >= 0.8 * len(blocks)
