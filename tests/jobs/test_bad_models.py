"""Models, tokenizers and prepared rows that are damaged or do not fit each other are told of in one
sentence, before a worker or a cluster starts."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from jobs import ppo, pretrain, sft, training
from jobs.ppo_inputs import Models, check_models
from llama2.tokenizer import load_tokenizer
from tests.jobs.refusals import (
    CONTEXT,
    DIALOGUE,
    TINY,
    Folders,
    SessionEntered,
    jsonl,
    ppo_config,
    prepared,
    refusal,
    sft_config,
)

pytestmark = pytest.mark.usefixtures("no_cluster")


def test_a_vocabulary_that_does_not_fit(tmp_path: Path, folders: Folders) -> None:
    expected = "The tokenizer has 320 ids, but the model's vocabulary has only 310"
    raw = jsonl(tmp_path / "good.jsonl", DIALOGUE)
    rows = prepared(tmp_path / "rows", folders.other_reward, "sft", "sft", CONTEXT)
    for data in (raw, rows):
        config = sft_config(tmp_path, folders.policy, data)
        assert expected in refusal(sft.main, replace(config, tokenizer=folders.other_reward))
    mixed = tmp_path / "mixed"
    shutil.copytree(folders.policy, mixed)
    load_tokenizer(folders.other_reward).save(mixed)
    assert expected in refusal(ppo.main, replace(ppo_config(tmp_path, folders), policy=mixed))


def test_rows_of_another_tokenizer_or_context(tmp_path: Path, folders: Folders) -> None:
    other = prepared(tmp_path / "other", folders.other_reward, "sft", "sft", CONTEXT)
    found = refusal(sft.main, sft_config(tmp_path, folders.policy, other))
    assert f"{other / 'sft'} was written with another tokenizer" in found
    long = prepared(tmp_path / "long", folders.policy, "sft", "sft", 2 * CONTEXT)
    found = refusal(sft.main, sft_config(tmp_path, folders.policy, long))
    assert "rows of up to 128 tokens and the model's context is 64" in found
    found = refusal(pretrain.main, replace(TINY.pretrain, runs=tmp_path, data=(long,)))
    assert f"{long} holds no prepared pretrain data" in found
    both = replace(TINY.pretrain, runs=tmp_path, data=(long, other))
    assert f"{long} is prepared data and cannot be joined" in refusal(pretrain.main, both)


def test_a_checkpoint_of_another_architecture(tmp_path: Path, folders: Folders) -> None:
    gpt2 = tmp_path / "gpt2"
    gpt2.mkdir()
    config = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": 50257}
    (gpt2 / "config.json").write_text(json.dumps(config))
    data = jsonl(tmp_path / "good.jsonl", DIALOGUE)
    for found in (
        refusal(sft.main, sft_config(tmp_path, gpt2, data)),
        refusal(ppo.main, replace(ppo_config(tmp_path, folders), safety_model=gpt2)),
    ):
        assert f"{gpt2 / 'config.json'}: model_type is 'gpt2'; only 'llama'" in found


def test_a_truncated_file(tmp_path: Path, folders: Folders) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(folders.policy, broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    data = jsonl(tmp_path / "good.jsonl", DIALOGUE)
    for found in (
        refusal(sft.main, sft_config(tmp_path, broken, data)),
        refusal(ppo.main, replace(ppo_config(tmp_path, folders), policy=broken)),
    ):
        assert f"{weights} is truncated or corrupt" in found


def test_the_wrong_kind_of_model(tmp_path: Path, folders: Folders) -> None:
    config = ppo_config(tmp_path, folders)
    found = refusal(ppo.main, replace(config, helpfulness_model=folders.policy))
    assert f"{folders.policy} holds a causal language model" in found
    found = refusal(ppo.main, replace(config, policy=folders.reward))
    assert f"{folders.reward} holds a scalar (reward or value) model" in found
    data = jsonl(tmp_path / "good.jsonl", DIALOGUE)
    found = refusal(sft.main, sft_config(tmp_path, folders.reward, data))
    assert f"{folders.reward} holds a scalar (reward or value) model" in found


def test_a_reward_model_with_another_tokenizer(tmp_path: Path, folders: Folders) -> None:
    """PPO has its workers encode the text again; where that is not done, it is refused."""
    with pytest.raises(SessionEntered):
        ppo.main(replace(ppo_config(tmp_path, folders), safety_model=folders.other_reward))
    with pytest.raises(ValueError, match=f"{folders.other_reward} has another tokenizer than"):
        check_models(Models(folders.policy, folders.reward, folders.other_reward))


def test_pretraining_rows_that_the_policy_cannot_read(tmp_path: Path, folders: Folders) -> None:
    mixed = replace(ppo_config(tmp_path, folders), ppo=replace(TINY.ppo.ppo, ptx_coefficient=0.1))
    found = refusal(ppo.main, mixed)
    assert f"{tmp_path / 'tiny-data'} holds no prepared pretraining data" in found
    other = folders.other_reward
    data = prepared(tmp_path / "other", other, "pretrain", "pretrain", 16)
    assert "another tokenizer" in refusal(ppo.main, replace(mixed, pretraining_data=data))
    long = prepared(tmp_path / "long", folders.policy, "pretrain", "pretrain", 100_000)
    assert "longer than its context" in refusal(ppo.main, replace(mixed, pretraining_data=long))
    data = prepared(tmp_path / "good", folders.policy, "pretrain", "pretrain", 16)
    with pytest.raises(SessionEntered):
        ppo.main(replace(mixed, pretraining_data=data))


def test_a_shard_with_a_wrong_hash(
    tmp_path: Path, folders: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = prepared(tmp_path / "rows", folders.policy, "sft", "sft", CONTEXT)
    (shard,) = (rows / "sft" / "heldout").glob("shard-*")
    content = bytearray(shard.read_bytes())
    content[0] ^= 1
    shard.write_bytes(content)
    config = sft_config(tmp_path, folders.policy, rows)
    assert f"{shard} is damaged: its hash is" in refusal(sft.main, config)
    # Large data is read through only where that is asked for.
    monkeypatch.setattr(training, "VERIFIED_BYTES", 0)
    with pytest.raises(SessionEntered):
        sft.main(config)
    assert "is damaged" in refusal(sft.main, replace(config, verify_data=True))
