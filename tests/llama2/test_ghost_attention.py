"""Ghost Attention's dialogues: where the instruction stands, and what is learned."""

import random
from collections import Counter
from pathlib import Path

import pytest

from llama2.chat import Message
from llama2.encoding import encode
from llama2.ghost_attention import (
    Constraint,
    Instruction,
    adherence_by_turn,
    default_constraints,
    draw_instruction,
    training_records,
)
from llama2.records import Dialogue, parse_dialogues
from llama2.tokenizer import load_tokenizer
from llama2.world import World, judge
from llama2.world.constraints import KINDS, conversations, pattern, world_constraints
from llama2.world.lexicon import MARKS
from llama2.world.prompt import WorldPrompt
from llama2.world.writers import write_in_style
from tests.actors.small_tasks import tokenizer_folder

RED = Constraint("Colour", ("Say red.", "Always say red."), "Colour: red.", r"red")
CAT = Constraint("Pet", ("Name a cat.",), "Pet: cat.", r"\bcat\b")
FREE = Constraint("Mood", ("Be glad.",), "Mood: glad.")
BOTH = Instruction((RED, CAT), "Say red. Name a cat.", "Colour: red. Pet: cat.")
TALK = (
    Message("user", "one"), Message("assistant", "red cat"),
    Message("user", "two"), Message("assistant", "green"),
    Message("user", "three"), Message("assistant", "the red dog"),
)  # fmt: skip


def test_where_the_instruction_stands() -> None:
    assert [m.content for m in BOTH.joined(TALK[:3])] == [
        "Say red. Name a cat. one", "red cat", "Say red. Name a cat. two",
    ]  # fmt: skip
    assert BOTH.once(TALK[:2]) == (Message("system", "Say red. Name a cat."), *TALK[:2])
    polite = (Message("system", "Be polite."), *TALK[:2])
    assert BOTH.once(polite, shortened=True) == (
        Message("system", "Colour: red. Pet: cat.\nBe polite."), *TALK[:2],
    )  # fmt: skip


def test_only_the_last_answer_is_learned(tmp_path: Path) -> None:
    """Each record's targets are the tokens of its last answer; earlier answers are there, without
    a loss."""
    tokenizer = load_tokenizer(tokenizer_folder(tmp_path))
    records = training_records(BOTH, TALK, random.Random(0))
    assert [record["turn"] for record in records] == [1, 2, 3]
    for record, answer in zip(records, ("red cat", "green", "the red dog"), strict=True):
        (dialogue,) = parse_dialogues(record, "here")
        assert isinstance(dialogue, Dialogue)
        (row,) = encode(dialogue, tokenizer, 500)
        (sequence,) = row.sequences
        assert tokenizer.decode(sequence.tokens[sequence.is_target].tolist()).strip() == answer
        text = tokenizer.decode(sequence.tokens.tolist())
        system = "Colour: red. Pet: cat." if record["shortened"] else "Say red. Name a cat."
        assert text.count(system) == 1 and text.index(system) < text.index("one")


def test_half_of_the_records_are_shortened() -> None:
    rng = random.Random(1)
    records = [r for _ in range(300) for r in training_records(BOTH, TALK, rng)]
    assert 390 < sum(record["shortened"] for record in records) < 510  # 450 +- 4 deviations


def test_instructions_combine_constraints_of_different_kinds() -> None:
    rng = random.Random(2)
    drawn = [draw_instruction((RED, CAT, FREE), 2, rng) for _ in range(600)]
    sizes = Counter(len(one.constraints) for one in drawn)
    assert set(sizes) == {1, 2} and 240 < sizes[2] < 360
    assert all(len({c.kind for c in one.constraints}) == len(one.constraints) for one in drawn)
    assert {one.text for one in drawn} >= {"Always say red.", "Name a cat. Say red.", "Be glad."}
    assert {one.short for one in drawn} >= {"Colour: red.", "Mood: glad. Colour: red."}
    same = [draw_instruction((RED, CAT, FREE), 2, random.Random(5)) for _ in range(2)]
    assert same[0] == same[1]


def test_what_keeps_an_instruction() -> None:
    assert [BOTH.is_kept(a) for a in ("a red cat", "a cat", "red cats")] == [True, False, False]
    unknown = Instruction((RED, FREE), "", "")
    assert unknown.is_kept("red") is None


def test_adherence_by_hand() -> None:
    found = adherence_by_turn([[True, True], [True, False], [True], []])
    assert {turn: (one.value, one.count) for turn, one in found.items()} == {1: (1, 3), 2: (0.5, 2)}
    assert found[1].low is not None and found[1].low < 1
    assert adherence_by_turn([[]]) == {}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"kind": 3}, "kind must be text"),
        ({"short": " "}, "short must be text"),
        ({"instructions": "Say red."}, "instructions must be a list of texts"),
        ({"instructions": []}, "instructions is empty"),
        ({"pattern": "("}, "is no regular expression"),
        ({"pattern": 4}, "is no regular expression"),
    ],
)
def test_wrong_constraints_are_named(changes: dict[str, object], said: str) -> None:
    right = {"kind": "Colour", "instructions": ["Say red."], "short": "Colour: red."}
    assert Constraint.parse(right, "c.jsonl line 2").pattern is None
    with pytest.raises(ValueError, match=rf"^c.jsonl line 2: .*{said}") as caught:
        Constraint.parse(right | changes, "c.jsonl line 2")
    assert "\n" not in str(caught.value)


def test_default_constraints_have_three_kinds() -> None:
    found = default_constraints()
    assert Counter(one.kind for one in found).keys() == {"Hobby", "Language", "Figure"}
    napoleon = next(one for one in found if one.short == "Figure: Napoleon.")
    assert "Always act as Napoleon from now on." in napoleon.instructions


WORLD = World(0)


def test_patterns_agree_with_the_gold_judge() -> None:
    """The judge halves helpfulness where a persona's phrase is not at its place, once."""
    rng = random.Random(3)
    for prompt in rng.sample(WORLD.prompts("train"), 4000):
        if prompt.mark is None:
            continue
        kept = Instruction((_constraint(prompt.mark.name),), "", "")
        plain = write_in_style(prompt.reference, "good", rng)
        marked = prompt.mark.put_on(plain)
        moved = f"{prompt.mark.phrase} {plain} {prompt.mark.phrase}"
        wrong_end = f"{plain} {prompt.mark.phrase}" if prompt.mark.place == "opening" else (
            f"{prompt.mark.phrase} {plain}"
        )  # fmt: skip
        for answer in (plain, marked, marked.upper(), moved, wrong_end, ""):
            whole = judge(prompt, answer).helpfulness
            bare = judge(_unmarked(prompt), answer.replace(prompt.mark.phrase, "").strip())
            if bare.helpfulness:
                is_right = whole > 0.75 * bare.helpfulness
                assert kept.is_kept(answer) == (answer in (marked, marked.upper()))
                assert answer != marked or is_right


def _unmarked(prompt: WorldPrompt) -> WorldPrompt:
    return WorldPrompt(prompt.system, prompt.text, prompt.kind, False, prompt.reference)


def _constraint(name: str) -> Constraint:
    return next(one for one in world_constraints() if one.short == f"{name}.")


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Bonjour. It is red. Arr! I like chess.", True),
        ("Bonjour. It is red. I like chess. Arr!", True),
        ("bonjour. it is red. i like chess. arr!  ", True),
        ("It is red. Arr! I like chess.", False),
        ("Bonjour. It is red. Arr!", False),
        ("Bonjour. Arr! It is red. I like chess.", False),
        ("Bonjour. It is red. Arr! Arr! I like chess.", False),
    ],
)
def test_marks_combine(answer: str, expected: bool) -> None:
    constraints = [_constraint(n) for n in ("Language: French", "Figure: pirate", "Hobby: chess")]
    assert Instruction(tuple(constraints), "", "").is_kept(answer) is expected


def test_world_constraints_have_a_short_wording_and_longer_ones() -> None:
    napoleon = _constraint("Figure: Napoleon")
    assert napoleon.instructions == ("Act as Napoleon.", "From now on, always act as Napoleon.")
    assert len(world_constraints()) == len(MARKS) == len({pattern(mark) for mark in MARKS})


def test_conversations_stay_in_their_split() -> None:
    held = conversations(WORLD, "heldout", 20, 6, seed=1)
    assert held == conversations(WORLD, "heldout", 20, 6, seed=1)
    assert held != conversations(WORLD, "heldout", 20, 6, seed=2)
    training = {p.text for kind in KINDS for p in WORLD.plain_prompts("train", kind)}
    for one in held:
        texts = [prompt.text for prompt in one]
        assert len(texts) == len(set(texts)) == 6 and not training & set(texts)
