"""A safety reward model on human preferences, beside what needs no model.

Prints its numbers: pytest -m slow -s tests/jobs/test_real_rewards.py
"""

import json
from collections import Counter
from itertools import permutations
from pathlib import Path
from statistics import fmean

import pytest

from cluster.files import read_records
from cluster.session import session
from llama2.chat import Message
from llama2.records import Comparison, Skipped, parse_comparisons
from tests.benchmarks.bag_of_words import BagOfWords
from tests.results import real_rewards, world
from tests.results.real_rewards import GROUPS, PAIRS, TREES, Recipe, comparisons, right, split

needs_data = pytest.mark.skipif(not PAIRS.is_file(), reason=f"the real data is not at {PAIRS}")


@needs_data
@pytest.mark.slow
def test_it_beats_length_and_bag_of_words(tmp_path: Path) -> None:
    train, test = map(comparisons, split())
    with session(world.ONE_SESSION):
        folder = real_rewards.train(tmp_path, Recipe(), GROUPS - 1, seed=0)
    found = {
        "reward model": fmean(right(real_rewards.gaps(folder, test))),
        "bag of words": fmean(right(real_rewards.bag_gaps(train, test))),
        "the shorter answer": fmean(right(real_rewards.length_gaps(test))),
    }
    print(f"\n{len(train)} pairs to train on, {len(test)} held out: {found}")
    assert found["reward model"] > max(0.55, found["bag of words"], found["the shorter answer"])


@needs_data
def test_nothing_of_the_held_out_pairs_is_trained_on(tmp_path: Path) -> None:
    for group in (0, GROUPS - 1):
        training, heldout = split(group)
        assert len(training) == 1500 and len(heldout) == 300
        assert not set(training) & set(heldout)
        folder = tmp_path / str(group)
        real_rewards.write_inputs(folder, training)
        known = comparisons(training)
        answers = {answer for p in known for answer in (p.chosen, p.rejected)}
        new = [p for p in comparisons(heldout) if not {p.chosen, p.rejected} & answers]
        texts = [json.loads(line)["text"] for line in (folder / "dialogues.jsonl").open()]
        texts += [
            json.loads(line)["messages"][-1]["content"] for line in (folder / "chosen.jsonl").open()
        ]
        written = "\n".join(texts)
        assert all(pair.chosen in written for pair in known)
        assert not any(pair.chosen in written for pair in new if len(pair.chosen) > 80)


def test_the_shorter_answer_is_a_tie_half_the_time() -> None:
    def pair(chosen: str, rejected: str) -> Comparison:
        return Comparison((Message("user", "ask"),), chosen, rejected, None, None, "pair")

    pairs = [pair("a", "bb"), pair("aaa", "bb"), pair("cc", "dd")]
    assert real_rewards.length_gaps(pairs) == [1, -1, 0]
    assert right(real_rewards.length_gaps(pairs)) == [1.0, 0.0, 0.5]


def test_bag_of_words_learns_words_not_pairs() -> None:
    """It finds the one word that decides, gets it right where it is alone, and knows no others."""
    train = [(f"thank you {i}", f"stupid thing {i}") for i in range(20)]
    bag = BagOfWords(train, penalty=0.01)
    assert bag.accuracy([("thank the cat", "stupid dog"), ("thank", "the")]) == 1.0
    assert bag.accuracy([("stupid", "thank")]) == 0.0
    assert bag.accuracy([("cat", "dog")]) == 0.5


@needs_data
def test_ranks_of_replies_become_ratings() -> None:
    """A gap of one rank is "slightly better", of two "better", of more "significantly better"."""
    found: Counter[str | None] = Counter()
    expected: Counter[str] = Counter()
    names = {1: "slightly better", 2: "better"}
    for where, record in read_records(TREES):
        pairs = parse_comparisons(record, where)
        found.update(p.rating for p in pairs if not isinstance(p, Skipped))
        nodes = [record["prompt"]]
        while nodes:
            node = nodes.pop()
            kept = [
                reply
                for reply in node["replies"]
                if not reply.get("deleted") and reply.get("review_result") is not False
            ]
            nodes += kept
            answers = kept if node["role"] == "prompter" else []
            ranked = [(a["rank"], a["text"].strip()) for a in answers if a.get("rank") is not None]
            for (a, better), (b, worse) in permutations(ranked, 2):
                if b > a and better and worse and better != worse:
                    expected[names.get(b - a, "significantly better")] += 1
    assert sum(found.values()) > 50
    assert found == expected
