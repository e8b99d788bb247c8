"""How long an iteration takes TRL's trainer on what `tests.benchmarks.ppo` measures.

pip install trl && python -m tests.benchmarks.ppo_trl

`PPOTrainer` in this process, with two threads and this project's allocator settings (without them
by `--plain`): 64 prompts of 64 tokens, 64 tokens of answer to each, four models of the same shape
in bfloat16, one pass in 8 minibatches of 8. The median of the iterations after the first ones.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from itertools import pairwise
from typing import Any

import torch

from cluster.session import WORKER_ENVIRONMENT
from tests.benchmarks.ppo import CONFIG, MINIBATCH, SAMPLES, TOKENS, WARMUP

THREADS = 2


def with_settings() -> None:
    """Start this program again with the allocator settings, which are read before it begins."""
    settings = {
        name: value
        for name, value in WORKER_ENVIRONMENT.items()
        if name.startswith(("MALLOC_", "GLIBC_"))
    }
    if not settings.items() <= os.environ.items():
        os.execve(sys.executable, sys.orig_argv, os.environ | settings)


def trainer(iterations: int, folder: str) -> Any:
    """TRL's trainer, with random models and prompts."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        LlamaForSequenceClassification,
        PreTrainedTokenizerFast,
    )
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
             "num_attention_heads", "num_key_value_heads", "max_position_embeddings")  # fmt: skip
    shape = {name: getattr(CONFIG, name) for name in names} | {"pad_token_id": 0}
    policy, reference = (LlamaForCausalLM(LlamaConfig(**shape)).bfloat16() for _ in range(2))
    reward, value = (
        LlamaForSequenceClassification(LlamaConfig(**shape, num_labels=1)).bfloat16()
        for _ in range(2)
    )
    known = {f"t{i}": i for i in range(CONFIG.vocab_size)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(known, unk_token="t0")),
        pad_token="t0", eos_token="t1", padding_side="left",
    )  # fmt: skip
    prompts = torch.randint(3, CONFIG.vocab_size, (iterations * SAMPLES, TOKENS)).tolist()
    asked = Dataset.from_dict({"input_ids": prompts})
    arguments = PPOConfig(
        output_dir=folder, per_device_train_batch_size=MINIBATCH,
        gradient_accumulation_steps=SAMPLES // MINIBATCH, num_mini_batches=SAMPLES // MINIBATCH,
        num_ppo_epochs=1, total_episodes=iterations * SAMPLES, response_length=TOKENS,
        local_rollout_forward_batch_size=SAMPLES, num_sample_generations=0, report_to="none",
        use_cpu=True, bf16=False, temperature=1.0, save_strategy="no", learning_rate=1e-6,
        gradient_checkpointing=False,
    )  # fmt: skip
    return PPOTrainer(
        args=arguments, processing_class=tokenizer, model=policy, ref_model=reference,
        reward_model=reward, value_model=value, train_dataset=asked,
        eval_dataset=asked.select(range(SAMPLES)),
    )  # fmt: skip


def main() -> None:
    """Print the median iteration."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--iterations", type=int, default=9)
    parser.add_argument("--plain", action="store_true")
    options = parser.parse_args()
    if not options.plain:
        with_settings()
    from transformers import TrainerCallback

    torch.set_num_threads(THREADS)
    ends: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        made = trainer(options.iterations, folder)
        made.add_callback(Clock())
        made.train()
    took = [after - before for before, after in pairwise(ends)][WARMUP - 1 :]
    print(
        f"TRL: an iteration takes {statistics.median(took):.2f} s "
        f"({min(took):.2f} to {max(took):.2f} in {len(took)})"
    )


if __name__ == "__main__":
    main()
