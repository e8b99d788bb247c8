"""Pages as flash attention reads them, with a stand-in for it that checks what it demands and
computes the same on a CPU; captured graphs without the capturing.

Shapes: N tokens, H query heads, G key/value heads, K head width, R rows, P tokens of a page.
"""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.attention.varlen
from torch import Tensor
from torch.torch_version import TorchVersion

from llama2.config import ModelConfig
from llama2.generation import Engine, Sampling, graphs, runner
from llama2.generation.graphs import DecodingGraphs
from llama2.generation.varlen_cache import PAGE, VarlenCache, reads_pages
from llama2.model import Transformer, initialize

CONFIG = ModelConfig(
    vocab_size=500, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1024,
    initializer_range=0.2,
)  # fmt: skip


def attention(
    query_NHK: Tensor, keys: Tensor, values: Tensor, starts: Tensor, bounds: Tensor,
    longest_query: int, longest: int, *, window_size: tuple[int, int], enable_gqa: bool,
    seqused_k: Tensor, block_table: Tensor, num_splits: int,
) -> Tensor:  # fmt: skip
    """Causal attention of each row's last tokens over its pages. Flash attention 2 takes int32,
    and refuses paged keys without bounds of either side."""
    rows = len(starts) - 1
    for given, shape in (
        (starts, (rows + 1,)), (bounds, (rows + 1,)), (seqused_k, (rows,)),
        (block_table, (rows, block_table.shape[1])),
    ):  # fmt: skip
        assert given.dtype == torch.int32 and given.shape == shape and given.is_contiguous()
    assert (bounds.diff() == block_table.shape[1] * PAGE).all() and bounds[0] == 0
    assert window_size == (-1, 0) and num_splits == 1 and query_NHK.is_contiguous()
    assert enable_gqa == (query_NHK.shape[1] != keys.shape[2])
    mixed_NHK = torch.empty_like(query_NHK)
    for row in range(rows):
        first, end, seen = int(starts[row]), int(starts[row + 1]), int(seqused_k[row])
        assert end - first <= longest_query and end - first <= seen <= longest
        pages = block_table[row, : -(-seen // PAGE)].long()
        key, value = (
            x[pages].flatten(0, 1)[:seen].repeat_interleave(query_NHK.shape[1] // x.shape[2], 1)
            for x in (keys, values)
        )
        mask = torch.ones(end - first, seen, dtype=torch.bool).tril(seen - (end - first))
        heads_first = (x.transpose(0, 1) for x in (query_NHK[first:end], key, value))
        mixed = torch.nn.functional.scaled_dot_product_attention(*heads_first, attn_mask=mask)
        mixed_NHK[first:end] = mixed.transpose(0, 1)
    return mixed_NHK


class Uncaptured(DecodingGraphs):
    """Steps that are computed anew where a graph would be replayed, over the graph's memory."""

    replayed = 0

    def _capture(self, rows: int) -> graphs._Graph:
        memory = self._memory(rows)
        logits_RV = torch.empty((rows, CONFIG.vocab_size))

        def replay() -> None:
            self.replayed += 1
            logits_RV.copy_(self._step(memory))

        return graphs._Graph(memory, SimpleNamespace(replay=replay), logits_RV)  # type: ignore[arg-type]


@pytest.mark.parametrize("captured", [False, True])
def test_pages_give_what_the_engine_on_a_cpu_does(
    monkeypatch: pytest.MonkeyPatch, captured: bool
) -> None:
    model = Transformer(CONFIG).eval().requires_grad_(False)
    initialize(model, CONFIG, seed=3)
    generator = torch.Generator().manual_seed(0)
    lengths = (1, 2, 30, 255, 256, 257, 600)
    prompts = [torch.randint(3, 500, (n,), generator=generator).tolist() for n in lengths]
    prompts += [prompts[-1], [*prompts[-1][:300], 5, 6]]
    greedy = Sampling(temperature=0, max_new_tokens=20, stop_ids=())
    expected = [c.tokens for c in Engine(model, chunk=200).generate(prompts, greedy)]
    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", attention)
    monkeypatch.setattr(runner, "BagCache", VarlenCache)
    monkeypatch.setattr(runner, "DecodingGraphs", Uncaptured)
    engine = Engine(model, chunk=200, cache_tokens=8 * PAGE)  # some must wait, and give way
    decoding = engine._runner._decoding
    assert isinstance(decoding, runner._Operators)
    if not captured:
        decoding._graphs = None
    assert [c.tokens for c in engine.generate(prompts, greedy)] == expected
    assert engine.counters.reused > 0
    if captured:
        assert isinstance(decoding._graphs, Uncaptured) and decoding._graphs.replayed > 20


def test_pages_are_for_gpus_and_not_for_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda")
    for version, reads in (("2.11.0", False), ("2.12.1", False), ("2.13.0+cu130", True)):
        monkeypatch.setattr(torch, "__version__", TorchVersion(version))
        assert reads_pages(torch.bfloat16, gpu) == reads
    assert not reads_pages(torch.float32, gpu)
    assert not reads_pages(torch.bfloat16, torch.device("cpu"))
