"""What all experiments on the synthetic world start from: for each seed a world, a model of the
preset `tiny`, and two reward models, in a folder of their own.

Of the comparisons more are held out than by default, for narrower intervals.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cluster.run_directory import RunDirectory
from cluster.session import ClusterConfig
from jobs import evaluate, prepare, pretrain, reward_model, sft
from jobs.configs import RewardModelConfig
from jobs.evaluation_inputs import shown
from jobs.presets import Preset, tiny
from llama2.chat import Message
from llama2.sources import world_of
from llama2.world import judge

SEEDS = (0, 1, 2)
HELD_OUT = 0.1
COMPARISONS = 11_000
ONE_SESSION = ClusterConfig(local_cpus=2)


def folder(runs: Path, seed: int) -> Path:
    """All runs of one seed."""
    return runs.absolute() / f"seed-{seed}"


def base(runs: Path, seed: int) -> Preset:
    """Prepare and train what is not there yet. Returns the preset's configs for this seed's
    folder."""
    root, preset = folder(runs, seed), tiny()
    common = {"runs": root, "seed": seed}
    reward = replace(preset.helpfulness, eval_rows=2000, eval_every=0, **common)
    configs = Preset(
        prepare=replace(
            preset.prepare, runs=root, world_seed=seed, heldout_share=HELD_OUT,
            world_comparisons=COMPARISONS,
        ),
        pretrain=replace(preset.pretrain, **common),
        sft=replace(preset.sft, **common),
        helpfulness=reward,
        safety=replace(reward, kind="safety"),
        ppo=replace(preset.ppo, **common),
    )  # fmt: skip
    prepare.main(configs.prepare)
    pretrain.main(configs.pretrain)
    sft.main(configs.sft)
    reward_model.main(configs.helpfulness)
    reward_model.main(configs.safety)
    return configs


def tuned(configs: Preset, name: str, start: RunDirectory, data: Sequence[Path]) -> RunDirectory:
    """A model fine-tuned from another one on a data set, as `jobs/sft.py` does it."""
    config = replace(configs.sft, name=name, start=start.model, data=tuple(data))
    sft.main(config)
    return RunDirectory(config.runs, name)


def rewarded(config: RewardModelConfig, name: str) -> RunDirectory:
    """A reward model beside the preset's own."""
    reward_model.main(replace(config, name=name))
    return RunDirectory(config.runs, name)


def evaluated(
    configs: Preset, name: str, models: Sequence[RunDirectory], **settings: object
) -> RunDirectory:
    """An evaluation of models on held-out prompts of the world, without reward models' scores."""
    preset = configs.ppo
    config = replace(
        evaluate.default(tiny()), name=name, runs=preset.runs, seed=preset.seed,
        models=tuple(model.model for model in models), most_texts=0,
    )  # fmt: skip
    evaluate.main(replace(config, **settings))  # type: ignore[arg-type]
    return RunDirectory(preset.runs, name)


def write_prompts(path: Path, seed: int, kinds: Mapping[str, int]) -> Path:
    """A file of held-out prompts of some kinds, as many of each as asked for or as there are."""
    lines = [
        json.dumps({"messages": prompt.messages, "safety": prompt.safety, "category": kind})
        for kind, count in kinds.items()
        for prompt in world_of(seed).sample_prompts("heldout", count, seed, {kind: 1.0})
    ]
    path.write_text("\n".join(dict.fromkeys(lines)) + "\n")
    return path


def verdicts(evaluation: RunDirectory, model: str, seed: int) -> list[dict[str, Any]]:
    """What the gold judge says of each answer that an evaluation kept, in the prompts' order."""
    summary = evaluation.summary()
    assert summary is not None, "the evaluation has finished"
    path = evaluation.path / "measured" / summary["stamps"][model] / "answers.json"
    known = {
        shown([Message(**message) for message in prompt.messages]): prompt
        for prompt in world_of(seed).prompts("heldout")
    }
    found = []
    for answer in json.loads(path.read_text()):
        prompt = known[answer["prompt"]]
        verdict = judge(prompt, answer["answer"])
        found.append(
            {
                "kind": prompt.kind,
                "gold": verdict.score,
                "violation": verdict.violation,
                "refusal": verdict.refusal,
            }
        )
    return found
