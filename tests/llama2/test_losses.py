"""Losses against numbers worked out by hand, and over any split of a batch."""

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llama2.losses import next_token_loss, policy_loss, ranking_loss, safety_loss, value_loss


def test_ranking_loss_with_margins() -> None:
    chosen, rejected = torch.tensor([2.0, 0.0]), torch.tensor([1.0, 0.5])
    margins = torch.tensor([1 / 3, 1.0])
    expected = (math.log1p(math.exp(-(1 - 1 / 3))) + math.log1p(math.exp(1.5))) / 2
    found = ranking_loss(chosen, rejected, margins, total=2)
    assert math.isclose(float(found), expected, rel_tol=1e-6)


def test_policy_loss_clips_only_what_would_gain() -> None:
    old = torch.zeros(4)
    new = torch.tensor([1.5, 1.5, 0.5, 0.5]).log().requires_grad_()
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0])
    loss = policy_loss(new, old, advantages, clip_range=0.2, total=4)
    # Gains are held at 1.2 and 0.8; losses count in full.
    assert math.isclose(float(loss.detach()), -(1.2 - 1.5 + 0.5 - 0.8) / 4, rel_tol=1e-5)
    loss.backward()
    assert new.grad is not None
    torch.testing.assert_close(new.grad, torch.tensor([0.0, 1.5, -0.5, 0.0]) / 4)


def test_value_loss_takes_the_worse_of_free_and_held() -> None:
    values, old, returns = torch.tensor([1.0, 0.1]), torch.zeros(2), torch.tensor([1.0, 1.0])
    # The first is right but moved too far: the held value 0.2 errs by 0.8. The second was free.
    expected = 0.5 * (0.8**2 + 0.9**2) / 2
    assert math.isclose(float(value_loss(values, old, returns, 0.2, 2)), expected, rel_tol=1e-6)
    free = 0.5 * (0.0 + 0.9**2) / 2
    assert math.isclose(float(value_loss(values, old, returns, None, 2)), free, rel_tol=1e-6)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=6), st.integers(0, 1000))
def test_any_split_adds_up_to_the_whole(sizes: list[int], seed: int) -> None:
    torch.manual_seed(seed)
    total = sum(sizes)
    a, b, c, d = torch.randn(4, total, dtype=torch.float64)
    losses = (
        lambda a, b, c, d: next_token_loss(a, total),
        lambda a, b, c, d: ranking_loss(a, b, c, total),
        lambda a, b, c, d: safety_loss(a, b > 0, total),
        lambda a, b, c, d: policy_loss(a, b, c, 0.2, total),
        lambda a, b, c, d: value_loss(a, b, d, 0.3, total),
    )
    for loss in losses:
        parts = zip(*(x.split(sizes) for x in (a, b, c, d)), strict=True)
        split = sum(float(loss(*part)) for part in parts)
        assert math.isclose(split, float(loss(a, b, c, d)), rel_tol=1e-9, abs_tol=1e-12)
