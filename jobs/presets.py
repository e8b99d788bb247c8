"""Defaults of every job for each size: the embedded `tiny`, and the paper's hyperparameters.

`tiny` is chosen to go from nothing to PPO within minutes on two cores. The others are the paper's
numbers (sections 2.2, 3.1, 3.2.2 and 3.4.3); their workers are 80 GB GPUs.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from actors.generator_config import GeneratorConfig
from cluster.engine import EngineConfig
from cluster.placement import Workers, fast_bfloat16
from jobs.configs import PPOConfig, PretrainConfig, RewardModelConfig, SftConfig
from jobs.prepare_config import PrepareConfig
from llama2.config import SIZES
from llama2.ppo import PPOSettings


@dataclass(frozen=True)
class Preset:
    """One config per stage."""

    prepare: PrepareConfig
    pretrain: PretrainConfig
    sft: SftConfig
    helpfulness: RewardModelConfig
    safety: RewardModelConfig
    ppo: PPOConfig


def tiny() -> Preset:
    """A million parameters, the synthetic world, two workers that share two cores.

    In bfloat16 where this machine is fast at it, which halves the time.
    """
    model = SIZES["tiny"]
    precision: Literal["float32", "bfloat16"] = "bfloat16" if fast_bfloat16() else "float32"
    engine = EngineConfig(zero_stage=1, precision=precision)
    pair = Workers(count=2, cpus=0.5)
    small = Workers(cpus=0.1)
    reward = RewardModelConfig(
        kind="helpfulness", model=model, engine=engine, workers=pair,
        peak_lr=1e-3, warmup_steps=10, epochs=1, batch_rows=64, micro_batch_tokens=8192,
        eval_rows=512, eval_every=50, save_every=200,
    )  # fmt: skip
    return Preset(
        prepare=PrepareConfig(
            vocab_size=model.vocab_size, context=model.max_position_embeddings
        ),
        pretrain=PretrainConfig(
            model=model, engine=engine, workers=pair, peak_lr=4e-3,
            warmup_steps=20, epochs=1, batch_rows=16, micro_batch_tokens=2048,
            eval_rows=64, eval_every=100, save_every=200,
        ),
        sft=SftConfig(
            model=model, engine=engine, workers=pair, peak_lr=1e-3,
            warmup_steps=10, epochs=2, batch_rows=8, micro_batch_tokens=1024,
            eval_rows=32, eval_every=50, save_every=200,
        ),
        helpfulness=reward,
        safety=replace(reward, kind="safety"),
        ppo=PPOConfig(
            iterations=24, batch_size=256, minibatch_size=64, micro_batch_size=32,
            max_new_tokens=48, lr=1e-4, value_lr=1e-3, heldout_prompts=1024,
            ppo=PPOSettings(kl_coefficient=0.1), engine=engine, learner=pair,
            generator=GeneratorConfig(count=2, cpus=0.2),
            reference=replace(small, threads=2), rewards=small,  # one for each of two scores
            eval_every=12, save_every=8, timeout=300,
        ),
    )  # fmt: skip


def _paper(size: Literal["7b", "13b", "34b", "70b"], gpus: int) -> Preset:
    model = SIZES[size]
    large = size in ("34b", "70b")
    engine = EngineConfig(zero_stage=3, precision="bfloat16")
    group, one = Workers(count=gpus, gpus=1.0), Workers(gpus=1.0)
    reward = RewardModelConfig(
        preset=size, kind="helpfulness", model=model, engine=engine,
        workers=group, peak_lr=5e-6 if size == "70b" else 1e-5, warmup_steps=0, epochs=1,
        batch_rows=512, micro_batch_tokens=8192, activation_checkpointing=True, eval_rows=1024,
        other_share=0.5,
    )  # fmt: skip
    return Preset(
        prepare=PrepareConfig(preset=size, vocab_size=32_000, context=4096),
        pretrain=PretrainConfig(
            preset=size, model=model, engine=engine, workers=group,
            peak_lr=1.5e-4 if large else 3e-4, warmup_steps=2000, steps=500_000,
            batch_rows=1024, micro_batch_tokens=4096, activation_checkpointing=True,
            eval_rows=1024, eval_every=1000, save_every=1000,
        ),
        sft=SftConfig(
            preset=size, model=model, engine=engine, workers=group,
            peak_lr=2e-5, epochs=2, batch_rows=64, micro_batch_tokens=4096,
            activation_checkpointing=True, save_every=100,
        ),
        helpfulness=reward,
        safety=replace(reward, kind="safety", other_share=0.1, safety_weight=1.0),
        ppo=PPOConfig(
            preset=size, iterations=400, batch_size=512, minibatch_size=64,
            micro_batch_size=1, lr=1e-6, value_lr=1e-6,
            ppo=PPOSettings(kl_coefficient=0.005 if large else 0.01), engine=engine, learner=group,
            generator=GeneratorConfig(count=max(2, gpus // 4), gpus=1.0),
            reference=one, rewards=one,
            activation_checkpointing=True,
        ),
    )  # fmt: skip


PRESETS: dict[str, Callable[[], Preset]] = {
    "tiny": tiny,
    "7b": lambda: _paper("7b", gpus=8),
    "13b": lambda: _paper("13b", gpus=16),
    "34b": lambda: _paper("34b", gpus=32),
    "70b": lambda: _paper("70b", gpus=64),
}


def preset(name: str) -> Preset:
    """The preset of that name. Raises `ValueError` for an unknown one."""
    if name not in PRESETS:
        raise ValueError(f"There is no preset {name!r}; choose one of {', '.join(PRESETS)}.")
    return PRESETS[name]()
