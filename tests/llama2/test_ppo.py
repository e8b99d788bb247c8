"""Settings that go together, and those that do not."""

from typing import Any

import pytest

from llama2.ppo import PPOSettings


def test_the_algorithms_take_their_published_forms() -> None:
    forms = {
        "ppo": ("reward", "k1", True, True),
        "grpo": ("loss", "k3", False, False),
        "rloo": ("reward", "k1", False, False),
    }
    for algorithm, form in forms.items():
        made = PPOSettings(algorithm=algorithm, group_size=4)  # type: ignore[arg-type]
        assert (
            made.kl_place, made.estimator, made.whitens_advantages, made.has_critic
        ) == form  # fmt: skip
    assert PPOSettings(kl_in="loss").estimator == "k3"
    assert not PPOSettings(whiten_advantages=False).whitens_advantages


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"algorithm": "grpo"}, "grpo compares the answers to a prompt with each other and group_size"),
    ({"algorithm": "rloo", "group_size": 1}, "group_size is 1; set it to 2 or more"),
    ({"group_size": 0}, "group_size must be at least 1"),
    ({"algorithm": "rloo", "group_size": 2, "critic_warmup": 3}, "rloo has no critic"),
    ({"kl_in": "loss", "kl_estimator": "k1"}, "k1 has no effect in the loss"),
    ({"kl_target": 0.0}, "kl_target must be positive"),
    ({"kl_horizon": 0.0}, "kl_horizon must be positive"),
    ({"kl_target": 6.0, "kl_coefficient": 0.0}, "start from a positive one"),
    ({"entropy_coefficient": -0.1}, "entropy_coefficient must be at least 0"),
    ({"ptx_rows": 0}, "ptx_rows must be at least 1"),
]


@pytest.mark.parametrize(("fields", "said"), REFUSED)
def test_what_does_not_go_together_is_told_in_one_sentence(fields: Any, said: str) -> None:
    with pytest.raises(ValueError) as caught:
        PPOSettings(**fields)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
