"""DeepSpeed against a plain torch loop: any ZeRO stage, ranks and split give the same losses."""

import ctypes
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed
from torch import Tensor, nn

from cluster.engine import Engine, EngineConfig
from cluster.fragments import Fragment
from tests.cluster.gloo import (
    STEPS,
    Net,
    State,
    data,
    differences,
    loss,
    run_group,
    run_on_gpu,
    schedule,
    train,
    whole_state,
)

# Precision, ZeRO stage, where the optimizer state and the weights are.
CASES = [
    ("float32", 0, "none"),
    ("float32", 1, "none"),
    ("float32", 2, "none"),
    ("float32", 3, "none"),
    ("bfloat16", 1, "none"),
    ("bfloat16", 2, "none"),
    ("bfloat16", 3, "none"),
    ("float32", 1, "cpu"),
    ("bfloat16", 2, "cpu"),
    ("float32", 3, "cpu"),
]
Case = tuple[str, int, str]


def plain() -> tuple[list[float], list[float]]:
    """Losses and gradient norms of the same training with torch alone, decay on matrices only."""
    net, config, losses, norms = Net(), EngineConfig(), [], []
    groups = [
        {"params": [p for p in net.parameters() if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in net.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(config.beta1, config.beta2), eps=config.epsilon)
    for step, (x, labels) in enumerate(data()):
        value = loss(net(x), labels)
        value.backward()
        norms.append(float(nn.utils.clip_grad_norm_(net.parameters(), config.clip_grad_norm)))
        for group in optimizer.param_groups:
            group["lr"] = schedule(step)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(value))
    return losses, norms


def fill_from(state: State) -> Callable[[Fragment], None]:
    def fill(fragment: Fragment) -> None:
        for kind, view in fragment.tensors.items():
            view.copy_(state[fragment.name, kind][fragment.start :][: len(view)])

    return fill


def run(case: Case, width: int = 15, nvme_path: Path | None = None) -> dict[str, Any]:
    """Train; go on from the third step in another engine, with a distraction; meet a NaN."""
    precision, stage, offload = case
    weights = offload if stage == 3 else "none"
    if precision == "float32" and weights == "nvme":
        weights = "cpu"
    config = EngineConfig(
        zero_stage=stage,  # type: ignore[arg-type]
        precision=precision,  # type: ignore[arg-type]
        offload_optimizer=offload,  # type: ignore[arg-type]
        offload_parameters=weights,  # type: ignore[arg-type]
        nvme_path=nvme_path,
    )
    engine = Engine(Net(width), config, schedule)
    fresh = whole_state(engine)
    losses, norms = train(engine, 0, 3, split=2)
    state = whole_state(engine)
    later, later_norms = train(engine, 3, STEPS, split=3)
    end = whole_state(engine)
    engine.close()

    other = Net(width)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1.0)
    resumed = Engine(other, config, schedule)
    resumed.restore(fill_from(state), updates=3, applied=3)
    x, labels = (tensor.to(resumed.device) for tensor in data()[0])
    dtype = next(resumed.module.parameters()).dtype
    for _ in range(2):
        resumed.backward(100 * loss(resumed(x.to(dtype)), labels))
    resumed.discard()
    again, again_norms = train(resumed, 3, STEPS, split=3)
    resumed_end = whole_state(resumed)
    resumed.backward(math.nan * loss(resumed(x.to(dtype)), labels))
    nan_norm = resumed.step()["grad_norm"]
    in_use = {name: tensor.float().cpu().clone() for name, tensor in resumed.weights()}
    found = {
        "losses": losses + later,
        "norms": norms + later_norms,
        "fresh": fresh,
        "end": end,
        "again": again,
        "again norms": again_norms,
        "resumed end": resumed_end,
        "nan norm": nan_norm,
        "after nan": whole_state(resumed),
        "counts": (resumed.updates, resumed.applied),
        "weights": in_use,
    }
    # An engine in the middle of its life takes over a state as well.
    resumed.restore(fill_from(state), updates=3, applied=3)
    found["back"] = train(resumed, 3, STEPS, split=3)
    resumed.close()
    return found


def worker(cases: list[Case], path: Path) -> None:
    found = {case: run(case) for case in cases}
    if torch.distributed.get_rank() == 0:
        torch.save(found, path)


@pytest.fixture(scope="module", params=[1, 2], ids=["one-rank", "two-ranks"])
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> "Found":
    path = tmp_path_factory.mktemp("engine") / "found.pt"
    run_group(request.param, worker, CASES, path)
    return torch.load(path)


Found = dict[Case, dict[str, Any]]


@pytest.mark.parametrize("case", CASES)
def test_losses_and_norms_equal_plain_torch(found: Found, case: Case) -> None:
    losses, norms = plain()
    tolerance = 2e-6 if case[0] == "float32" else 0.02
    assert found[case]["losses"] == pytest.approx(losses, abs=tolerance)
    assert found[case]["norms"] == pytest.approx(norms, rel=5 * tolerance)


@pytest.mark.parametrize("case", CASES)
def test_a_restored_engine_goes_on_to_the_bit_and_discarded_gradients_leave_no_trace(
    found: Found, case: Case
) -> None:
    assert found[case]["again"] == found[case]["losses"][3:]
    assert found[case]["again norms"] == found[case]["norms"][3:]
    assert found[case]["back"] == (found[case]["losses"][3:], found[case]["norms"][3:])
    assert differences(found[case]["resumed end"], found[case]["end"]) == []


@pytest.mark.parametrize("case", CASES)
def test_gradients_that_are_not_finite_leave_the_weights_as_they_are(
    found: Found, case: Case
) -> None:
    assert not math.isfinite(found[case]["nan norm"])
    assert differences(found[case]["after nan"], found[case]["resumed end"]) == []
    assert found[case]["counts"] == (STEPS + 1, STEPS)


@pytest.mark.parametrize("case", CASES)
def test_weights_in_use_are_the_masters(found: Found, case: Case) -> None:
    weights = found[case]["weights"]
    assert set(weights) == set(Net().state_dict())
    for name, tensor in weights.items():
        master = found[case]["end"][name, "weight"]
        dtype = getattr(torch, case[0])
        assert torch.equal(tensor.flatten(), master.to(dtype).float())


@pytest.mark.parametrize("case", CASES)
def test_state_before_the_first_step(found: Found, case: Case) -> None:
    for (name, kind), tensor in found[case]["fresh"].items():
        start = Net().state_dict()[name].flatten().to(getattr(torch, case[0])).float()
        assert torch.equal(tensor, start if kind == "weight" else torch.zeros_like(start))


def test_all_stages_end_with_the_same_state(found: Found) -> None:
    reference = found["float32", 0, "none"]["end"]
    for case in CASES:
        if case[0] == "float32":
            for key, tensor in found[case]["end"].items():
                torch.testing.assert_close(tensor, reference[key], atol=2e-6, rtol=0)


def unfilled() -> Net:
    with torch.device("meta"):
        return Net()


def streamed() -> None:
    for precision in ("float32", "bfloat16"):
        config = EngineConfig(
            zero_stage=3,
            precision=precision,  # type: ignore[arg-type]
            offload_optimizer="cpu",
            offload_parameters="cpu",
        )
        # In an order of their own; what rank 0 has counts, and only it reads.
        reads = torch.distributed.get_rank() == 0
        weights = reversed(Net().state_dict().items())
        held = ((name, w if reads else torch.full_like(w, math.nan)) for name, w in weights)
        engine = Engine(unfilled(), config, schedule, held)
        found = train(engine, 0, STEPS, split=2), whole_state(engine)
        engine.close()
        engine = Engine(Net(), config, schedule)
        assert found[0] == train(engine, 0, STEPS, split=2)
        assert differences(found[1], whole_state(engine)) == []
        engine.close()
    with pytest.raises(AssertionError, match=r"no weight for last\.bias"):
        Engine(unfilled(), config, schedule, list(Net().state_dict().items())[:-1])


def test_offloaded_weights_that_come_one_at_a_time_are_those_of_a_whole_module() -> None:
    run_group(2, streamed)


LAYERS, WIDTH = 24, 1024
MEGABYTES = LAYERS * WIDTH * WIDTH * 4 / 1e6


def memory() -> float:
    """Megabytes that this process holds, without the pages of files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024 / 1e6


def peaks(path: Path) -> None:
    """The most memory that filling a model of `MEGABYTES` takes, under ZeRO 3 and under ZeRO 2."""
    found = {}
    # Have malloc give memory back that is freed: -3 is glibc's M_MMAP_THRESHOLD, in bytes.
    ctypes.CDLL(None).mallopt(-3, 1 << 20)
    for stage in (3, 2):
        with torch.device("meta"):
            module = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, False) for _ in range(LAYERS)))
        config = EngineConfig(zero_stage=stage)  # type: ignore[arg-type]
        seen: list[float] = []

        def weights(seen: list[float] = seen) -> Iterator[tuple[str, Tensor]]:
            for layer in range(LAYERS):
                weight = torch.full((WIDTH, WIDTH), float(layer))
                seen.append(memory())
                yield f"{layer}.weight", weight
            seen.append(memory())

        engine = Engine(module, config, schedule, weights())
        for layer, (_, weight) in enumerate(engine.weights()):
            assert torch.equal(weight, torch.full((WIDTH, WIDTH), float(layer)))
        engine.close()
        found[stage] = max(seen) - seen[0]
    torch.save(found, path.with_suffix(f".{torch.distributed.get_rank()}"))


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="needs Linux's /proc")
def test_no_rank_holds_the_whole_model_while_it_is_filled(tmp_path: Path) -> None:
    run_group(2, peaks, tmp_path / "peaks.pt")
    for rank in range(2):
        found = torch.load(tmp_path / f"peaks.{rank}")
        # Half of the model and no more than three layers; without cutting it is the whole.
        assert found[3] < MEGABYTES * (1 / 2 + 3 / LAYERS)
        assert found[2] > MEGABYTES * 0.9


def without_libaio() -> None:
    config = EngineConfig(zero_stage=3, offload_optimizer="nvme", nvme_path=Path("nowhere"))
    builder = "deepspeed.ops.op_builder.cpu.async_io.AsyncIOBuilder.is_compatible"
    with (
        mock.patch(builder, return_value=False),
        pytest.raises(ValueError, match=r"needs libaio .* install them"),
    ):
        Engine(Net(), config, schedule)


def test_a_machine_that_cannot_use_nvme_says_what_it_lacks() -> None:
    run_group(1, without_libaio)


def on_nvme(root: Path) -> None:
    """State that is large enough to go to the disk comes back from it as it was."""
    for precision in ("float32", "bfloat16"):
        found = run((precision, 3, "nvme"), 200_000, root / "nvme")
        reference = run((precision, 3, "none"), 200_000)
        assert list((root / "nvme").rglob("*.swp"))
        assert found["losses"] == pytest.approx(reference["losses"], rel=1e-4)
        assert found["again"] == found["losses"][3:]
        assert found["again norms"] == found["norms"][3:]
        assert differences(found["resumed end"], found["end"]) == []
        assert differences(found["after nan"], found["end"]) == []
        assert differences(found["fresh"], reference["fresh"]) == []


@pytest.mark.gpu
def test_state_on_nvme_is_restored(tmp_path: Path) -> None:
    run_on_gpu(on_nvme, tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"offload_parameters": "cpu"}, "offload_parameters needs zero_stage 3"),
        ({"offload_optimizer": "cpu", "zero_stage": 0}, "offload_optimizer needs zero_stage 1"),
        ({"offload_optimizer": "nvme", "zero_stage": 2}, "'nvme' needs zero_stage 3"),
        ({"offload_optimizer": "nvme", "zero_stage": 3}, "'nvme' needs nvme_path"),
        (
            {"offload_parameters": "nvme", "zero_stage": 3, "precision": "bfloat16"},
            "'nvme' needs nvme_path",
        ),
        ({"offload_parameters": "nvme", "zero_stage": 3}, "'nvme' needs precision bfloat16"),
        ({"precision": "bfloat16", "zero_stage": 0}, "bfloat16 needs zero_stage 1, 2 or 3"),
    ],
)
def test_impossible_settings(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EngineConfig(**options)  # type: ignore[arg-type]
