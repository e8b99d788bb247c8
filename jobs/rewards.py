"""The two rewards of a job: reward models, of any tokenizer, or a user's own functions."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from actors.reward import Asked, Reward
from actors.reward_function import RewardFunction, ScorerLimits, load_scorer
from cluster.placement import Workers
from llama2.checkpoint import check_folder
from llama2.tokenizer import check_vocabulary, load_tokenizer


@dataclass(frozen=True)
class RewardSource:
    """Where a score comes from: a function where one is named, else the model in a folder."""

    model: Path
    function: str = ""

    def check(self, limits: ScorerLimits) -> None:
        """Raise `FileNotFoundError` or `ValueError` where there is no such model or function."""
        if self.function:
            load_scorer(self.function, Path.cwd(), limits)
            return
        config = check_folder(self.model, scalar=True)
        check_vocabulary(load_tokenizer(self.model), config.vocab_size)

    def shares_tokenizer(self, policy: Path) -> bool:
        """Whether this is a reward model that reads the policy's tokens."""
        if self.function:
            return False
        return load_tokenizer(self.model).fingerprint == load_tokenizer(policy).fingerprint

    def workers(self, workers: Workers) -> Workers:
        """What its workers take: a function has no use for GPUs."""
        return replace(workers, gpus=0.0) if self.function else workers

    def start(
        self, workers: Workers, dtype: torch.dtype, asked: Asked, limits: ScorerLimits
    ) -> list[Any]:
        """Handles of the workers; each has `score`, from a rollout to scores. `asked` says what the
        policy is asked, and with which tokenizer."""
        options = self.workers(workers).actor_options()
        if self.function:
            role: Any = RewardFunction
            arguments: tuple[Any, ...] = (self.function, Path.cwd(), limits, asked)
        else:
            role = Reward
            others = None if self.shares_tokenizer(asked.tokenizer) else asked
            arguments = (self.model, dtype, workers.threads, others)
        return [role.options(**options).remote(*arguments) for _ in range(workers.count)]


class NamesRewards(Protocol):
    """A config that says where both scores come from."""

    @property
    def runs(self) -> Path: ...
    @property
    def preset(self) -> str: ...
    @property
    def helpfulness_model(self) -> Path | None: ...
    @property
    def safety_model(self) -> Path | None: ...
    @property
    def helpfulness_reward(self) -> str: ...
    @property
    def safety_reward(self) -> str: ...


@dataclass(frozen=True)
class Rewards:
    """Both of them."""

    helpfulness: RewardSource
    safety: RewardSource

    @staticmethod
    def find(config: NamesRewards) -> "Rewards":
        """What was named, else the preset's models. Raises `ValueError` where a model and a
        function are named for one place."""
        return Rewards(
            _find(config, "helpfulness", config.helpfulness_model, config.helpfulness_reward),
            _find(config, "safety", config.safety_model, config.safety_reward),
        )

    def check(self, limits: ScorerLimits) -> None:
        """As `RewardSource.check`."""
        self.helpfulness.check(limits)
        self.safety.check(limits)

    def critic(self, policy: Path) -> Path:
        """The folder that a value model starts from: the helpfulness model where it reads the
        policy's tokens, else the policy."""
        return self.helpfulness.model if self.helpfulness.shares_tokenizer(policy) else policy


def _find(config: NamesRewards, what: str, model: Path | None, function: str) -> RewardSource:
    if model is not None and function:
        raise ValueError(
            f"Both {what}_model {model} and {what}_reward {function} are given; leave one out."
        )
    default = config.runs / f"{config.preset}-{what}" / "model"
    return RewardSource((model or default).absolute(), function)
