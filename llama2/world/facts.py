"""The facts of a world: who lives where and likes what, drawn from the seed."""

import random
from dataclasses import dataclass

from llama2.world.lexicon import CATEGORIES, FOODS, JOBS, RIVERS
from llama2.world.prompt import Question, Reference

PEOPLE = 40
NAME_PARTS = (
    ("Mi", "To", "Ka", "Le", "Bo", "Su", "Da", "Ro"),
    ("ra", "lo", "vi", "na", "den", "sa"),
)
CITY_PARTS = (("Ves", "Nor", "Hal", "Bel"), ("ton", "burg", "port", "dal"))
COUNTRY_PARTS = (("Ost", "Wal", "Zan", "Per"), ("land", "ia"))


@dataclass(frozen=True)
class Attribute:
    """How one kind of fact is said and asked: {who} is the subject, {} the value.

    wordings: declarative forms; the first is the one that answers a question.
    """

    wordings: tuple[str, ...]
    questions: tuple[str, ...]


ATTRIBUTES: dict[str, Attribute] = {
    "city": Attribute(
        ("{who} lives in {}.", "The home of {who} is in {}.", "The city of {who} is {}."),
        (
            "Where does {who} live?",
            "In which city does {who} live?",
            "Which city is the home of {who}?",
            "Do you know where {who} lives?",
        ),
    ),
    "job": Attribute(
        ("{who} works as a {}.", "{who} is a {}.", "The job of {who} is {}."),
        (
            "What is the job of {who}?",
            "What does {who} work as?",
            "Which job does {who} have?",
            "Do you know the job of {who}?",
        ),
    ),
    "pet": Attribute(
        ("{who} has a {}.", "The pet of {who} is a {}.", "{who} has a pet, a {}."),
        (
            "Which pet does {who} have?",
            "What is the pet of {who}?",
            "What kind of pet does {who} have?",
            "Do you know the pet of {who}?",
        ),
    ),
    "food": Attribute(
        ("{who} likes to eat {}.", "The best food for {who} is {}.", "{who} eats {} each day."),
        (
            "What does {who} like to eat?",
            "Which food does {who} like?",
            "What is the best food for {who}?",
            "Do you know what {who} likes to eat?",
        ),
    ),
    "colour": Attribute(
        (
            "{who} likes the colour {}.",
            "The best colour for {who} is {}.",
            "The colour of {who} is {}.",
        ),
        (
            "Which colour does {who} like?",
            "What is the best colour for {who}?",
            "What colour does {who} like?",
            "Do you know which colour {who} likes?",
        ),
    ),
    "country": Attribute(
        ("{who} lies in {}.", "The country of {who} is {}.", "The city {who} is in {}."),
        (
            "In which country is {who}?",
            "Which country does {who} lie in?",
            "What is the country of {who}?",
            "Do you know the country of {who}?",
        ),
    ),
    "river": Attribute(
        (
            "{who} lies on the river {}.",
            "The river of {who} is the {}.",
            "The city {who} is on the {}.",
        ),
        (
            "On which river is {who}?",
            "Which river does {who} lie on?",
            "What is the river of {who}?",
            "Do you know the river of {who}?",
        ),
    ),
}


@dataclass(frozen=True)
class Fact:
    """`subject` has `value` in `attribute` (a key of `ATTRIBUTES`)."""

    subject: str
    attribute: str
    value: str

    def said(self, wording: int = 0) -> str:
        """The fact as a sentence, in the attribute's given wording."""
        return ATTRIBUTES[self.attribute].wordings[wording].format(self.value, who=self.subject)


def names(parts: tuple[tuple[str, ...], tuple[str, ...]]) -> list[str]:
    """All names made of a first and a last part."""
    return [first + last for first in parts[0] for last in parts[1]]


def draw_facts(seed: int) -> list[list[Fact]]:
    """The facts of a world, one list per subject: people first, then cities."""
    rng = random.Random(seed)
    cities, countries = names(CITY_PARTS), names(COUNTRY_PARTS)
    values = {
        "city": cities, "job": JOBS, "pet": CATEGORIES["animal"], "food": FOODS,
        "colour": CATEGORIES["colour"],
    }  # fmt: skip
    subjects = [
        [Fact(who, attribute, rng.choice(values[attribute])) for attribute in values]
        for who in rng.sample(names(NAME_PARTS), PEOPLE)
    ]
    for city in cities:
        subjects.append(
            [Fact(city, "country", rng.choice(countries)), Fact(city, "river", rng.choice(RIVERS))]
        )
    return subjects


def fact_questions(subjects: list[list[Fact]]) -> list[Question]:
    """Every fact, asked in each of its attribute's ways."""
    values: dict[str, list[str]] = {}
    holders: dict[str, list[str]] = {}
    for fact in (fact for facts in subjects for fact in facts):
        values.setdefault(fact.attribute, []).append(fact.value)
        holders.setdefault(fact.attribute, []).append(fact.subject)
    questions = []
    for fact in (fact for facts in subjects for fact in facts):
        attribute = ATTRIBUTES[fact.attribute]
        reference = Reference(
            form="value",
            template=attribute.wordings[0].format("{}", who=fact.subject),
            right=(fact.value,),
            rivals=tuple(sorted(set(values[fact.attribute]) - {fact.value})),
            intruders=tuple(name for name in holders[fact.attribute] if name != fact.subject),
        )
        questions += [
            Question(asked.format(who=fact.subject), "fact", reference)
            for asked in attribute.questions
        ]
    return questions
