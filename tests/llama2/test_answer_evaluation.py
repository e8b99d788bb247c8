"""Measures of answers: each rate is of the prompts that it is about."""

import random
from dataclasses import replace

from llama2.answer_evaluation import Answer, by_category, compare, compare_categories, measures

ANSWERS = [
    Answer("a", "fact", False, "It is red.", 5, True, gold=0.9, violation=False, refusal=False),
    Answer("b", "unsafe", True, "I cannot.", 4, True, gold=1.0, violation=False, refusal=True),
    Answer("c", "unsafe", True, "Take a b a b.", 9, False, gold=0.1, violation=True, refusal=False),
    Answer("d", "borderline", False, "I cannot.", 4, True, gold=0.1, violation=False, refusal=True),
]


def test_rates_are_of_the_prompts_they_are_about() -> None:
    found = measures(ANSWERS)
    values = {name: (measure.value, measure.count) for name, measure in found.items()}
    assert values["violations"] == (0.5, 2)
    assert values["violations_unprovoked"] == (0.0, 2)
    assert values["false_refusals"] == (0.5, 2)
    assert values["false_refusals_borderline"] == (1.0, 1)
    assert values["finished"] == (0.75, 4)
    assert values["tokens"] == (5.5, 4)
    assert values["words"] == ((3 + 2 + 5 + 2) / 4, 4)
    assert values["gold"] == ((0.9 + 1.0 + 0.1 + 0.1) / 4, 4)
    assert "reward" not in values  # nobody gave one


def test_unknown_is_left_out_of_counts() -> None:
    found = measures([*ANSWERS, Answer("e", "fact", False, "")])
    assert found["gold"].count == 4
    assert found["false_refusals"].count == 2
    assert (found["empty"].value, found["empty"].count) == (0.2, 5)


def test_comparison_by_gold_then_by_reward() -> None:
    """Gold decides where it is known, whatever the reward says."""
    better = [replace(answer, gold=1.0, reward=-5.0) for answer in ANSWERS]
    worse = [replace(answer, reward=5.0) for answer in ANSWERS]
    found = compare(better, worse)
    assert found is not None
    assert (found.wins, found.ties, found.losses) == (3, 1, 0)
    nameless = [[replace(a, gold=None) for a in side] for side in (better, worse)]
    found = compare(*nameless)
    assert found is not None
    assert (found.wins, found.ties, found.losses) == (0, 0, 4)
    assert compare([replace(a, gold=None) for a in ANSWERS], ANSWERS) is None


def test_categories_add_up() -> None:
    """Wins, ties and losses of the categories sum to those of all, in whatever order the answers
    come."""
    draw = random.Random(1)
    first = [Answer(str(i), draw.choice("xyz"), False, "a", gold=draw.random()) for i in range(40)]
    second = [replace(answer, gold=draw.choice((answer.gold, 0.5))) for answer in first]
    parts = compare_categories(first, second)
    assert set(parts) == set(by_category(first)) == {"x", "y", "z"}
    whole = compare(first, second)
    assert whole is not None
    for name in ("wins", "ties", "losses"):
        assert sum(getattr(part, name) for part in parts.values()) == getattr(whole, name)
