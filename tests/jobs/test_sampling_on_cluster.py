"""Rejection sampling on a real local Ray cluster, and SFT on what it writes."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster.run_directory import RunDirectory
from cluster.session import ClusterConfig, session
from jobs import prepare, pretrain, rejection_sampling, reward_model, sft
from jobs.presets import Preset, tiny
from jobs.rejection_sampling_config import RejectionSamplingConfig
from llama2.shards import Shards

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Preset]:
    """A policy that can end its answers, and two reward models."""
    runs, preset = tmp_path_factory.mktemp("runs"), tiny()
    brief: dict[str, Any] = {
        "runs": runs, "steps": 4, "eval_every": 0, "eval_rows": 16,
        "engine": replace(preset.ppo.engine, precision="float32"),
    }  # fmt: skip
    chosen = replace(
        preset,
        prepare=replace(
            preset.prepare, runs=runs, world_documents=600, world_dialogues=400,
            world_comparisons=300, world_prompts=200, world_heldout_prompts=24,
        ),
        pretrain=replace(preset.pretrain, **brief | {"steps": 30}),
        sft=replace(preset.sft, **brief | {"steps": 40}),
        helpfulness=replace(preset.helpfulness, **brief),
        safety=replace(preset.safety, **brief),
        ppo=replace(preset.ppo, runs=runs),
    )  # fmt: skip
    with session(ClusterConfig(local_cpus=2)):
        prepare.main(chosen.prepare)
        pretrain.main(chosen.pretrain)
        sft.main(chosen.sft)
        reward_model.main(chosen.helpfulness)
        reward_model.main(chosen.safety)
        yield chosen


def config(chain: Preset, kind: Any, **changes: Any) -> Any:
    return replace(kind.of(chain), runs=chain.ppo.runs, precision="float32", **changes)


def dataset(chain: Preset, name: str) -> Path:
    return RunDirectory(chain.ppo.runs, name).path / "dataset.jsonl"


def test_rejection_samples_are_learned_from_the_base_model(chain: Preset) -> None:
    """The same samples whatever the replicas and the order; SFT reads the file, and its targets are
    as many tokens as the best answers have."""
    asked = config(chain, RejectionSamplingConfig, num_prompts=24, samples=3, chunk=8)
    rejection_sampling.main(replace(asked, name="one"))
    generator = replace(asked.generator, count=1)
    rejection_sampling.main(replace(asked, name="other", generator=generator, chunks_at_once=1))
    one, other = (
        [json.loads(line) for line in dataset(chain, name).read_text().splitlines()]
        for name in ("one", "other")
    )
    assert len(one) > 5
    assert [line["messages"] for line in one] == [line["messages"] for line in other]
    start = chain.ppo.runs / "tiny-pretrain" / "model"
    sft.main(
        replace(chain.sft, name="learned", steps=4, start=start, data=(dataset(chain, "one"),))
    )
    run = RunDirectory(chain.ppo.runs, "learned")
    assert run.is_finished and (run.model / "model.safetensors").exists()
    rows = [Shards(run.path / "data" / "sft" / split) for split in ("train", "heldout")]
    targets = sum(int(s.is_target.sum()) for r in rows for i in range(len(r)) for s in r.row(i))
    # The text of an answer is tokenized anew, with a space behind it.
    assert abs(targets - sum(line["sample"]["tokens"] for line in one)) <= 2 * len(one)
