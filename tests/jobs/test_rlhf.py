"""Two rounds of the outer loop on a real local Ray cluster, stopped on the way."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster.run_directory import RunDirectory
from cluster.session import ClusterConfig, session
from jobs import prepare, pretrain, rlhf, rounds, sft
from jobs.presets import tiny
from jobs.rlhf_config import RlhfConfig
from llama2 import checkpoint

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RlhfConfig]:
    """A loop of two rounds over models that can end their answers."""
    runs, preset = tmp_path_factory.mktemp("runs"), tiny()
    engine = replace(preset.ppo.engine, precision="float32")
    brief: dict[str, Any] = {"runs": runs, "steps": 3, "eval_every": 0, "eval_rows": 8}
    brief["engine"] = engine
    config = RlhfConfig.of(preset)
    few: dict[str, Any] = {"num_prompts": 24, "chunk": 12, "precision": "float32"}
    found = replace(
        config, runs=runs, rounds=2, safety_demonstrations=20,
        comparisons=replace(config.comparisons, **few),
        helpfulness=replace(config.helpfulness, **brief),
        safety=replace(config.safety, **brief),
        rejection_sampling=replace(config.rejection_sampling, samples=2, **few),
        sft=replace(config.sft, **brief),
        ppo=replace(
            config.ppo, iterations=1, batch_size=8, minibatch_size=4, micro_batch_size=2,
            max_new_tokens=12, heldout_prompts=8, engine=engine,
        ),
        evaluate=replace(
            config.evaluate, most_prompts=16, conversations=0, most_texts=4, max_new_tokens=12
        ),
    )  # fmt: skip
    with session(ClusterConfig(local_cpus=2)):
        prepare.main(
            replace(
                preset.prepare, runs=runs, world_documents=600, world_dialogues=400,
                world_comparisons=200, world_prompts=200, world_heldout_prompts=24,
            )
        )  # fmt: skip
        pretrain.main(replace(preset.pretrain, **brief | {"steps": 30}))
        sft.main(replace(preset.sft, **brief | {"steps": 40}))
        yield found


def stamps(root: Path, names: list[str]) -> dict[str, int]:
    """When each file of these stages was written."""
    files = [file for name in names for file in (root / name).rglob("*") if file.is_file()]
    return {str(file): file.stat().st_mtime_ns for file in files}


def test_two_rounds_go_on_where_they_stopped(
    small: RlhfConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = RunDirectory(small.runs, "tiny-rlhf")
    whole = rounds.sft.main

    def lost(config: Any) -> None:
        raise ConnectionError("lost")

    with monkeypatch.context() as patched, pytest.raises(ConnectionError):
        patched.setattr(rounds.sft, "main", lost)
        rlhf.main(small)
    assert rounds.sft.main is whole
    done = ["v1-comparisons", "v1-reward-data", "v1-helpfulness", "v1-safety", "v1-rejection"]
    lineage = json.loads((loop.path / "lineage.json").read_text())
    assert list(lineage) == ["data", "base", "sft", *done]
    before = stamps(loop.path, done)
    assert not loop.is_finished and before
    rlhf.main(small)
    assert stamps(loop.path, done) == before

    lineage = json.loads((loop.path / "lineage.json").read_text())
    assert lineage["v1-sft"]["parents"].keys() == {"base", "sft", "v1-rejection"}
    assert lineage["v2-ppo"]["parents"].keys() == {"v1-sft", "v2-helpfulness", "v2-safety", "data"}
    assert len(lineage["v1-sft"]["data"]) == 2  # the world's dialogues, safe demonstrations
    summary = loop.summary()
    assert summary is not None
    assert [row["run"] for row in summary[rlhf.TABLE]] == ["tiny-sft", "v1-sft", "v2-ppo"]
    stages = [line["stage"] for line in summary[rlhf.SECONDS]]
    assert stages == [name for name in lineage if name not in ("data", "base", "sft", loop.name)]
    assert lineage[loop.name]["parents"].keys() == {summary["best"], "evaluation"}
    best = small.runs / "tiny-sft" / "model"
    if summary["best"] != "sft":
        best = loop.path / summary["best"] / "model"
    name = "model.safetensors"
    assert (loop.model / name).read_bytes() == (best / name).read_bytes()
    checkpoint.load(loop.model)
    assert "Versions" in loop.report.read_text()

    everything = stamps(loop.path, ["v1-sft", "v2-ppo", "evaluation"])
    rlhf.main(small)
    assert stamps(loop.path, ["v1-sft", "v2-ppo", "evaluation"]) == everything
    with pytest.raises(ValueError, match=r"rejection_sampling.samples \(2 there, 3 now\)"):
        other = replace(small.rejection_sampling, samples=3)
        rlhf.main(replace(small, rejection_sampling=other))
    dataset = loop.path / "v1-rejection" / "dataset.jsonl"
    dataset.write_text(dataset.read_text() + "\n")
    with pytest.raises(ValueError, match=r"dataset.jsonl, of v1-rejection, was changed"):
        rlhf.main(small)
