"""The numbers of PPO, and of GRPO and RLOO, which do without a critic."""

from dataclasses import dataclass
from typing import Literal

from llama2.kl import Estimator


@dataclass(frozen=True)
class PPOSettings:
    """PPO's own numbers (paper, section 3.4.3; what it leaves open takes the usual choice)."""

    algorithm: Literal["ppo", "grpo", "rloo"] = "ppo"
    """What an answer is compared with: a value model (ppo), or the other answers to its prompt,
    by their mean and spread (grpo) or their mean (rloo). The last two train no value model."""
    group_size: int = 1
    """Answers to each prompt of a batch; grpo and rloo need at least 2."""
    kl_coefficient: float = 0.01
    """Beta, the weight of the KL penalty: 0.01 for 7B and 13B, 0.005 for 34B and 70B."""
    kl_in: Literal["reward", "loss"] | None = None
    """Where the penalty is: taken off the reward, or a term of the loss. By default what was
    published: the loss for grpo, else the reward."""
    kl_estimator: Estimator | None = None
    """How the KL is estimated at each token; by default k1 in the reward and k3 in the loss."""
    kl_target: float | None = None
    """KL from the initial policy, in nats per answer, that beta is adapted to; None keeps beta."""
    kl_horizon: float = 10_000.0
    """Samples in which beta may change by up to a fifth of itself; only with `kl_target`."""
    old_logprobs: Literal["learner", "generator"] = "learner"
    """Whose log-probabilities of the samples count as those of before the update: computed anew by
    the learner, or what the generators drew with, which saves that pass."""
    clip_range: float = 0.2
    """How far the probability ratio may leave 1 before its gradient stops."""
    value_clip_range: float | None = 0.2
    """The same for values; None leaves them free."""
    gamma: float = 1.0
    """Discount per token; only ppo."""
    lam: float = 0.95
    """Generalised advantage estimation's lambda; only ppo."""
    whiten_scores: bool = True
    """Bring the batch's scores to mean 0 and variance 1, as the paper does."""
    whiten_advantages: bool | None = None
    """The same for the advantages of all answer tokens; by default for ppo alone."""
    critic_warmup: int = 0
    """First iterations in which only the value model learns."""
    eos_penalty: float = 0.0
    """Taken off the score, before whitening, of an answer that was cut off at its longest."""
    entropy_coefficient: float = 0.0
    """Weight of the policy's mean entropy per token, a bonus; needs another pass over the logits
    where it is not 0."""
    ptx_coefficient: float = 0.0
    """Weight of the next-token loss on pretraining data (InstructGPT's PPO-ptx)."""
    ptx_rows: int = 8
    """Rows of pretraining data beside each minibatch, over all workers."""

    def __post_init__(self) -> None:
        self._check_groups()
        self._check_kl()
        for name in ("kl_coefficient", "critic_warmup", "eos_penalty", "entropy_coefficient",
                     "ptx_coefficient"):  # fmt: skip
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be at least 0, not {getattr(self, name):g}.")
        for name in ("clip_range", "value_clip_range"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"{name} must be a positive number, not {value:g}.")
        for name in ("gamma", "lam"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be from 0 to 1, not {getattr(self, name):g}.")
        if self.ptx_rows < 1:
            raise ValueError(f"ptx_rows must be at least 1, not {self.ptx_rows}.")

    def _check_groups(self) -> None:
        if self.group_size < 1:
            raise ValueError(f"group_size must be at least 1, not {self.group_size}.")
        if not self.has_critic and self.group_size < 2:
            raise ValueError(
                f"{self.algorithm} compares the answers to a prompt with each other and group_size "
                f"is {self.group_size}; set it to 2 or more."
            )
        if not self.has_critic and self.critic_warmup:
            raise ValueError(
                f"critic_warmup is {self.critic_warmup} and {self.algorithm} has no critic; leave "
                "it at 0, or choose ppo."
            )

    def _check_kl(self) -> None:
        if self.kl_place == "loss" and self.kl_estimator == "k1":
            raise ValueError(
                "kl_estimator k1 has no effect in the loss, where its gradient is 0 on average; "
                "choose k2 or k3, or kl_in reward."
            )
        if self.kl_target is not None and not self.kl_target > 0:
            raise ValueError(f"kl_target must be positive, not {self.kl_target:g}.")
        if not self.kl_horizon > 0:
            raise ValueError(f"kl_horizon must be positive, not {self.kl_horizon:g}.")
        if self.kl_target is not None and self.kl_coefficient <= 0:
            raise ValueError(
                f"kl_target adapts kl_coefficient by factors and that is {self.kl_coefficient:g}; "
                "start from a positive one."
            )

    @property
    def has_critic(self) -> bool:
        """Whether a value model is trained beside the policy."""
        return self.algorithm == "ppo"

    @property
    def kl_place(self) -> Literal["reward", "loss"]:
        """`kl_in`, or the algorithm's own."""
        return self.kl_in or ("loss" if self.algorithm == "grpo" else "reward")

    @property
    def estimator(self) -> Estimator:
        """`kl_estimator`, or the place's own."""
        return self.kl_estimator or ("k3" if self.kl_place == "loss" else "k1")

    @property
    def whitens_advantages(self) -> bool:
        """`whiten_advantages`, or the algorithm's own."""
        return self.has_critic if self.whiten_advantages is None else self.whiten_advantages
