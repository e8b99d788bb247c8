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
from jobs.presets import Preset
from jobs.rejection_sampling_config import RejectionSamplingConfig
from llama2.shards import Shards
from tests.jobs.test_end_to_end import small

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Preset]:
    """A policy that can end its answers, and two reward models."""
    preset = small(tmp_path_factory.mktemp("runs"))
    with session(ClusterConfig(local_cpus=2)):
        prepare.main(preset.prepare)
        pretrain.main(replace(preset.pretrain, steps=30))
        sft.main(replace(preset.sft, steps=40))
        reward_model.main(preset.helpfulness)
        reward_model.main(preset.safety)
        yield preset


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
    sft.main(replace(chain.sft, name="learned", start=start, data=(dataset(chain, "one"),)))
    run = RunDirectory(chain.ppo.runs, "learned")
    assert run.is_finished and (run.model / "model.safetensors").exists()
    rows = [Shards(run.path / "data" / "sft" / split) for split in ("train", "heldout")]
    targets = sum(int(s.is_target.sum()) for r in rows for i in range(len(r)) for s in r.row(i))
    # The text of an answer is tokenized anew, with a space behind it.
    assert abs(targets - sum(line["sample"]["tokens"] for line in one)) <= 2 * len(one)
