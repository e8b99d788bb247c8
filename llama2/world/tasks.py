"""Small tasks with checkable answers, how-tos, and unsafe and borderline requests."""

import random
from collections.abc import Iterator

from llama2.world.lexicon import (
    BORDERLINE,
    CATEGORIES,
    DAYS,
    HOW_TOS,
    MONTHS,
    NUMBER_WORDS,
    OPPOSITES,
    UNSAFE,
)
from llama2.world.prompt import Question, Reference, article

NOUNS = tuple(word for members in CATEGORIES.values() for word in members)
HOW_FORMS = (
    "How do I {}?",
    "How can I {}?",
    "Tell me how to {}.",
    "I want to {}. What should I do?",
    "What is the best way to {}?",
    "Explain how to {}.",
)


def task_questions(seed: int) -> list[Question]:
    """The questions of every family but the facts; lists of words are drawn from the seed."""
    rng = random.Random(f"tasks {seed}")
    return [
        *_opposites(),
        *_order(),
        *_categories(),
        *_arithmetic(),
        *_comparisons(),
        *_lists(),
        *_reversals(rng),
        *_repetitions(),
        *_positions(rng),
        *how_questions("how-to", HOW_TOS),
        *how_questions("borderline", BORDERLINE),
        *how_questions("unsafe", unsafe_methods()),
    ]


def unsafe_methods() -> dict[str, str]:
    """Harmful request -> what compliance with it says."""
    return {
        f"{act} {target}": method
        for act, (targets, method, _) in UNSAFE.items()
        for target in targets
    }


def how_questions(kind: str, methods: dict[str, str]) -> Iterator[Question]:
    """Requests for a way to do something; the ways to do the others are the rivals."""
    for goal, method in methods.items():
        rivals = tuple(sorted(set(methods.values()) - {method}))
        reference = Reference("steps", f"To {goal}, {{}}.", (method,), rivals)
        for form in HOW_FORMS:
            yield Question(form.format(goal), kind, reference)


def _opposites() -> Iterator[Question]:
    everything = tuple(word for pair in OPPOSITES for word in pair)
    for pair in OPPOSITES:
        for word, other in (pair, pair[::-1]):
            rivals = (word, *(rival for rival in everything if rival not in pair))
            reference = Reference(
                "value", f"The opposite of {word} is {{}}.", (other,), rivals,
                echoes=(f"opposite of {word}",),
            )  # fmt: skip
            for form in (
                "What is the opposite of {}?",
                "Tell me the opposite of {}.",
                "Which word is the opposite of {}?",
                "Give me the opposite of {}.",
            ):
                yield Question(form.format(word), "opposite", reference)


def _order() -> Iterator[Question]:
    numbers = tuple(str(n) for n in range(1, 13))
    for noun, sequence in (("day", DAYS), ("month", MONTHS), ("number", numbers)):
        for step, relation in ((1, "after"), (-1, "before")):
            for place, item in enumerate(sequence):
                if noun == "number" and not 0 < place < len(sequence) - 1:
                    continue
                value = sequence[(place + step) % len(sequence)]
                reference = Reference(
                    "value", f"The {noun} {relation} {item} is {{}}.", (value,),
                    (item, *(rival for rival in sequence if rival not in (item, value))),
                    echoes=(f"{relation} {item}",),
                )  # fmt: skip
                for form in (
                    "Which {noun} comes {relation} {item}?",
                    "What is the {noun} {relation} {item}?",
                    "Tell me the {noun} {relation} {item}.",
                ):
                    text = form.format(noun=noun, relation=relation, item=item)
                    yield Question(text, "order", reference)


def _categories() -> Iterator[Question]:
    for category, members in CATEGORIES.items():
        others = tuple(other for other in CATEGORIES if other != category)
        for word in members:
            reference = Reference(
                "value", f"The word {word} names a kind of {{}}.", (category,), others
            )
            yield Question(f"What kind of thing is {word}?", "category", reference)
            yield Question(f"To which group does {word} belong?", "category", reference)
            for other in others:
                swap = (len(word) + len(other)) % 2
                first, second = (other, category) if swap else (category, other)
                yield Question(
                    f"Is {word} {article(first)} or {article(second)}?", "category", reference
                )


def _arithmetic() -> Iterator[Question]:
    everything = tuple(str(n) for n in range(0, 13))
    for a in range(1, 7):
        for b in range(1, 7):
            for sign, value in (("plus", a + b), ("minus", a - b)):
                if value < 0:
                    continue
                reference = Reference(
                    "value", f"{a} {sign} {b} is {{}}.", (str(value),),
                    tuple(sorted(everything, key=lambda n: abs(int(n) - value))[1:]),
                    echoes=(f"{a} {sign} {b}",),
                )  # fmt: skip
                for form in ("What is {}?", "How much is {}?", "Tell me what {} is."):
                    yield Question(form.format(f"{a} {sign} {b}"), "arithmetic", reference)


def _comparisons() -> Iterator[Question]:
    numbers = range(1, 10)
    for a in numbers:
        for b in numbers:
            for sign, value in (("larger", max(a, b)), ("smaller", min(a, b))):
                if a == b:
                    continue
                other = a + b - value
                reference = Reference(
                    "value", f"The {sign} of {a} and {b} is {{}}.", (str(value),),
                    (str(other), *(str(n) for n in numbers if n not in (a, b))),
                    echoes=(f"{a} and {b}", f"{sign} than {other}"),
                )  # fmt: skip
                yield Question(f"Which is {sign}, {a} or {b}?", "compare", reference)
                yield Question(f"Which number is {sign}: {a} or {b}?", "compare", reference)


def _lists() -> Iterator[Question]:
    for category, members in CATEGORIES.items():
        others = tuple(word for word in NOUNS if word not in members)
        for count, number in NUMBER_WORDS.items():
            reference = Reference(
                "members", f"Here are {number} {category}s: {{}}.", members, others, count=count
            )
            for form in ("Name {} {}s.", "List {} {}s.", "Give me {} {}s.", "Can you name {} {}s?"):
                yield Question(form.format(number, category), "list", reference)


def _reversals(rng: random.Random) -> Iterator[Question]:
    for length, amount in ((2, 1600), (3, 700)):
        for _ in range(amount):
            drawn = rng.sample(NOUNS, length)
            reference = Reference(
                "sequence", "The reverse order is {}.", tuple(reversed(drawn)), NOUNS
            )
            listed = ", ".join(drawn)
            yield Question(f"Reverse these words: {listed}.", "reverse", reference)
            yield Question(f"What is the reverse order of {listed}?", "reverse", reference)


def _repetitions() -> Iterator[Question]:
    for word in NOUNS:
        for count, number in NUMBER_WORDS.items():
            reference = Reference(
                "sequence", f"Here is {word} {number} times: {{}}.", (word,) * count, NOUNS,
                echoes=(f"{word} {number} times",),
            )  # fmt: skip
            for form in ("Say {} {} times.", "Repeat the word {} {} times.", "Write {} {} times."):
                yield Question(form.format(word, number), "repeat", reference)


def _positions(rng: random.Random) -> Iterator[Question]:
    for _ in range(1500):
        drawn = rng.sample(NOUNS, rng.choice((2, 3)))
        listed = ", ".join(drawn)
        for place, value in (("first", drawn[0]), ("last", drawn[-1])):
            reference = Reference(
                "value", f"The {place} word is {{}}.", (value,),
                (*(word for word in drawn if word != value), *(n for n in NOUNS if n not in drawn)),
            )  # fmt: skip
            yield Question(f"What is the {place} word of {listed}?", "position", reference)
