"""Passes over sources follow from weights and tokens, and what cannot be had is refused."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama2.batches import TokenSequence
from llama2.mixing import check_mix, is_taken, passes


def test_passes_by_hand() -> None:
    # Twice as many tokens of wiki as of web are wanted, and there is a third: six passes.
    found = passes({"wiki": 2, "web": 1}, {"wiki": 100, "web": 300}, most=10)
    assert found == {"wiki": 6.0, "web": 1.0}
    # A large source of small weight is what is passed once.
    found = passes({"a": 5, "b": 3, "c": 2}, {"a": 1000, "b": 500, "c": 4000}, most=12)
    assert found == {"a": 10.0, "b": 12.0, "c": 1.0}
    assert passes({}, {"wiki": 100, "web": 300}, most=1) == {"wiki": 1.0, "web": 1.0}


@given(
    st.lists(st.tuples(st.floats(0.1, 10), st.integers(1_000, 1_000_000)), min_size=1, max_size=5)
)
def test_shares_are_the_weights(given: list[tuple[float, int]]) -> None:
    weights = {str(i): weight for i, (weight, _) in enumerate(given)}
    tokens = {str(i): count for i, (_, count) in enumerate(given)}
    found = passes(weights, tokens, most=1e9)
    assert min(found.values()) == 1.0
    total = sum(found[name] * tokens[name] for name in tokens)
    for name, weight in weights.items():
        share = found[name] * tokens[name] / total
        assert share == pytest.approx(weight / sum(weights.values()), rel=1e-4)


def test_what_the_mix_may_not_ask_for() -> None:
    check_mix({}, ["wiki"])
    check_mix({"wiki": 2, "web": 0.5}, ["web", "wiki"])
    with pytest.raises(ValueError, match="The mix names 'books', but the sources of text are: wik"):
        check_mix({"books": 1, "wiki": 1}, ["wiki"])
    with pytest.raises(ValueError, match="gives web no weight"):
        check_mix({"wiki": 1}, ["web", "wiki"])
    for weight in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="gives wiki the weight"):
            check_mix({"wiki": weight}, ["wiki"])
    with pytest.raises(ValueError, match=r"pass wiki 6\.00 times .* max_passes 4 allows"):
        passes({"wiki": 2, "web": 1}, {"wiki": 100, "web": 300}, most=4)
    with pytest.raises(ValueError, match="asks for web, but none of its texts"):
        passes({"wiki": 2, "web": 1}, {"wiki": 100, "web": 0}, most=4)


def test_a_share_of_documents_is_taken_by_hash() -> None:
    rows = [[TokenSequence(np.array([1, i, i + 1]), np.ones(3, bool))] for i in range(4000)]
    taken = [{i for i, row in enumerate(rows) if is_taken(row, share)} for share in (0.2, 0.7, 1.0)]
    assert len(taken[0]) == pytest.approx(800, abs=100)
    assert len(taken[1]) == pytest.approx(2800, abs=120)
    assert taken[0] < taken[1] < taken[2]
    # The same document, however its tokens are stored.
    narrow = [[TokenSequence(row[0].tokens.astype("<u2"), row[0].is_target)] for row in rows]
    assert {i for i, row in enumerate(narrow) if is_taken(row, 0.2)} == taken[0]
