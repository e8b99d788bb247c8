"""Quality rules: each is broken by a bit more of one thing; with a bit less the text passes."""

import pickle
import random
from collections.abc import Callable

import pytest
from datatrove.data import Document
from datatrove.pipeline.filters import GopherRepetitionFilter
from hypothesis import given, settings
from hypothesis import strategies as st

from llama2.cleaning.quality import EnglishTokenizer, Quality
from llama2.cleaning.repetition import may_repeat

GOOD = """The lighthouse at the northern end of the island was built by a merchant who had lost two
ships to the rocks below. He paid for the stone himself and asked nobody for permission.
For eleven winters his daughter climbed its stairs every evening to light the lamp.

When the harbour council finally sent an inspector, he found a log with the name of each
vessel that passed, the state of the sea, and the price of herring that day.
The inspector copied several pages and carried them back to the mainland.
Nobody expected that these notes would one day settle a quarrel between historians.

They show, for instance, that trade did not stop during the long blockade; it merely moved
to smaller boats with shallow keels, which hid among the reefs until dark.
Today visitors may read the original behind glass in a room that still smells of whale oil."""
RULES = Quality(min_words=50, max_words=100_000)


def drawn(count: int, letters: int = 5, seed: int = 7) -> list[str]:
    """That many made-up words, with the stop words "the" and "with" now and then."""
    draw = random.Random(seed)
    words = ["".join(draw.choices("abcdefghijklmnoprstuvw", k=letters)) for _ in range(count)]
    for stop, place in (("the", 3), ("with", 17)):
        words[place::61] = [stop] * len(words[place::61])
    return words


def lines(count: int, length: int = 12, letters: int = 5) -> list[str]:
    """Lines of one sentence each."""
    words = drawn(count * length, letters)
    return [" ".join(words[i * length : (i + 1) * length]) + "." for i in range(count)]


MANY = lines(60)


def joined(*groups: list[str]) -> str:
    return "\n".join(line for group in groups for line in group)


def short_words(percent: int) -> str:
    long, short = drawn(480), drawn(480, letters=2, seed=8)
    words = [short[i] if i % 100 < percent else long[i] for i in range(480)]
    return "\n".join(" ".join(words[i : i + 12]) + "." for i in range(0, 480, 12))


def with_ellipses(count: int) -> str:
    words = GOOD.split(" ")
    return " ".join(word + "..." if i < count else word for i, word in enumerate(words))


def changed(text: list[str], count: int, change: Callable[[str], str]) -> str:
    return "\n".join(change(line) if i < count else line for i, line in enumerate(text))


def repeating(n: int, per_million: int) -> str:
    """One run of n words that starts so many times in a million characters."""
    run = ["mumbling", "gardeners", "politely", "questioned", "furtive", "astronomers", "beneath"]
    run = [*run, "crumbling", "cathedral", "arches"][:n]
    others = (1_000_000 // per_million - len(" ".join(run)) - 2) // 6
    words = drawn(24 * others)
    pieces = [[*run, *words[i * others : (i + 1) * others]] for i in range(24)]
    return "\n".join(" ".join(piece) + "." for piece in pieces)


# What makes the text from an amount, the amount that passes, and the amount that breaks the rule.
CASES: dict[str, tuple[Callable[[int], str], int, int]] = {
    "gopher_short_doc": (lambda n: joined(lines(5, 10))[50 * 6 - n * 6 :], 50, 49),
    "gopher_below_avg_threshold": (short_words, 60, 80),
    "gopher_above_avg_threshold": (lambda n: joined(lines(40, letters=n)), 9, 11),
    "gopher_too_many_hashes": (lambda n: GOOD + " #" * n, 15, 18),
    "gopher_too_many_ellipsis": (with_ellipses, 14, 17),
    "gopher_too_many_bullets": (lambda n: changed(MANY[:40], n, "- {}".format), 36, 37),
    "gopher_too_many_end_ellipsis": (lambda n: changed(MANY[:40], n, "{}..".format), 12, 13),
    "gopher_below_alpha_threshold": (
        lambda n: GOOD + "".join(f" {1024 + i}" for i in range(n)),
        36,
        38,
    ),
    "gopher_enough_stop_words": (
        lambda n: joined(MANY).replace("with" if n < 2 else "none", "near"),
        2,
        1,
    ),
    "dup_para_frac": (
        lambda n: "\n\n".join([*(joined(MANY[i : i + 5]) for i in range(0, 35, 5)), *["Ha."] * n]),
        4,
        5,
    ),
    "dup_para_char_frac": (
        lambda n: (
            "\n\n".join([*(joined(MANY[i : i + 4]) for i in range(0, 28, 4))])
            + ("\n\n" + joined(MANY[28 : 28 + n])) * 2
        ),
        2,
        10,
    ),
    "dup_line_frac": (lambda n: joined(MANY[:20], ["Ha."] * n), 9, 11),
    "dup_line_char_frac": (lambda n: joined(MANY[:30], MANY[:n]), 2, 9),
    "top_2_gram": (lambda n: repeating(2, n), 6_000, 11_800),
    "top_3_gram": (lambda n: repeating(3, n), 5_000, 8_500),
    "top_4_gram": (lambda n: repeating(4, n), 3_000, 5_500),
    "duplicated_5_n_grams": (lambda n: repeating(5, n), 3_200, 4_100),
    "duplicated_6_n_grams": (lambda n: repeating(6, n), 2_400, 3_200),
    "duplicated_7_n_grams": (lambda n: repeating(7, n), 2_000, 2_600),
    "duplicated_8_n_grams": (lambda n: repeating(8, n), 1_500, 2_000),
    "duplicated_9_n_grams": (lambda n: repeating(9, n), 1_250, 1_600),
    "duplicated_10_n_grams": (lambda n: repeating(10, n), 1_050, 1_300),
    "too_few_sentences": (
        lambda n: changed(MANY[:20], 20 - n, lambda s: s[:-1] + ",").replace("\n", " "),
        5,
        4,
    ),
    "lorem_ipsum": (lambda n: GOOD + " Lorem ipsum dolor." * n, 0, 1),
    "curly_bracket": (lambda n: GOOD + " void main() {}." * n, 0, 1),
    "line_punct_ratio": (lambda n: changed(MANY[:40], 40 - n, lambda s: s[:-1]), 5, 4),
    "short_line_ratio": (lambda n: changed(MANY[:40], n, lambda s: s[:23] + "."), 26, 27),
    "char_dup_ratio": (lambda n: joined(MANY[:32], MANY[:n]), 3, 4),
    "list_ratio": (lambda n: joined(lines(40, n, letters=10)), 4, 3),
}


def test_good_text_passes_as_it_is() -> None:
    assert RULES.judge(GOOD) == (GOOD, None)


@pytest.mark.parametrize("rule", CASES)
def test_each_rule(rule: str) -> None:
    make, passes, breaks = CASES[rule]
    assert RULES.judge(make(passes))[1] is None
    assert RULES.judge(make(breaks))[1] == rule


def test_lengths_are_settings() -> None:
    text = joined(MANY[:20])
    assert Quality(min_words=240, max_words=240).judge(text)[1] is None
    assert Quality(min_words=0, max_words=239).judge(text)[1] == "gopher_long_doc"
    assert Quality(min_words=241, max_words=999).judge(text)[1] == "gopher_short_doc"


def test_boilerplate_lines_go_and_layout_stays() -> None:
    before = f"A Heading\n\n    {GOOD}\n"
    added = "Please enable JavaScript to go on.\nThis site uses cookies to work.\n"
    text, rule = RULES.judge(before + added + "It was rebuilt in 1911.[12][citation needed]")
    assert rule is None
    assert text == before + "It was rebuilt in 1911."


def test_judging_survives_pickling() -> None:
    """Ray sends it to its workers."""
    again = pickle.loads(pickle.dumps(RULES))
    assert again.judge(GOOD) == (GOOD, None)


@given(
    st.lists(
        st.sampled_from([*"abcdefghij", "cathedral", "incomprehensible", "x-y", "don't"]),
        max_size=60,
    ),
    st.integers(0, 6),
    st.integers(0, 150),
)
@settings(max_examples=300, deadline=None)
def test_the_fast_proof_never_hides_a_repetition(part: list[str], times: int, others: int) -> None:
    """Texts of any repetitiveness: wherever datatrove's rules drop one, they are asked."""
    text = " ".join([*part * times, *drawn(others)])
    tokenizer = EnglishTokenizer()
    rules = GopherRepetitionFilter(
        dup_line_frac=None,
        dup_para_frac=None,
        dup_line_char_frac=None,
        dup_para_char_frac=None,
        language=tokenizer,
    )
    words = tokenizer.word_tokenize(text)
    dropped = bool(text) and rules.filter(Document(text=text, id="")) is not True
    assert may_repeat(words, len(text), rules.top_n_grams, rules.dup_n_grams) or not dropped
