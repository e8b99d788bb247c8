"""PPO with a user's own reward and with a reward model of another tokenizer, on a local cluster."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from actors.coordinator import read_evaluation
from actors.reward_function import ScorerLimits
from cluster.placement import Workers
from cluster.run_directory import RunDirectory, read_json_lines
from cluster.session import ClusterConfig, session
from jobs import ppo
from jobs.configs import PPOConfig
from jobs.presets import tiny
from llama2.model import ScalarModel, Transformer
from llama2.tokenizer import train_tokenizer
from tests.actors.small_tasks import TEXT, tokenizer_folder
from tests.jobs.refusals import model_folder

pytestmark = pytest.mark.slow
FUNCTIONS = """
def brief(prompts, answers):
    assert all(prompt[-1]["content"].startswith("Who sees") for prompt in prompts)
    return [1.0 - len(answer) / 20 for answer in answers]

def broken(prompts, answers):
    return [float("nan")] * len(answers)
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    root = tmp_path_factory.mktemp("own")
    tokenizer_folder(root / "tokenizer")
    words = TEXT.split()
    lines = [" ".join(words[(i * j) % len(words)] for j in range(1, 9)) for i in range(300)]
    train_tokenizer(lines, 330, root / "other-tokenizer")
    model_folder(root / "policy", root / "tokenizer", Transformer)
    model_folder(root / "other", root / "other-tokenizer", ScalarModel)
    prompts = [json.dumps({"prompt": f"Who sees the cat {i}?"}) for i in range(40)]
    (root / "prompts.jsonl").write_text("\n".join(prompts) + "\n")
    (root / "own_rewards.py").write_text(FUNCTIONS)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setenv("WANDB_MODE", "disabled")
        with session(ClusterConfig(local_cpus=2)):
            yield root


def config(root: Path, name: str, function: str) -> PPOConfig:
    preset = tiny().ppo
    return replace(
        preset, name=name, runs=root, policy=root / "policy", safety_model=root / "other",
        helpfulness_reward=function, prompts=(root / "prompts.jsonl",), iterations=1, batch_size=8,
        minibatch_size=8, max_new_tokens=8, heldout_prompts=4, eval_every=1,
        engine=replace(preset.engine, precision="float32"), learner=Workers(cpus=0.5),
        generator=replace(preset.generator, count=1), scorer=ScorerLimits(timeout=20),
    )  # fmt: skip


def test_a_function_and_a_foreign_model_score_the_policy(root: Path) -> None:
    ppo.main(config(root, "own", "own_rewards:brief"))
    run = RunDirectory(root, "own")
    judged = read_evaluation(run, 1)
    assert judged
    for answer in judged:
        assert answer.helpfulness == pytest.approx(1.0 - len(answer.answer) / 20)
    assert len({answer.safety for answer in judged}) > 1
    assert read_json_lines(run.metrics)[0]["publish/distinct_checksums"] == 1


def test_a_broken_function_is_told_in_one_sentence(root: Path) -> None:
    with pytest.raises(ValueError) as caught:
        ppo.main(config(root, "broken", "own_rewards:broken"))
    said = str(caught.value)
    assert said.startswith("The reward own_rewards:broken scores answer 0 of 4 as nan;")
    assert "\n" not in said
