"""The same jobs on other people's data: texts, instructions, trees and human preferences."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster.run_directory import RunDirectory, read_json_lines
from cluster.session import ClusterConfig, session
from jobs import ppo, prepare, pretrain, reward_model, sft
from jobs.presets import tiny
from llama2.shards import read_manifest

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
PAIRS = DATA / "hh-rlhf" / "harmless.jsonl.gz"
pytestmark = pytest.mark.skipif(not PAIRS.is_file(), reason=f"the real data is not at {DATA}")


def test_from_text_to_ppo(tmp_path: Path) -> None:
    preset = tiny()
    brief: dict[str, Any] = {"runs": tmp_path, "steps": 4, "eval_every": 0, "eval_rows": 8}
    instructions = DATA / "instructions" / "seed_tasks.jsonl.gz"
    trees = DATA / "oasst" / "trees.jsonl.gz"
    chat = RunDirectory(tmp_path, "chat")
    reward = RunDirectory(tmp_path, "reward")
    with session(ClusterConfig(local_cpus=2)):
        text = (DATA / "text" / "wikitext2-valid.txt.gz",)
        prepare.main(replace(preset.prepare, name="data", runs=tmp_path, text=text))
        pretrain.main(replace(preset.pretrain, name="base", data=(tmp_path / "data",), **brief))
        base = RunDirectory(tmp_path, "base").model
        sft.main(replace(preset.sft, name="chat", start=base, data=(instructions, trees), **brief))
        reward_model.main(
            replace(
                preset.safety, name="reward", start=chat.model, data=(PAIRS,),
                batch_rows=8, micro_batch_tokens=1024, **brief,
            )
        )  # fmt: skip
        ppo.main(
            replace(
                preset.ppo, name="ppo", runs=tmp_path, policy=chat.model,
                helpfulness_model=reward.model, safety_model=reward.model, prompts=(PAIRS,),
                long_prompts="drop", iterations=1, batch_size=16, minibatch_size=8,
                max_new_tokens=16, heldout_prompts=8,
            )
        )  # fmt: skip
    pairs = read_manifest(reward.path / "data" / "safety" / "train")
    assert pairs.rows + read_manifest(reward.path / "data" / "safety" / "heldout").rows > 1500
    run = RunDirectory(tmp_path, "ppo")
    summary = run.summary()
    assert summary is not None and "gold" not in summary["before"]
    lines = read_json_lines(run.metrics)
    assert lines[0]["rollout/logprob_difference"] < 0.02
    assert lines[0]["publish/distinct_checksums"] == 1
