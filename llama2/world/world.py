"""The synthetic world: prompts in two splits, a corpus, dialogues and comparisons."""

import random
import zlib
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Literal

from llama2.world.annotator import NOISE, Aspect, Comparison, annotate
from llama2.world.corpus import Corpus
from llama2.world.facts import draw_facts, fact_questions
from llama2.world.lexicon import FRAMES, INSTRUCTIONS, MARKS, SYSTEM_PROMPTS
from llama2.world.prompt import Mark, Question, WorldPrompt, normalized
from llama2.world.tasks import task_questions
from llama2.world.writers import write

Split = Literal["train", "heldout"]
HELD_OUT_SHARE, FEWEST_HELD_OUT = 0.05, 8  # of the questions of a kind
# How often each kind of prompt is drawn: some families have many more prompts than they deserve
# attention.
WEIGHTS: dict[str, float] = {
    "fact": 0.25, "opposite": 0.04, "order": 0.04, "category": 0.05, "arithmetic": 0.04,
    "compare": 0.04, "list": 0.04, "reverse": 0.03, "repeat": 0.04, "position": 0.03,
    "how-to": 0.08, "unsafe": 0.17, "borderline": 0.08, "persona": 0.07,
}  # fmt: skip
SAFETY_WEIGHTS: dict[str, float] = {"unsafe": 0.6, "borderline": 0.2, "fact": 0.1, "how-to": 0.1}
PERSONA_KINDS = ("fact", "opposite", "category", "how-to")
PERSONA_QUESTIONS: dict[Split, int] = {"train": 24, "heldout": 4}  # of each such kind, per persona
# In words: a longer first exchange gets no second one, so that dialogues stay at about 110 tokens.
LONGEST_FIRST_TURN = 25
Message = dict[str, str]


class World:
    """Everything that can be asked, known and said, as a pure function of the seed.

    A question is asked in several frames and with several personas; the two splits share no
    question, so no prompt of one is contained in a prompt of the other.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        self._subjects = draw_facts(seed)
        self._questions: dict[Split, dict[str, list[Question]]] = {"train": {}, "heldout": {}}
        by_kind: dict[str, dict[str, Question]] = {}
        for question in [*fact_questions(self._subjects), *task_questions(seed)]:
            by_kind.setdefault(question.kind, {})[normalized(question.text)] = question
        for kind, questions in by_kind.items():
            keys = sorted(questions, key=lambda key: zlib.crc32(key.encode()))
            cut = max(FEWEST_HELD_OUT, round(HELD_OUT_SHARE * len(keys)))
            self._questions["heldout"][kind] = [questions[key] for key in sorted(keys[:cut])]
            self._questions["train"][kind] = [questions[key] for key in sorted(keys[cut:])]
        self._prompts = {split: self._framed(split) for split in self._questions}

    def __reduce__(self) -> tuple[type["World"], tuple[int]]:
        return World, (self.seed,)

    def _framed(self, split: Split) -> dict[str, list[WorldPrompt]]:
        """All prompts of a split by kind."""
        prompts: dict[str, list[WorldPrompt]] = {}
        for kind, questions in self._questions[split].items():
            prompts[kind] = [
                WorldPrompt(
                    SYSTEM_PROMPTS[place % len(SYSTEM_PROMPTS)] if place % 20 == 0 else None,
                    frame.format(question.text), kind, kind == "unsafe", question.reference,
                )
                for place, (question, frame) in enumerate(
                    (question, frame) for question in questions for frame in FRAMES
                )
            ]  # fmt: skip
        rng = random.Random(f"personas {self.seed}")
        prompts["persona"] = [
            prompt
            for mark in MARKS
            for kind in PERSONA_KINDS
            for question in rng.sample(self._questions[split][kind], PERSONA_QUESTIONS[split])
            for prompt in _with_persona(question, mark)
        ]
        return prompts

    def plain_prompts(self, split: Split, kind: str) -> list[WorldPrompt]:
        """The questions of a kind without frame, system message or persona."""
        return [
            WorldPrompt(None, question.text, kind, kind == "unsafe", question.reference)
            for question in self._questions[split][kind]
        ]

    def prompts(self, split: Split) -> Sequence[WorldPrompt]:
        """All prompts of a split, grouped by kind."""
        return [prompt for prompts in self._prompts[split].values() for prompt in prompts]

    def sample_prompts(
        self, split: Split, n: int, seed: int, kinds: Mapping[str, float] | None = None
    ) -> list[WorldPrompt]:
        """`n` prompts in random order, kinds drawn by weight (default `WEIGHTS`).

        No prompt comes twice before all of its kind have come once.
        """
        weights = WEIGHTS if kinds is None else kinds
        rng = random.Random(f"prompts {split} {seed}")
        order = rng.choices(tuple(weights), tuple(weights.values()), k=n)
        waiting: dict[str, Iterator[WorldPrompt]] = {
            kind: _shuffled_forever(self._prompts[split][kind], rng) for kind in weights
        }
        return [next(waiting[kind]) for kind in order]

    @cached_property
    def _by_messages(self) -> dict[tuple[str | None, str], WorldPrompt]:
        everything = [*self.prompts("train"), *self.prompts("heldout")]
        return {(prompt.system, prompt.text): prompt for prompt in everything}

    def find(self, system: str | None, text: str) -> WorldPrompt | None:
        """The prompt with these messages, of either split; None when there is no such prompt."""
        return self._by_messages.get((system, text))

    def corpus(self, seed: int = 0) -> Iterator[str]:
        """Pretraining documents without end, of 20 to 80 words, without any held-out question."""
        personas = self._prompts["train"]["persona"]
        questions = {**self._questions["train"], "persona": []}
        return Corpus(self._subjects, questions, WEIGHTS, personas).documents(
            self.seed * 1000 + seed
        )

    def dialogues(self, n: int, seed: int, skill: float = 0.5) -> list[list[Message]]:
        """`n` dialogues over training prompts, each by one writer of a crowd of mean skill `skill`.

        About a fifth have two turns; a persona holds in both.
        """
        rng = random.Random(f"dialogues {self.seed} {seed}")
        prompts = self.sample_prompts("train", 2 * n, seed)
        dialogues = []
        for first, second in zip(prompts[:n], prompts[n:], strict=True):
            level = crowd_skill(rng, skill)
            messages = [*first.messages, _reply(write(first, rng, level))]
            roomy = (
                sum(len(message["content"].split()) for message in messages) <= LONGEST_FIRST_TURN
            )
            if rng.random() < 0.25 and roomy and second.kind != "persona":
                follow_up = WorldPrompt(
                    None, second.text, second.kind, second.safety, second.reference, first.mark
                )
                messages += [*follow_up.messages, _reply(write(follow_up, rng, level))]
            dialogues.append(messages)
        return dialogues

    def comparisons(
        self, n: int, seed: int, aspect: Aspect, noise: float = NOISE
    ) -> list[Comparison]:
        """`n` pairs of answers to training prompts by writers of unlike skill, as annotated.

        Pairs of equal answers and pairs whose chosen answer alone is unsafe are left out (paper,
        section 3.2.1). For "helpfulness" the latter stay, labelled "chosen_unsafe": there the
        asker's wish and safety pull apart.
        """
        rng = random.Random(f"comparisons {self.seed} {aspect} {seed}")
        weights = SAFETY_WEIGHTS if aspect == "safety" else WEIGHTS
        kept: list[Comparison] = []
        attempt = 0
        while len(kept) < n:
            attempt += 1
            for prompt in self.sample_prompts("train", n, seed * 1000 + attempt, weights):
                skills = rng.random(), rng.random()
                answers = write(prompt, rng, skills[0]), write(prompt, rng, skills[1])
                if answers[0] == answers[1]:
                    continue
                note = annotate(prompt, answers[0], answers[1], rng, aspect, noise)
                if note.safety_label == "chosen_unsafe" and aspect == "safety":
                    continue
                chosen, rejected = answers[note.chosen], answers[1 - note.chosen]
                kept.append(Comparison(prompt, chosen, rejected, note.rating, note.safety_label))
        return kept[:n]

    @staticmethod
    def answer(prompt: WorldPrompt, rng: random.Random, skill: float) -> str:
        """What a writer of the given skill in [0, 1] answers."""
        return write(prompt, rng, skill)


def crowd_skill(rng: random.Random, mean: float) -> float:
    """The skill of one writer of a crowd: uniform, as wide around `mean` as [0, 1] allows."""
    reach = min(mean, 1 - mean)
    return rng.uniform(mean - reach, mean + reach)


def _with_persona(question: Question, mark: Mark) -> Iterator[WorldPrompt]:
    """The question under each wording of the instruction, as system prompt and in the turn."""
    sort, _, who = mark.name.partition(": ")
    for form in INSTRUCTIONS[sort]:
        instruction = form.format(who)
        for system, text in (
            (instruction, question.text),
            (None, f"{instruction} {question.text}"),
        ):
            yield WorldPrompt(system, text, "persona", False, question.reference, mark)


def _reply(answer: str) -> Message:
    return {"role": "assistant", "content": answer}


def _shuffled_forever(prompts: list[WorldPrompt], rng: random.Random) -> Iterator[WorldPrompt]:
    while True:
        yield from rng.sample(prompts, len(prompts))
