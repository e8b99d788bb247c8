"""Ranks that share the tokens of rows against one process that holds them all.

Shapes: B rows, T tokens, H heads, K head width.
"""

import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor, nn

from llama2.batches import TokenBatch, TokenSequence, pack
from llama2.config import SIZES, ModelConfig
from llama2.losses import IGNORE, next_token_loss, ranking_loss
from llama2.model import ScalarModel, Transformer, Trunk
from llama2.sequence_parallel import SequenceParallel, check_degree, groups

LONG = [[9, 14, 3, 6], [21, 5], [4, 2, 2, 2, 13, 8]]
SHORT = [[5], [7]]  # the first rank alone has targets
WIDTH = 37  # no multiple of two or four: the rows are padded


@dataclass(frozen=True)
class Case:
    key_value_heads: int = 4
    documents: tuple[tuple[int, ...], ...] = tuple(map(tuple, LONG))
    checkpointing: bool = False
    scalar: bool = False


CASES = {
    "multi-head": Case(),
    "grouped-query": Case(key_value_heads=2),
    "multi-query": Case(key_value_heads=1),
    "checkpointing": Case(key_value_heads=2, checkpointing=True),
    "idle ranks": Case(key_value_heads=2, documents=tuple(map(tuple, SHORT))),
    "scores": Case(key_value_heads=2, documents=((30,), (12,), (9,), (22,)), scalar=True),
}
DEGREES = (2, 4)  # of four ranks: two groups that take different rows, and one


class HeadsInWrongOrder(SequenceParallel):
    def heads(self, x_BTHK: Tensor) -> Tensor:
        return torch.cat(super().heads(x_BTHK).chunk(self.degree, dim=1)[::-1], dim=1)


class TokensInWrongOrder(SequenceParallel):
    def tokens(self, x_BTHK: Tensor) -> Tensor:
        return torch.cat(super().tokens(x_BTHK).chunk(self.degree, dim=2)[::-1], dim=2)


class PositionsFromZero(SequenceParallel):
    def share(self, batch: TokenBatch) -> TokenBatch:
        mine = super().share(batch)
        self.mine = lambda x_BT: x_BT.chunk(self.degree, dim=1)[0]  # type: ignore[method-assign]
        return mine


BROKEN = (HeadsInWrongOrder, TokensInWrongOrder, PositionsFromZero)


def build(case: Case) -> Transformer | ScalarModel:
    config = ModelConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=88,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=case.key_value_heads,
    )
    model = ScalarModel(config) if case.scalar else Transformer(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            centre, spread = (0.0, 0.15) if parameter.dim() > 1 else (1.0, 0.3)
            parameter.normal_(centre, spread, generator=generator)
    model.model.activation_checkpointing = case.checkpointing
    return model


def draw(case: Case) -> TokenBatch:
    rng = np.random.default_rng(0)
    rows = [
        [TokenSequence(rng.integers(0, 97, n + 1), rng.random(n + 1) < 0.7) for n in row]
        for row in case.documents
    ]
    return pack(rows, WIDTH)


def measure(
    case: Case, model: nn.Module, batch: TokenBatch, total: int, whole: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """This rank's part of the loss, and what the model says of each of its tokens, [B, T]."""
    if case.scalar:
        real_BT = batch.segments_BT > 0
        is_last_BT = real_BT & (real_BT.cumsum(dim=1) == real_BT.sum(dim=1, keepdim=True))
        trunk = model.model
        assert isinstance(trunk, Trunk)
        mine_BT = trunk.sequence_parallel.mine(is_last_BT)
        scores_B = whole(model(batch.tokens_BT, batch.segments_BT, mine_BT))[is_last_BT]
        loss = ranking_loss(scores_B[0::2], scores_B[1::2], torch.zeros_like(scores_B[::2]), total)
        with torch.no_grad():
            return loss, model(batch.tokens_BT, batch.segments_BT)
    logprobs_N = model(batch.tokens_BT, batch.segments_BT, targets_BT=batch.targets_BT)
    logprobs_BT = torch.zeros(batch.tokens_BT.shape, device=logprobs_N.device)
    logprobs_BT[batch.targets_BT != IGNORE] = logprobs_N.detach()
    return next_token_loss(logprobs_N, total), logprobs_BT


def terms(case: Case) -> int:
    return len(case.documents) // 2 if case.scalar else int((draw(case).targets_BT != IGNORE).sum())


def alone(case: Case) -> dict[str, Tensor]:
    model, batch = build(case), draw(case)
    loss, outputs_BT = measure(case, model, batch, terms(case), lambda x_BT: x_BT)
    loss.backward()
    return {"loss": loss.detach(), "outputs": outputs_BT} | gradients(model)


def shared(case: Case, parallel: SequenceParallel, device: torch.device) -> dict[str, Tensor]:
    """The same on all ranks together; losses and gradients are added over all of them."""
    model = build(case).to(device)
    hook(model, parallel)
    number, count = dist.get_rank() // parallel.degree, dist.get_world_size() // parallel.degree
    whole = draw(case).to(device)
    rows = [tensor.chunk(count)[number] for tensor in vars(whole).values()]
    batch = parallel.share(TokenBatch(*rows))
    total = terms(case) * (parallel.degree if case.scalar else 1)
    loss, outputs_BT = measure(case, model, batch, total, parallel.gather)
    loss.backward()
    sums = {"loss": loss.detach()} | gradients(model)
    for tensor in sums.values():
        dist.all_reduce(tensor)
    # Every rank writes its own tokens' outputs into their places.
    place = torch.zeros(whole.tokens_BT.shape[0], parallel.degree * outputs_BT.shape[1])
    place = place.to(outputs_BT)
    place.chunk(count)[number].chunk(parallel.degree, dim=1)[parallel.rank].copy_(outputs_BT)
    dist.all_reduce(place)
    return {"outputs": place[:, :WIDTH]} | sums


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def exchanged(parallel: SequenceParallel, device: torch.device) -> list[Tensor]:
    """What `heads`, `tokens` and `gather` make of numbered entries, [2, 3 P, 8, 2], bfloat16."""
    numbers = torch.arange(96 * parallel.degree).view(2, -1, 8, 2).bfloat16().to(device)
    mine = parallel.mine(numbers)
    heads = parallel.heads(mine)
    few = parallel.heads(mine[:, :, :2])
    back = parallel.tokens(heads)
    same = torch.tensor(torch.equal(back, mine) and torch.equal(parallel.gather(mine), numbers))
    return [heads.cpu(), few.cpu(), same]


def worker(rank: int, world: int, port: int, folder: Path, backend: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    if backend == "nccl":
        torch.cuda.set_device(device)
    dist.init_process_group(backend, rank=rank, world_size=world)
    found = {}
    for degree in [degree for degree in DEGREES if degree <= world]:
        parallel = SequenceParallel.of(degree)
        found |= {(n, degree): shared(case, parallel, device) for n, case in CASES.items()}
        for kind in BROKEN:
            broken = kind(parallel.group)
            found[kind.__name__, degree] = shared(CASES["grouped-query"], broken, device)
        torch.save(exchanged(parallel, device), folder / f"exchanged-{degree}-{rank}.pt")
    if rank == 0:
        on_cpu = {name: {k: t.cpu() for k, t in values.items()} for name, values in found.items()}
        torch.save(on_cpu, folder / "found.pt")
    dist.destroy_process_group()


def spawn(world: int, folder: Path, backend: str) -> Path:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(worker, (world, port, folder, backend), nprocs=world)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return spawn(max(DEGREES), tmp_path_factory.mktemp("shared"), "gloo")


def compare(folder: Path, name: str, degree: int, atol: float) -> None:
    found, expected = torch.load(folder / "found.pt")[name, degree], alone(CASES[name])
    assert set(found) == set(expected)
    for key, tensor in expected.items():
        assert tensor.abs().max() > 0, f"{key} would agree by being nothing"
        torch.testing.assert_close(found[key], tensor, atol=atol, rtol=1e-5, msg=key)


@pytest.mark.parametrize("degree", DEGREES)
@pytest.mark.parametrize("name", CASES)
def test_losses_and_gradients_are_those_of_one_process(
    folder: Path, name: str, degree: int
) -> None:
    compare(folder, name, degree, 1e-5)


@pytest.mark.parametrize("degree", DEGREES)
@pytest.mark.parametrize("kind", BROKEN)
def test_a_wrong_exchange_is_noticed(
    folder: Path, kind: type[SequenceParallel], degree: int
) -> None:
    """The comparison above would show nothing if order and positions made no difference."""
    found = torch.load(folder / "found.pt")[kind.__name__, degree]
    expected = alone(CASES["grouped-query"])
    assert (found["loss"] - expected["loss"]).abs() > 1e-3
    assert (found["outputs"] - expected["outputs"]).abs().max() > 0.1
    name = "model.layers.0.self_attn.k_proj.weight"
    assert (found[name] - expected[name]).abs().max() > 1e-3


@pytest.mark.parametrize("degree", DEGREES)
def test_each_rank_gets_all_tokens_of_its_heads(folder: Path, degree: int) -> None:
    numbers = torch.arange(96 * degree).view(2, -1, 8, 2).bfloat16()
    for path in folder.glob(f"exchanged-{degree}-*.pt"):
        rank = int(path.stem.rpartition("-")[2]) % degree
        heads, few, came_back = torch.load(path)
        assert torch.equal(heads, numbers[:, :, rank * 8 // degree : (rank + 1) * 8 // degree])
        # Of two heads, four ranks share each by twos.
        one = rank * 2 // degree
        assert torch.equal(few, numbers[:, :, one : one + 1])
        assert came_back


def test_repeated_key_value_heads_meet_their_query_heads() -> None:
    """12 query heads share 6 key/value heads by twos; of 4 ranks, each has 3 and 3 of them."""

    class Repeats(SequenceParallel):
        def _exchange(self, parts: Tensor) -> Tensor:
            return parts[self.rank][None]  # one token: what I would send to myself

    for rank in range(4):
        parallel = Repeats()
        parallel.degree, parallel.rank = 4, rank
        query = parallel.heads(torch.arange(12.0).view(1, 1, 12, 1)).flatten()
        key = parallel.heads(torch.arange(6.0).view(1, 1, 6, 1)).flatten()
        assert torch.equal(key.repeat_interleave(len(query) // len(key)), query // 2)


def test_share_pads_rows_and_keeps_whole_segments() -> None:
    parallel = SequenceParallel()
    parallel.degree, parallel.rank = 2, 1
    batch = TokenBatch(
        torch.tensor([[11, 12, 13, 14, 15]]),
        torch.tensor([[1, 1, 2, 2, 2]]),
        torch.tensor([[12, IGNORE, 14, 15, 16]]),
    )
    share = parallel.share(batch)
    assert share.tokens_BT.tolist() == [[14, 15, 0]]
    assert share.targets_BT.tolist() == [[15, 16, IGNORE]]
    assert share.segments_BT.tolist() == [[1, 1, 2, 2, 2, 0]]


def test_a_single_rank_is_as_without() -> None:
    parallel, x = SequenceParallel(), torch.randn(2, 3, 4, 5)
    for same in (parallel.heads, parallel.tokens, parallel.gather, parallel.mine):
        assert torch.equal(same(x), x)
    batch = draw(CASES["multi-head"])
    for before, after in zip(
        vars(batch).values(), vars(parallel.share(batch)).values(), strict=True
    ):
        assert torch.equal(before, after)


def test_groups_are_of_consecutive_ranks() -> None:
    assert groups(6, 2) == [[0, 1], [2, 3], [4, 5]]
    assert groups(3, 1) == [[0], [1], [2]]
    with pytest.raises(ValueError, match="6 workers cannot form sequence groups of 4; set"):
        groups(6, 4)


def test_degrees_that_do_not_fit_the_heads() -> None:
    check_degree(SIZES["tiny"], 4)  # 4 heads on 2 key/value heads
    check_degree(SIZES["70b"], 64)
    with pytest.raises(ValueError, match=r"3 does not divide the model's 4 .* one of 1, 2, 4"):
        check_degree(SIZES["tiny"], 3)


@pytest.mark.gpu
def test_two_gpus(tmp_path: Path) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("NCCL needs a GPU for each rank; this machine has fewer than two")
    folder = spawn(2, tmp_path, "nccl")
    for name in CASES:
        compare(folder, name, 2, 1e-4)


def hook(model: Transformer | ScalarModel, parallel: SequenceParallel) -> None:
    model.model.sequence_parallel = parallel
