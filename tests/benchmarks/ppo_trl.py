"""How long an iteration takes TRL's trainer on what `tests.benchmarks.ppo` measures.

pip install trl && python -m tests.benchmarks.ppo_trl

`PPOTrainer` in a process, with two threads and this project's allocator settings (without them
by `--plain`): 64 prompts of 64 tokens, 64 tokens of answer to each, four models of the same shape
in bfloat16, one pass in 8 minibatches of 8. The median of the iterations after the first ones.
"""

import argparse
import multiprocessing
import statistics
import sys
import tempfile
import time
from itertools import pairwise
from typing import Any

import torch

from llama2.checkpoint_config import CAUSAL, SCALAR, Architecture, config_to_hf
from tests.benchmarks.ppo import CONFIG, MINIBATCH, SAMPLES, TOKENS, WARMUP
from tests.benchmarks.side_by_side import THREADS, with_worker_environment


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

    def model(architecture: Architecture, kind: Any) -> Any:
        values = config_to_hf(CONFIG, architecture) | {"pad_token_id": 0}
        return kind(LlamaConfig.from_dict(values)).bfloat16()

    policy, reference = (model(CAUSAL, LlamaForCausalLM) for _ in range(2))
    reward, value = (model(SCALAR, LlamaForSequenceClassification) for _ in range(2))
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


def train(iterations: int) -> None:
    """Print the median iteration."""
    from transformers import TrainerCallback

    torch.set_num_threads(THREADS)
    ends: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        made = trainer(iterations, folder)
        made.add_callback(Clock())
        made.train()
    took = [after - before for before, after in pairwise(ends)][WARMUP - 1 :]
    print(
        f"TRL: an iteration takes {statistics.median(took):.2f} s "
        f"({min(took):.2f} to {max(took):.2f} in {len(took)})"
    )


def main() -> None:
    """Train in a process of its own, since the allocator reads its settings when one starts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--iterations", type=int, default=9)
    parser.add_argument("--plain", action="store_true")
    options = parser.parse_args()
    if not options.plain:
        with_worker_environment()
    process = multiprocessing.get_context("spawn").Process(target=train, args=[options.iterations])
    process.start()
    process.join()
    sys.exit(process.exitcode)


if __name__ == "__main__":
    main()
