"""Small models for the tests of the vLLM backend, and what it answers with them.

Shapes: T tokens, V vocabulary.
"""

from collections.abc import Sequence

import torch

from actors.generator_config import GeneratorConfig
from actors.vllm_backend import VllmBackend
from cluster import weights
from cluster.weights import Snapshot, Version
from llama2.config import ModelConfig
from llama2.generation import Completion, Sampling, Token
from llama2.model import Transformer

# Heads are grouped and the vocabulary is not a multiple of what vLLM pads it to.
CONFIG = ModelConfig(
    vocab_size=301,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    max_position_embeddings=288,
    initializer_range=0.2,
)
GENERATOR = GeneratorConfig(backend="vllm", max_batch_size=8, threads=1, cache_gib=0.05)
GREEDY = Sampling(temperature=0.0, max_new_tokens=16, stop_ids=())
PROMPTS = [[1, 5, 9, 33], list(range(2, 262)), [7], list(range(100, 120))]


def random_model(seed: int, config: ModelConfig = CONFIG) -> Transformer:
    torch.manual_seed(seed)
    return Transformer(config).eval()


def published(model: Transformer, number: int) -> Snapshot:
    """What replicas fetch: tied weights once."""
    return snapshot_of(
        [(name, weight.detach()) for name, weight in model.named_parameters()], number
    )


def snapshot_of(named: list[tuple[str, torch.Tensor]], number: int) -> Snapshot:
    """These weights in two buckets."""
    buckets = (weights.pack(named[:5]), weights.pack(named[5:]))
    return Snapshot(Version(number, weights.checksum(named)), buckets)


def finish(backend: VllmBackend) -> dict[str, list[Token]]:
    """Step until nothing is left to do."""
    found: dict[str, list[Token]] = {}
    while backend.busy:
        for token in backend.step():
            found.setdefault(token.id, []).append(token)
    return found


def answers(
    backend: VllmBackend,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    seeds: Sequence[int] | None = None,
) -> list[Completion]:
    for i, prompt in enumerate(prompts):
        backend.submit(str(i), prompt, sampling, seeds[i] if seeds else i)
    found = finish(backend)
    for tokens in found.values():
        assert all(token.finish_reason is None for token in tokens[:-1])
    return [
        Completion(
            [token.token for token in found[str(i)]],
            [token.logprob for token in found[str(i)]],
            found[str(i)][-1].finish_reason,  # type: ignore[arg-type]
        )
        for i in range(len(prompts))
    ]


@torch.no_grad()
def forward_logprobs(
    model: Transformer, prompt: Sequence[int], answer: Sequence[int]
) -> list[float]:
    """What a trainer computes for the answer's tokens."""
    tokens_T = torch.tensor([*prompt, *answer])
    logprobs_TV = model(tokens_T[None])[0].log_softmax(-1)
    places = range(len(prompt) - 1, len(tokens_T) - 1)
    return [float(logprobs_TV[place, tokens_T[place + 1]]) for place in places]
