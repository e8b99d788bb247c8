"""How fast vLLM generates on this machine's CPU; runs in the environment of `make vllm`.

.venv-vllm/bin/python -m tests.benchmarks.vllm_generation --help

Random bfloat16 weights, temperature 1, answers of a fixed length. After one run to warm up, the
best of several counts. Prints one line of JSON: answer tokens per second in the best run, and the
seconds of each; with --turns, the seconds of a run for every line that it reads.
"""

import argparse
import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from cluster.session import WORKER_ENVIRONMENT

RESERVED_IDS = 3


def options() -> argparse.Namespace:
    """The workload, from the command line; by default the smaller of the two that are reported."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden-size", type=int, default=288)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--intermediate-size", type=int, default=768)
    parser.add_argument("--vocab-size", type=int, default=32_000)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    parser.add_argument("--turns", action="store_true", help="a run for each line of input")
    return parser.parse_args()


def write_config(folder: Path, asked: argparse.Namespace) -> None:
    """The model's `config.json`; its weights are drawn by vLLM."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": asked.hidden_size,
        "num_hidden_layers": asked.layers,
        "num_attention_heads": asked.heads,
        "num_key_value_heads": asked.heads,
        "intermediate_size": asked.intermediate_size,
        "vocab_size": asked.vocab_size,
        "max_position_embeddings": asked.prompt_tokens + asked.new_tokens,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    (folder / "config.json").write_text(json.dumps(config))


def prepare(asked: argparse.Namespace) -> Callable[[], float]:
    """Start vLLM; what is returned runs the workload once and returns its seconds."""
    import numpy as np
    from vllm import LLM, SamplingParams

    with tempfile.TemporaryDirectory() as name:
        write_config(Path(name), asked)
        engine = LLM(
            name,
            skip_tokenizer_init=True,
            load_format="dummy",
            dtype="bfloat16",
            max_model_len=asked.prompt_tokens + asked.new_tokens,
            max_num_seqs=asked.requests,
            max_num_batched_tokens=max(2048, asked.requests * asked.prompt_tokens),
            enforce_eager=asked.eager,
            disable_log_stats=True,
        )
    generator = np.random.default_rng(0)
    sampling = SamplingParams(
        temperature=1.0, max_tokens=asked.new_tokens, ignore_eos=True, detokenize=False
    )

    def run() -> float:
        """Seconds of a batch; new prompts each time, so that none is found in the prefix cache."""
        shape = (asked.requests, asked.prompt_tokens)
        batch = generator.integers(RESERVED_IDS, asked.vocab_size, shape).tolist()
        started = time.perf_counter()
        requests = [{"prompt_token_ids": prompt} for prompt in batch]
        answers = engine.generate(requests, sampling, use_tqdm=False)
        taken = time.perf_counter() - started
        written = sum(len(answer.outputs[0].token_ids) for answer in answers)
        assert written == asked.requests * asked.new_tokens
        return taken

    return run


def main() -> None:
    """Measure with vLLM's own process for the model, which takes its environment from here."""
    asked = options()
    os.environ.update(WORKER_ENVIRONMENT)
    cores = sorted(os.sched_getaffinity(0))[: asked.threads]
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, cores))
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = "2"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ["VLLM_NO_USAGE_STATS"] = "1"
    # vLLM writes to standard output too, which is for the results alone.
    with contextlib.redirect_stdout(sys.stderr):
        run = prepare(asked)
        run()
    if asked.turns:
        for _ in sys.stdin:
            with contextlib.redirect_stdout(sys.stderr):
                taken = run()
            print(json.dumps({"seconds": taken}), flush=True)
        return
    with contextlib.redirect_stdout(sys.stderr):
        runs = [run() for _ in range(asked.runs)]
    tokens = asked.requests * asked.new_tokens
    print(json.dumps({"tokens_per_second": tokens / min(runs), "runs": runs}), flush=True)


if __name__ == "__main__":
    main()
