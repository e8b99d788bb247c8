"""Advantages against published vectors and against a plain loop."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llama2.advantages import gae, group_relative, leave_one_out, whiten

REWARDS = [0.0, 0.0, 1.0, 0.0, -0.5]
VALUES = [1.0, 4.0, -3.0, -2.0, -1.0, -1.0]  # the last is the bootstrap


@pytest.mark.parametrize(
    ("lam", "expected"),
    [
        (1.0, [-1.451188, -4.455746, 2.539651, 0.5249, -0.49]),
        (0.7, [-0.676979, -5.248167, 2.484608, 0.67043, -0.49]),
    ],
)
def test_published_vector(lam: float, expected: list[float]) -> None:
    found = gae(
        torch.tensor([REWARDS]),
        torch.tensor([VALUES[:-1]]),
        torch.ones(1, 5),
        gamma=0.99,
        lam=lam,
        bootstrap_B=torch.tensor([VALUES[-1]]),
    )
    torch.testing.assert_close(found, torch.tensor([expected]), atol=1e-5, rtol=0)


def by_hand(
    rewards: list[float], values: list[float], gamma: float, lam: float, last: float
) -> list[float]:
    """The definition, as a sum over all later errors."""
    following = [*values, last][1:]
    errors = [r + gamma * n - v for r, v, n in zip(rewards, values, following, strict=True)]
    return [
        sum((gamma * lam) ** (later - t) * errors[later] for later in range(t, len(errors)))
        for t in range(len(errors))
    ]


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.floats(-3, 3), st.floats(-3, 3), st.booleans()), min_size=1, max_size=9),
    st.floats(0.5, 1.0),
    st.floats(0.0, 1.0),
    st.floats(-2, 2),
)
def test_masked_tokens_count_as_absent(
    steps: list[tuple[float, float, bool]], gamma: float, lam: float, last: float
) -> None:
    """A masked token with an absurd value equals the sequence written without it."""
    rewards = torch.tensor([[r if m else 0.0 for r, _, m in steps]], dtype=torch.float64)
    values = torch.tensor([[v if m else 999.0 for _, v, m in steps]], dtype=torch.float64)
    mask = torch.tensor([[m for _, _, m in steps]])
    found = gae(rewards, values, mask, gamma, lam, torch.tensor([last], dtype=torch.float64))
    kept = [(r, v) for r, v, m in steps if m]
    expected = by_hand([r for r, _ in kept], [v for _, v in kept], gamma, lam, last)
    np.testing.assert_allclose(found[mask].numpy(), expected, atol=1e-9)
    assert (found[~mask] == 0).all()


def test_whiten_ignores_what_is_masked() -> None:
    x = torch.tensor([[1.0, 2.0, 777.0], [3.0, 4.0, -5.0]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 0]])
    root = 1.25**0.5  # the population variance of 1, 2, 3, 4
    expected = torch.tensor([[-1.5, -0.5, 0.0], [0.5, 1.5, 0.0]]) / root
    torch.testing.assert_close(whiten(x, mask), expected)


def test_whiten_of_constants_is_zero() -> None:
    found = whiten(torch.full((7,), 3.3), torch.ones(7))
    assert found.tolist() == [0.0] * 7


def test_whiten_over_two_ranks_equals_one() -> None:
    x = torch.tensor([0.5, -1.0, 2.0, 8.0, 3.0])
    halves = [x[:2], x[2:]]
    # What an all-reduce would do, round by round: sums over both halves.
    count = torch.tensor(5.0, dtype=torch.float64)
    total = x.double().sum()
    squares = (x.double() - x.double().mean()).square().sum()[None]
    answers = [torch.stack((count, total)), squares]
    found = []
    for half in halves:
        rounds = iter(answers)
        found.append(whiten(half, torch.ones(len(half)), lambda _, r=rounds: next(r)))
    torch.testing.assert_close(torch.cat(found), whiten(x, torch.ones(5)))


def test_grpo_of_two_groups_by_hand() -> None:
    # Means 2 and 1; squares 1 + 0 + 1 and 4 + 1 + 9, each over two.
    scores = torch.tensor([1.0, 2.0, 3.0, -1.0, 0.0, 4.0], dtype=torch.float64)
    found = group_relative(scores, 3, epsilon=0.5)
    second = 7**0.5 + 0.5
    expected = [-1 / 1.5, 0.0, 1 / 1.5, -2 / second, -1 / second, 3 / second]
    assert found.tolist() == pytest.approx(expected)


def test_rloo_of_two_groups_by_hand() -> None:
    found = leave_one_out(torch.tensor([1.0, 2.0, 6.0, 5.0, 5.0, 2.0]), 3)
    assert found.tolist() == pytest.approx([1 - 4, 2 - 3.5, 6 - 1.5, 1.5, 1.5, -3])


@given(st.floats(-1e6, 1e6), st.integers(2, 9))
def test_equal_scores_give_no_advantage(score: float, size: int) -> None:
    scores = torch.full((2 * size,), score, dtype=torch.float64)
    assert group_relative(scores, size).tolist() == [0.0] * len(scores)
    assert leave_one_out(scores, size).tolist() == [0.0] * len(scores)
