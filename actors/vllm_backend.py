"""vLLM in the place of this project's own engine, in an environment where it is installed."""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from actors.backend import PRECISIONS
from actors.generator_config import GeneratorConfig
from cluster.weights import Snapshot, Version
from llama2 import checkpoint
from llama2.config import ModelConfig
from llama2.generation import Sampling, Token
from llama2.generation.request import Alternatives, check_prompt

SEEDS = 1 << 63
"""vLLM's seeds are 64-bit integers, and -1 means none."""
BLOCK = 128
"""Tokens whose keys and values vLLM allots at a time on a CPU."""


class VllmBackend:
    """vLLM's engine, stepped in this process, on the model of a folder.

    With `config.tensor_parallel` above 1 it starts that many worker processes; else the model is in
    this one. The same seed draws other tokens than `llama2.generation` does. Raises `ValueError`
    for a folder or a setting that vLLM cannot take.
    """

    def __init__(self, folder: Path, config: GeneratorConfig, precision: str) -> None:
        self._model = _check(folder, config)
        on_cpu = not torch.cuda.is_available()
        _prepare_process(config)
        # Only now: vLLM reads the environment while it is imported.
        from vllm import EngineArgs, LLMEngine
        from vllm.config import WeightTransferConfig

        import actors.vllm_worker  # noqa: F401  registers what the next lines name

        room = _cache_bytes(self._model, config, PRECISIONS[precision], on_cpu)
        self._engine = LLMEngine.from_engine_args(
            EngineArgs(
                model=str(folder),
                load_format="llama2",
                worker_extension_cls="actors.vllm_worker.WorkerExtension",
                weight_transfer_config=WeightTransferConfig(backend="snapshot"),
                skip_tokenizer_init=True,
                generation_config="vllm",  # `Sampling` says it all, the folder nothing
                dtype=precision,
                max_model_len=self._model.max_position_embeddings,
                max_num_seqs=config.max_batch_size,
                kv_cache_memory_bytes=room,
                tensor_parallel_size=config.tensor_parallel,
                enable_prefix_caching=True,
                enforce_eager=on_cpu,
                disable_log_stats=True,
            )
        )
        self._running: dict[str, int] = {}
        """Requests, with the alternatives that each asks for."""
        self._engine.collective_rpc("init_weight_transfer_engine", args=({},))
        self._try(folder)

    @property
    def busy(self) -> bool:
        """Whether a request is unfinished."""
        return bool(self._running)

    def submit(self, id: str, prompt: Sequence[int], sampling: Sampling, seed: int) -> None:
        """Take a request, whose id no unfinished one has. Its draws are a function of `seed`.

        Raises `ValueError` for a prompt that is empty, holds ids outside the vocabulary, or leaves
        no room in the context.
        """
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        assert id not in self._running, f"request {id} is not finished"
        check_prompt(prompt, self._model, "The prompt")
        parameters = SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            max_tokens=sampling.max_new_tokens,
            stop_token_ids=list(sampling.stop_ids),
            ignore_eos=True,  # `stop_ids` names every token that ends an answer
            seed=seed % SEEDS,
            # Before temperature and truncation; the drawn token's in any case.
            logprobs=sampling.alternatives,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        self._engine.add_request(id, {"prompt_token_ids": list(prompt)}, parameters)
        self._running[id] = sampling.alternatives

    def step(self) -> list[Token]:
        """One pass through the model: the next token of every request whose prompt is computed.

        Raises `FloatingPointError` where the model gives no numbers.
        """
        found = []
        for output in self._engine.step():
            (answer,) = output.outputs
            (token,), (entry,) = answer.token_ids, answer.logprobs
            if answer.finish_reason not in (None, "stop", "length"):
                raise RuntimeError(
                    f"vLLM gave up request {output.request_id} ({answer.finish_reason}); "
                    "its log says why."
                )
            if math.isnan(entry[token].logprob):
                raise FloatingPointError(
                    f"The model gives no number behind a token of request {output.request_id}; "
                    "its weights are damaged."
                )
            logprob, reason = entry[token].logprob, answer.finish_reason
            told = _likeliest(entry, self._running[output.request_id])
            found.append(Token(output.request_id, token, logprob, reason, told))
            if reason:
                del self._running[output.request_id]
        return found

    def cancel(self, id: str) -> None:
        """Give up a request; one that is unknown or has ended is left as it is."""
        if id in self._running:
            del self._running[id]
            self._engine.abort_request([id])

    def load(self, snapshot: Snapshot) -> Version:
        """Write these weights over the model's, while not busy, and forget what the cache holds of
        the old ones. Returns what the model then holds, summed up afresh."""
        assert not self.busy, "requests are unfinished"
        call = self._engine.collective_rpc
        call("start_weight_update")
        for bucket in snapshot.buckets:
            call("update_weights", args=({"bucket": bucket},))
        call("finish_weight_update")
        forgotten = self._engine.reset_prefix_cache()
        assert forgotten, "vLLM keeps keys and values of the weights before"
        fields = [field for bucket in snapshot.buckets for field in bucket.fields]
        checksums = call("held_checksum", args=(fields,))
        assert len(set(checksums)) == 1, "workers that hold parts of one model disagree on it"
        return Version(snapshot.version.number, checksums[0])

    def _try(self, folder: Path) -> None:
        """Answer one prompt, since some shapes are refused only then."""
        self.submit("first", [0], Sampling(temperature=0.0, max_new_tokens=1, stop_ids=()), 0)
        try:
            while self.busy:
                self.step()
        except RuntimeError as error:
            if "Unsupported CPU attention" not in str(error):
                raise
            raise ValueError(
                f"vLLM has no attention for heads {self._model.head_width} wide on a CPU "
                f"({folder}/config.json); choose --generator.backend own."
            ) from error


def _likeliest(entry: Mapping[int, Any], count: int) -> Alternatives:
    """Of what vLLM tells of a place, the `count` likeliest tokens: the drawn one is told too."""
    ranked = sorted(entry.items(), key=lambda told: told[1].rank)
    return tuple((token, told.logprob) for token, told in ranked[:count])


def _check(folder: Path, config: GeneratorConfig) -> ModelConfig:
    """The model's config. Raises as `checkpoint.check_folder` does, and for what vLLM lacks."""
    model = checkpoint.check_folder(folder, scalar=False)
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{folder} has no config.json, which vLLM reads; save the model in Hugging Face's "
            "layout, or choose --generator.backend own."
        )
    if model.num_attention_heads % config.tensor_parallel:
        raise ValueError(
            f"tensor_parallel {config.tensor_parallel} does not divide the model's "
            f"{model.num_attention_heads} attention heads; choose another."
        )
    return model


def _prepare_process(config: GeneratorConfig) -> None:
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine is stepped here
        "VLLM_NO_USAGE_STATS": "1",
        "OMP_NUM_THREADS": str(config.threads),  # without it vLLM takes one
        "VLLM_CPU_OMP_THREADS_BIND": _cores(config),
    }
    torch.set_num_threads(config.threads)


def _cores(config: GeneratorConfig) -> str:
    """Cores of each worker process: by itself vLLM gives one a whole memory node."""
    cores = sorted(os.sched_getaffinity(0))
    places = range(config.tensor_parallel * config.threads)
    named = [str(cores[place % len(cores)]) for place in places]
    starts = places[:: config.threads]
    return "|".join(",".join(named[start : start + config.threads]) for start in starts)


def _cache_bytes(
    model: ModelConfig, config: GeneratorConfig, dtype: torch.dtype, on_cpu: bool
) -> int | None:
    """Memory for keys and values in each worker; None leaves it to vLLM, which measures a GPU."""
    if config.cache_gib:
        return int(config.cache_gib * 2**30 / config.tensor_parallel)
    if not on_cpu:
        return None
    heads = max(1, model.num_key_value_heads // config.tensor_parallel)
    block = 2 * model.num_hidden_layers * heads * model.head_width * dtype.itemsize * BLOCK
    blocks = -(-model.max_position_embeddings // BLOCK)
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    wanted = config.max_batch_size * blocks + 1  # one stays unused
    return block * max(blocks + 1, min(wanted, free // 4 // block))
