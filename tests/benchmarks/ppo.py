"""How long an iteration of PPO takes, and which of its phases.

python -m tests.benchmarks.ppo

64 prompts of 64 tokens, 64 tokens of answer to each (nothing ends one earlier), policy, value,
reference and one reward model of 288 wide, 6 layers, 6 heads, 768 in the feed-forward layers and
32,000 tokens of vocabulary, with random weights in bfloat16; one pass in 8 minibatches of 8. It is
the job itself, with its actors, on a local Ray cluster of two cores, with the generators'
log-probabilities as those of before the update: the median of the iterations
after the first ones.
"""

import argparse
import json
import os
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch

from actors.generator_config import GeneratorConfig
from cluster.engine import EngineConfig
from cluster.placement import Workers
from cluster.run_directory import RunDirectory, read_json_lines
from cluster.session import ClusterConfig
from jobs import ppo
from jobs.configs import PPOConfig
from jobs.presets import preset
from llama2 import checkpoint
from llama2.chat import Message, encode_prompt
from llama2.config import ModelConfig
from llama2.generation import Sampling
from llama2.model import ScalarModel, Transformer, initialize
from llama2.tokenizer import Tokenizer, load_tokenizer
from tests.actors.small_tasks import TEXT, tokenizer_folder

CONFIG = ModelConfig(
    vocab_size=32_000, hidden_size=288, intermediate_size=768, num_hidden_layers=6,
    num_attention_heads=6, num_key_value_heads=6, max_position_embeddings=256,
)  # fmt: skip
SAMPLES, TOKENS, MINIBATCH = 64, 64, 8
WARMUP = 2
PHASES = ("publish", "generate", "score", "reference", "experience", "update")
WITHIN = ("update_policy", "update_value")
"""At the same time, both within the update."""
WORDS = TEXT.split()


def models(root: Path) -> Tokenizer:
    """A policy, a reward model and their tokenizer, which knows a few words."""
    tokenizer_folder(root / "tokenizer")
    tokenizer = load_tokenizer(root / "tokenizer")
    for seed, (name, kind) in enumerate((("policy", Transformer), ("reward", ScalarModel))):
        model = kind(CONFIG)
        initialize(model, CONFIG, seed)
        checkpoint.save(model.bfloat16(), root / name, tokenizer.files())
    return tokenizer


def prompt(number: int, tokenizer: Tokenizer) -> str:
    """Words of which the dialogue's encoding has `TOKENS` tokens."""
    drawn = torch.randint(len(WORDS), (TOKENS,), generator=torch.Generator().manual_seed(number))
    text = ""
    for word in (WORDS[i] for i in drawn.tolist()):
        for part in (f" {word}", *(f" {letter}" for letter in "abcde"), *"abcde"):
            longer = (text + part).strip()
            if len(encode_prompt(tokenizer, (Message("user", longer),))) <= TOKENS:
                text = longer
                break
    found = len(encode_prompt(tokenizer, (Message("user", text),)))
    assert found == TOKENS, f"the prompt has {found} tokens"
    return text


def config(root: Path, iterations: int, threads: int) -> PPOConfig:
    tokenizer = models(root)
    asked = [json.dumps({"prompt": prompt(i, tokenizer)}) for i in range(3 * SAMPLES)]
    (root / "prompts.jsonl").write_text("\n".join(asked) + "\n")
    both = Workers(cpus=0.2, threads=threads)
    tiny = preset("tiny").ppo
    return replace(
        tiny, ppo=replace(tiny.ppo, old_logprobs="generator"), runs=root, name="benchmark",
        policy=root / "policy",
        helpfulness_model=root / "reward", safety_reward="tests.benchmarks.harmless:safe",
        prompts=(root / "prompts.jsonl",), heldout_prompts=1, iterations=iterations,
        batch_size=SAMPLES, minibatch_size=MINIBATCH, micro_batch_size=MINIBATCH,
        max_new_tokens=TOKENS, eval_every=10_000, save_every=10_000, lr=1e-6, value_lr=1e-6,
        engine=EngineConfig(zero_stage=1, precision="bfloat16"), learner=both,
        generator=GeneratorConfig(count=2, cpus=0.1),
        reference=replace(both, cpus=0.1), rewards=replace(both, cpus=0.1),
        cluster=ClusterConfig(local_cpus=2),
    )  # fmt: skip


def show(run: RunDirectory, iterations: int) -> None:
    lines = read_json_lines(run.metrics)[WARMUP:iterations]
    assert {line["rollout/answer_tokens"] for line in lines} == {TOKENS}
    middle = {
        name: statistics.median(line[f"time/{name}"] for line in lines)
        for name in (*PHASES, *WITHIN, "iteration")
    }
    whole = middle.pop("iteration")
    middle["rest"] = whole - sum(middle[name] for name in PHASES)
    spread = sorted(line["time/iteration"] for line in lines)
    print(f"an iteration takes {whole:.2f} s ({spread[0]:.2f} to {spread[-1]:.2f} in {len(lines)})")
    for name, seconds in middle.items():
        print(f"  {name:<14} {seconds:6.3f} s {seconds / whole:6.1%}")


def main() -> None:
    """Print the median iteration and its phases."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--iterations", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    os.environ.setdefault("WANDB_MODE", "disabled")
    endless = Sampling(max_new_tokens=TOKENS, stop_ids=())
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(ppo, "_sampling", lambda *_: endless),
    ):
        made = config(Path(folder), options.iterations, options.threads)
        ppo.main(made)
        show(RunDirectory(made.runs, made.run_name("ppo")), options.iterations)


if __name__ == "__main__":
    main()
