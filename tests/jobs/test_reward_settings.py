"""Settings of reward models and of users' own rewards: what they choose, and what is refused."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster.placement import Workers
from cluster.run_directory import RunDirectory
from jobs import ppo, reward_model
from jobs.configs import RewardModelConfig
from jobs.presets import preset
from jobs.reward_model import mixed
from jobs.rewards import Rewards, RewardSource
from llama2.shards import Shards
from tests.jobs.refusals import TINY, Folders, SessionEntered, jsonl, ppo_config, refusal
from tests.llama2.test_preference_mix import folder, rows

pytestmark = pytest.mark.usefixtures("no_cluster")
PAIR = {"prompt": "Who sees the cat?", "chosen": "the dog", "rejected": "the house"}


def pairs_config(root: Path, folders: Folders, *records: object) -> RewardModelConfig:
    data = jsonl(root / "pairs.jsonl", *records)
    return replace(TINY.safety, runs=root, name="mine", start=folders.policy, data=(data,))


def test_numbers_that_mean_nothing(tmp_path: Path, folders: Folders) -> None:
    config = pairs_config(tmp_path, folders, PAIR)
    for weight in (-1.0, float("nan"), float("inf")):
        found = refusal(reward_model.main, replace(config, safety_weight=weight))
        assert "safety_weight must be a number of at least 0" in found
    for share in (-0.1, 1.0, float("nan")):
        found = refusal(reward_model.main, replace(config, other_share=share))
        assert "other_share must be at least 0 and below 1" in found
    with pytest.raises(SessionEntered):
        reward_model.main(replace(config, safety_weight=1.0, other_share=0.1))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"rating": "splendid"}, "the rating 'splendid' is none of significantly better"),
        ({"rating": 4}, "the rating 4 is none of"),
        ({"safety": "perhaps"}, "the safety label 'perhaps' is none of chosen_safe"),
    ],
)
def test_labels_outside_the_list_name_file_and_line(
    tmp_path: Path, folders: Folders, wrong: dict[str, object], said: str
) -> None:
    config = pairs_config(tmp_path, folders, PAIR, PAIR | wrong)
    found = refusal(reward_model.main, config)
    assert f"{config.data[0]} line 2" in found
    assert said in found


def test_a_comparison_of_equal_answers_teaches_nothing(tmp_path: Path, folders: Folders) -> None:
    config = pairs_config(tmp_path, folders, PAIR | {"rejected": " the dog\n"})
    assert "holds no record that safety could use" in refusal(reward_model.main, config)


def test_own_rewards_are_checked_before_a_cluster_starts(
    tmp_path: Path, folders: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "settings_rewards.py").write_text("def good(prompts, answers): return []\n")
    config = replace(ppo_config(tmp_path, folders), helpfulness_model=None)
    named = "settings_rewards:good"
    with pytest.raises(SessionEntered):
        ppo.main(replace(config, helpfulness_reward=named))
    both = replace(config, helpfulness_model=folders.reward, helpfulness_reward=named)
    assert f"helpfulness_reward {named} are given; leave one out" in refusal(ppo.main, both)
    for name, said in (
        ("settings_rewards:bad", "has no function bad"),
        ("gone_rewards:good", "cannot be imported"),
        ("https:///score", "names no host"),
    ):
        assert said in refusal(ppo.main, replace(config, helpfulness_reward=name))


def test_the_critic_starts_from_what_reads_the_policys_tokens(folders: Folders) -> None:
    def critic(helpfulness: RewardSource) -> Path:
        return Rewards(helpfulness, RewardSource(folders.reward)).critic(folders.policy)

    assert critic(RewardSource(folders.reward)) == folders.reward
    assert critic(RewardSource(folders.other_reward)) == folders.policy
    assert critic(RewardSource(folders.reward, "own:reward")) == folders.policy


@pytest.fixture
def prepared(tmp_path: Path) -> Iterator[Path]:
    yield folder(tmp_path / "data")


def test_the_mix_of_a_run(
    tmp_path: Path, prepared: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunDirectory(tmp_path, "mine")
    plain = mixed(TINY.safety, prepared, run)
    assert plain == prepared / "safety" / "train"
    config = replace(TINY.helpfulness, other_share=0.5, open_data=("open",))
    found = rows(Shards(mixed(config, prepared, run)))
    assert len(found) == 80
    assert sum(name == "helpfulness/mine" for name, _ in found) == 40
    assert "40 pairs of helpfulness/mine" in capsys.readouterr().out
    mixed(replace(config, other_share=0.9), prepared, run)
    assert "only 102 of the 360 other pairs asked for are there" in capsys.readouterr().out


def test_the_papers_mixes_are_the_defaults_of_its_sizes() -> None:
    for name in ("7b", "70b"):
        found = preset(name)
        assert (found.helpfulness.other_share, found.helpfulness.safety_weight) == (0.5, 0.0)
        assert (found.safety.other_share, found.safety.safety_weight) == (0.1, 1.0)


def test_roles_share_processors_unless_one_has_a_gpu_or_no_model_scores() -> None:
    config, with_gpu = TINY.ppo, Workers(gpus=1.0)
    assert ppo.shares_processors(config, Rewards.find(config))
    for name in ("learner", "reference", "rewards"):
        given: Any = {name: with_gpu}
        assert not ppo.shares_processors(replace(config, **given), Rewards.find(config))
    one = replace(config, safety_reward="module:function")
    assert ppo.shares_processors(one, Rewards.find(one))
    both = replace(one, helpfulness_reward="https://scorer.example")
    assert not ppo.shares_processors(both, Rewards.find(both))
