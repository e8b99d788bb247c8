"""The best of several samples: numbers by hand, and against all choices one by one."""

import math
from dataclasses import asdict, replace
from itertools import combinations
from pathlib import Path
from statistics import fmean, median

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama2.chat import Message
from llama2.encoding import encode
from llama2.records import Dialogue, parse_dialogues
from llama2.rejection_sampling import (
    Candidate,
    Candidates,
    curve,
    expected_median,
    expected_of_best,
    joined,
    rank_chances,
)
from llama2.tokenizer import load_tokenizer
from tests.actors.small_tasks import tokenizer_folder

ASKED = (Message("user", "who is there"),)


def candidate(response: str, reward: float, **changes: object) -> Candidate:
    made = Candidate(
        id=f"7/1/{response}", response=response, temperature=1.0, reward=reward,
        helpfulness=reward + 1, safety=reward - 1, finished=True, tokens=3, logprob=-2.0,
        round="first", model="abc",
    )  # fmt: skip
    return replace(made, **changes)  # type: ignore[arg-type]


def candidates(*samples: Candidate, messages: tuple[Message, ...] = ASKED) -> Candidates:
    return Candidates("7", messages, False, samples)


def test_order_statistics_by_hand() -> None:
    """Of 4, 1, 2 the pairs are (1, 2), (1, 4), (2, 4)."""
    values = [4.0, 1.0, 2.0]
    assert expected_of_best(values, values, 1) == pytest.approx(7 / 3)
    assert expected_of_best(values, values, 2) == pytest.approx((2 + 4 + 4) / 3)
    assert expected_of_best(values, values, 3) == 4
    assert rank_chances(3, 2, 1) == pytest.approx((2 / 3, 1 / 3, 0))
    assert rank_chances(3, 2, 2) == pytest.approx((0, 1 / 3, 2 / 3))
    assert expected_median(values, 2) == pytest.approx((1.5 + 2.5 + 3) / 3)
    assert expected_median(values, 3) == 2


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(-9, 9), min_size=1, max_size=7), st.data())
def test_order_statistics_against_all_choices(values: list[int], data: st.DataObject) -> None:
    size = data.draw(st.integers(1, len(values)))
    others = data.draw(st.lists(st.integers(0, 9), min_size=len(values), max_size=len(values)))
    choices = list(combinations(values, size))
    assert expected_of_best(values, values, size) == pytest.approx(
        fmean(map(max, choices)), abs=1e-9
    )
    assert expected_median(values, size) == pytest.approx(fmean(map(median, choices)), abs=1e-9)
    best = []
    for choice in combinations(list(zip(values, others, strict=True)), size):
        top = max(reward for reward, _ in choice)
        best.append(fmean(other for reward, other in choice if reward == top))
    assert expected_of_best(values, others, size) == pytest.approx(fmean(best), abs=1e-9)


def test_a_hundred_samples_lose_no_precision() -> None:
    values = [float(i) for i in range(100)]
    assert expected_of_best(values, values, 50) == pytest.approx(50 * 101 / 51 - 1)
    assert expected_median(values, 99) == pytest.approx(49.5)


def test_curve() -> None:
    """Two prompts; at S = 2 the best are 3 and 5, so their mean is 4 and its error 1."""
    first, second = curve([[3.0, 1.0], [5.0, 2.0]])
    assert (first.size, second.size) == (1, 2)
    assert first.best.mean == first.median.mean == pytest.approx((2 + 3.5) / 2)
    assert (second.best.mean, second.best.error) == (4, pytest.approx(1))
    assert second.median.mean == pytest.approx(2.75)
    assert [p.size for p in curve([[0.0] * 14] * 2)] == [1, 2, 3, 4, 6, 8, 12, 14]
    assert [p.size for p in curve([[0.0] * 5, [0.0] * 2])] == [1, 2]
    gold = curve([[3.0, 1.0]], [[0.2, 0.9]])
    assert [p.best.mean for p in gold] == pytest.approx([0.55, 0.2])
    assert gold[1].median.mean == pytest.approx(0.55) and math.isinf(gold[1].best.error)


def test_the_best_that_can_be_learned() -> None:
    one = candidates(
        candidate("cut off", 9, finished=False),
        candidate(" ", 8),
        candidate("with [/INST] inside", 7),
        candidate("second", 2),
        candidate("best", 3),
        candidate("best ", 3, id="again"),
        candidate("equal to the second", 2),
    )
    assert [c.response for c in one.best(9)] == ["best", "second", "equal to the second"]
    assert [c.id for c in one.best(1)] == ["7/1/best"]
    assert candidates(candidate("x", 1, finished=False)).best(3) == []


def test_joined_rounds_keep_each_sample_once() -> None:
    other = (Message("user", "who else"),)
    prior = candidates(candidate("a", 1), candidate("b", 2))
    own = candidates(
        candidate("b", 2), candidate("b", 5, round="second"), candidate("c", 4, round="second")
    )
    more = candidates(candidate("d", 0), messages=other)
    first, second = joined([prior, own, more])
    assert [(c.response, c.round, c.reward) for c in first.samples] == [
        ("a", "first", 1), ("b", "first", 2), ("b", "second", 5), ("c", "second", 4),
    ]  # fmt: skip
    assert second == more


def test_runs_of_one_name_may_draw_the_same_place() -> None:
    """As two runs do that were named alike in different folders: both samples stay."""
    first, second = (candidate(text, reward, id="7/1/0") for text, reward in (("a", 1), ("b", 5)))
    (found,) = joined([candidates(first), candidates(second), candidates(first)])
    assert [sample.response for sample in found.best(2)] == ["b", "a"]
    assert len(found.samples) == 2


def test_records_teach_the_sampled_answer_alone(tmp_path: Path) -> None:
    """A record as users' files hold them is read by SFT's reader, tokenized, and its targets are
    the tokens of the last answer."""
    prompt = (*ASKED, Message("assistant", "the cat"), Message("user", "and who sees"))
    one = candidates(candidate("the dog", 3.0), candidate("green", 1.0), messages=prompt)
    best, second = one.records(2)
    assert best["rewards_of_all"] == [3.0, 1.0] and (best["rank"], second["rank"]) == (1, 2)
    assert best["sample"] == asdict(one.samples[0]) and best["prompt_id"] == "7"
    (dialogue,) = parse_dialogues(best, "here")
    assert isinstance(dialogue, Dialogue) and dialogue.loss_on == "last"
    tokenizer = load_tokenizer(tokenizer_folder(tmp_path))
    (row,) = encode(dialogue, tokenizer, 200)
    (sequence,) = row.sequences
    learned = [int(t) for t, is_it in zip(*_arrays(sequence), strict=True) if is_it]
    assert tokenizer.decode(learned).strip() == "the dog"
    (every,) = encode(replace(dialogue, loss_on="all"), tokenizer, 200)
    (sequence,) = every.sequences
    learned = [int(t) for t, is_it in zip(*_arrays(sequence), strict=True) if is_it]
    assert "the cat" in tokenizer.decode(learned)


def _arrays(sequence: object) -> tuple[list[int], list[bool]]:
    return sequence.tokens.tolist(), sequence.is_target.tolist()  # type: ignore[attr-defined]


def test_json_and_back() -> None:
    one = candidates(candidate("a", 0.1, reward_then=0.3))
    assert Candidates.from_json(one.json()) == replace(one, messages=ASKED)
