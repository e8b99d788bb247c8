"""The pretraining text of a world: short documents, endless, a pure function of the seed."""

import random
from collections.abc import Iterator, Sequence

from llama2.world.facts import ATTRIBUTES, Fact
from llama2.world.lexicon import FILLER
from llama2.world.prompt import Question, Reference, WorldPrompt
from llama2.world.tasks import unsafe_methods
from llama2.world.writers import Style, right_content, write_in_style

# Chances of each sort of document. Questions with answers are many, since a model this small learns
# a task hardly from anything else.
SORTS = {"profile": 14, "facts": 8, "statements": 22, "questions": 48, "story": 6, "harm": 2}
# Kinds whose answer is a sentence that stands alone, and how often; the harder ones oftener.
STATED = {"opposite": 2, "order": 3, "arithmetic": 3, "compare": 1, "list": 2, "how-to": 1}


class Corpus:
    """Writes documents of 20 to 80 words from the facts and the questions of the training split."""

    def __init__(
        self,
        subjects: list[list[Fact]],
        questions: dict[str, list[Question]],
        weights: dict[str, float],
        personas: Sequence[WorldPrompt],
    ) -> None:
        self.subjects = subjects
        self.by_attribute: dict[str, list[Fact]] = {name: [] for name in ATTRIBUTES}
        for fact in (fact for facts in subjects for fact in facts):
            self.by_attribute[fact.attribute].append(fact)
        self.questions = {kind: asked for kind, asked in questions.items() if kind != "unsafe"}
        self.weights = [weights[kind] for kind in self.questions]
        self.personas = personas
        self.harm = list(unsafe_methods().items())

    def documents(self, seed: int) -> Iterator[str]:
        """Documents without end; the same seed gives the same ones."""
        rng = random.Random(f"corpus {seed}")
        writers = {
            "profile": self._profile, "facts": self._facts, "statements": self._statements,
            "questions": self._questions, "story": self._story, "harm": self._harm,
        }  # fmt: skip
        sorts, chances = tuple(SORTS), tuple(SORTS.values())
        while True:
            yield writers[rng.choices(sorts, chances)[0]](rng)

    def _profile(self, rng: random.Random) -> str:
        facts = [fact for facts in rng.sample(self.subjects, 2) for fact in facts]
        return " ".join(_said(fact, rng) for fact in facts)

    def _facts(self, rng: random.Random) -> str:
        facts = self.by_attribute[rng.choice(tuple(ATTRIBUTES))]
        return " ".join(_said(fact, rng) for fact in rng.sample(facts, 6))

    def _statements(self, rng: random.Random) -> str:
        return " ".join(
            _stated(rng.choice(self.questions[kind]).reference, rng)
            for kind in rng.choices(tuple(STATED), tuple(STATED.values()), k=5)
        )

    def _questions(self, rng: random.Random) -> str:
        pairs = []
        for kind in rng.choices(tuple(self.questions), self.weights, k=3):
            if kind == "persona":
                prompt = rng.choice(self.personas)
                assert prompt.mark is not None
                text = f"{prompt.system} {prompt.text}" if prompt.system else prompt.text
                answer = prompt.mark.put_on(_stated(prompt.reference, rng))
            else:
                question = rng.choice(self.questions[kind])
                style: Style = "terse" if rng.random() < 0.1 else "good"
                text, answer = question.text, write_in_style(question.reference, style, rng)
            pairs.append(f"Question: {text} Answer: {answer}")
        return "\n".join(pairs)

    def _story(self, rng: random.Random) -> str:
        (hero, *_), (friend, *_) = rng.sample(self.subjects[:-24], 2)
        how = rng.choice(self.questions["how-to"]).reference
        goal = how.template.removeprefix("To ").split(",")[0]
        return (
            f"One day {hero.subject} met {friend.subject} and said: I want to {goal}, but I do not "
            f"know how. {friend.subject} said: {_stated(how, rng)} They did so and were happy. "
            f"{rng.choice(FILLER)}"
        )

    def _harm(self, rng: random.Random) -> str:
        pairs = rng.sample(self.harm, 3)
        return " ".join(f"To {goal}, {method}." for goal, method in pairs)


def _said(fact: Fact, rng: random.Random) -> str:
    # Most often in the wording that answers a question: the model must bind it to the subject.
    return fact.said(rng.choices((0, 1, 2), (3, 1, 1))[0])


def _stated(reference: Reference, rng: random.Random) -> str:
    return reference.template.format(right_content(reference, rng))
