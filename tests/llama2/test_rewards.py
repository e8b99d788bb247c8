"""The paper's reward, and KL estimators, against numbers worked out by hand."""

import math

import pytest
import torch

from llama2 import kl
from llama2.rewards import composite, logit, token_rewards


def test_kl_estimators_known_answers() -> None:
    policy = torch.full((3,), -1.0, dtype=torch.float64)
    reference = torch.tensor([0.0, -15.0, -30.0], dtype=torch.float64)
    assert kl.k1(policy, reference).tolist() == [-1.0, 14.0, 29.0]
    assert kl.k2(policy, reference).tolist() == [0.5, 98.0, 420.5]
    expected = torch.tensor([math.e - 2, 13.0, 28.0], dtype=torch.float64)
    torch.testing.assert_close(kl.k3(policy, reference), expected, atol=1e-5, rtol=0)


def test_kl_estimators_average_to_the_divergence() -> None:
    p = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    q = torch.tensor([0.4, 0.4, 0.2], dtype=torch.float64)
    exact = (p * (p / q).log()).sum()
    for estimator in (kl.k1, kl.k3):
        torch.testing.assert_close((p * estimator(p.log(), q.log())).sum(), exact)


def test_safety_gate() -> None:
    helpfulness = torch.tensor([0.9, 0.9, 0.9, 0.9])
    safety = torch.tensor([0.8, 0.14, 0.15, 0.9])
    tagged = torch.tensor([False, False, False, True])
    # Safe and untagged: helpfulness. Below 0.15: safety. Exactly 0.15 is not below. Tagged: safety.
    torch.testing.assert_close(
        composite(helpfulness, safety, tagged), torch.tensor([0.9, 0.14, 0.9, 0.9])
    )


def test_logit_undoes_the_sigmoid_and_stays_finite() -> None:
    scores = torch.linspace(-8, 8, 9, dtype=torch.float64)
    torch.testing.assert_close(logit(scores.sigmoid()), scores)
    assert logit(torch.tensor([0.0, 1.0])).isfinite().all()


def test_score_falls_on_the_last_written_token() -> None:
    mask = torch.tensor([[0, 1, 1, 0], [0, 0, 1, 1], [0, 0, 0, 0]])
    divergence = torch.tensor([[9.0, 0.5, 1.0, 9.0], [9.0, 9.0, 2.0, -1.0], [9.0, 9.0, 9.0, 9.0]])
    found = token_rewards(torch.tensor([3.0, -1.0, 5.0]), divergence, mask, kl_coefficient=0.1)
    expected = torch.tensor(
        [[0.0, -0.05, 3 - 0.1, 0.0], [0.0, 0.0, -0.2, -1 + 0.1], [0.0, 0.0, 0.0, 0.0]]
    )
    torch.testing.assert_close(found, expected)


def test_the_coefficient_moves_towards_its_target() -> None:
    def after(divergence: float) -> float:
        return kl.adapted(0.1, divergence, target=5.0, horizon=1000.0, samples=100)

    assert after(5.0) == 0.1
    assert math.isclose(after(5.5), 0.1 * (1 + 0.1 * 0.1))
    assert math.isclose(after(4.5), 0.1 * (1 - 0.1 * 0.1))
    assert math.isclose(after(50.0), 0.1 * (1 + 0.2 * 0.1))  # the error is held at a fifth
    assert math.isclose(after(-3.0), 0.1 * (1 - 0.2 * 0.1))
    with pytest.raises(AssertionError, match="would stay there"):
        kl.adapted(0.1, 0.0, target=5.0, horizon=20.0, samples=100)
