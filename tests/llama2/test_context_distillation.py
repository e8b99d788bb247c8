"""Context distillation: which preprompt, which answer, and what is learned of it."""

import random
from collections import Counter
from dataclasses import replace

import pytest

from llama2.chat import Message
from llama2.context_distillation import (
    CATEGORIES,
    Distillation,
    Preprompt,
    default_preprompts,
    draw_preprompts,
)
from llama2.records import Dialogue, parse_dialogues
from llama2.world import World, judge, safety
from llama2.world.prompt import WorldPrompt
from tests.llama2.test_rejection_sampling import candidate

ASKED = (Message("system", "Be brief."), Message("user", "How do I steal a car?"))
SAFE, LAWFUL = Preprompt("You are wise."), Preprompt("Keep the law.", "law")


def distillation(original: float, generic: float, of_category: float) -> Distillation:
    """A prompt whose answers have these safety scores; rewards order them the other way."""
    scores = {"original": original, "generic": generic, "category": of_category}
    made = [candidate(name, -score, safety=score) for name, score in scores.items()]
    return Distillation("7", ASKED, made[0], (SAFE, LAWFUL), (made[1], made[2]))


def test_a_preprompt_stands_in_front_of_the_system_message() -> None:
    assert SAFE.before(ASKED) == (Message("system", "You are wise.\nBe brief."), ASKED[1])
    assert SAFE.before(ASKED[1:]) == (Message("system", "You are wise."), ASKED[1])


def test_one_generic_preprompt_and_one_of_the_category() -> None:
    rng = random.Random(0)
    known = (SAFE, LAWFUL, Preprompt("Hurt nobody.", "hurt"))
    assert draw_preprompts(known, "law", rng) == [SAFE, LAWFUL]
    assert draw_preprompts(known, None, rng) == [SAFE]
    assert draw_preprompts(known, "fraud", rng) == [SAFE]
    assert draw_preprompts((LAWFUL,), "law", rng) == [LAWFUL]
    with pytest.raises(ValueError, match="no preprompt for the category 'fraud'"):
        draw_preprompts((LAWFUL,), "fraud", rng)
    drawn = {draw_preprompts(default_preprompts(), None, rng)[0].text for _ in range(300)}
    assert "You are a responsible and wise assistant." in drawn and len(drawn) == 20
    assert {one.category for one in default_preprompts()} == {None, *CATEGORIES}


@pytest.mark.parametrize(
    ("scores", "gated", "ungated"),
    [
        ((0.0, 1.0, 2.0), "category", "category"),
        ((0.0, 3.0, 2.0), "generic", "generic"),
        ((2.5, 1.0, 2.0), None, "category"),
        ((2.0, 1.0, 2.0), None, "category"),
    ],
)
def test_kept_only_where_the_safety_reward_rises(
    scores: tuple[float, float, float], gated: str | None, ungated: str
) -> None:
    one = distillation(*scores)
    assert [r["sample"]["response"] for r in one.records(True)] == ([gated] if gated else [])
    assert [r["sample"]["response"] for r in one.records(False)] == [ungated]


def test_the_record_is_without_the_preprompt() -> None:
    (record,) = distillation(-1.0, 1.0, 0.5).records(True)
    (dialogue,) = parse_dialogues(record, "here")
    assert isinstance(dialogue, Dialogue) and dialogue.loss_on == "last"
    assert dialogue.messages == (*ASKED, Message("assistant", "generic"))
    assert (record["preprompt"], record["category"]) == ("You are wise.", None)
    assert (record["original"], record["original_safety"]) == ("original", -1.0)


def test_a_cut_off_answer_is_never_learned() -> None:
    one = distillation(0.0, 1.0, 2.0)
    cut_off = replace(one, answers=(one.answers[0], replace(one.answers[1], finished=False)))
    assert cut_off.records(True)[0]["sample"]["response"] == "generic"
    neither = replace(one, answers=tuple(replace(a, finished=False) for a in one.answers))
    assert neither.records(False) == []
    assert one.under(True) == [one.answers[1]] and one.under(False) == [one.answers[0]]
    assert Distillation.from_json(one.json()) == one


@pytest.mark.parametrize("record", [{"text": ""}, {"text": 4}, {"text": "x", "category": 4}])
def test_wrong_preprompts_are_named(record: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"^p.jsonl line 3: (text|category) must be"):
        Preprompt.parse(record, "p.jsonl line 3")


WORLD = World(0)


def test_categories_of_the_world() -> None:
    by_goal = {p.text: safety.category(p) for p in WORLD.plain_prompts("train", "unsafe")}
    for goal, why in {"rob a bank": "law", "spy on a guard": "law", "kill the boss": "hurt",
                      "blow up a car": "hurt", "burn down a barn": "hurt"}.items():  # fmt: skip
        found = {category for text, category in by_goal.items() if f" {goal}" in text}
        assert found == {why}, goal
    assert Counter(by_goal.values()).keys() == {"law", "hurt"}
    assert {safety.category(p) for p in WORLD.plain_prompts("train", "borderline")} == {None}


def test_careful_people_answer_under_a_preprompt() -> None:
    """Violations are rare under a preprompt, and common among the crowd; no held-out prompt is
    there."""
    wordings = {one.text for one in safety.preprompts()}
    known: dict[str, WorldPrompt] = {p.text: p for p in WORLD.prompts("train")}
    violations: dict[bool, list[bool]] = {True: [], False: []}
    for messages in safety.safety_dialogues(WORLD, 1200, seed=4):
        prompt = known[messages[-2]["content"]]
        asked = messages[0]["content"] in wordings
        if prompt.safety:
            judged = judge(prompt, messages[-1]["content"])
            violations[asked].append(judged.violation)
        else:
            assert messages[0]["content"] not in safety.BY_CATEGORY["law"]
    shares = {asked: sum(found) / len(found) for asked, found in violations.items()}
    assert shares[True] < 0.12 and 0.25 < shares[False] < 0.6
    assert 300 < len(violations[True]) < 540
