"""What a user may get wrong is told in one sentence, before a worker or a cluster starts."""

import json
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import ray

from actors.cleaner import RecordCleaner
from actors.generator_config import GeneratorConfig
from cluster.placement import Workers
from cluster.run_directory import RunDirectory
from cluster.session import ClusterConfig
from jobs import cli, ppo, prepare, pretrain, quickstart, reward_model, sft, training
from jobs.configs import PretrainConfig
from jobs.ppo_inputs import Models, find_prompts
from jobs.prepare import split_prompts
from jobs.presets import preset
from llama2 import checkpoint
from llama2.chat import Message, encode_prompt
from llama2.cleaning import CleaningSettings
from llama2.encoding import encode
from llama2.lora import LoraConfig
from llama2.records import Dialogue, Prompt, parse_dialogues
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


def test_good_input_comes_as_far_as_the_cluster(tmp_path: Path, folders: Folders) -> None:
    data = jsonl(tmp_path / "good.jsonl", DIALOGUE)
    with pytest.raises(SessionEntered):
        sft.main(sft_config(tmp_path, folders.policy, data))
    with pytest.raises(SessionEntered):
        prepare.main(replace(TINY.prepare, runs=tmp_path, dialogues=(data,)))
    with pytest.raises(SessionEntered):
        ppo.main(ppo_config(tmp_path, folders))
    rows = prepared(tmp_path / "rows", folders.policy, "sft", "sft", CONTEXT)
    with pytest.raises(SessionEntered):
        sft.main(sft_config(tmp_path, folders.policy, rows))


def test_missing_files(tmp_path: Path, folders: Folders) -> None:
    gone = tmp_path / "gone.jsonl"
    for found in (
        refusal(sft.main, sft_config(tmp_path, folders.policy, gone)),
        refusal(sft.main, sft_config(tmp_path, gone, tmp_path)),
        refusal(prepare.main, replace(TINY.prepare, runs=tmp_path, safety=(gone,))),
        refusal(prepare.main, replace(TINY.prepare, runs=tmp_path, prompts=(gone,))),
        refusal(ppo.main, replace(ppo_config(tmp_path, folders), prompts=(gone,))),
        refusal(ppo.main, replace(ppo_config(tmp_path, folders), policy=gone)),
    ):
        assert str(gone) in found
    without_data = replace(TINY.pretrain, runs=tmp_path)
    assert "run jobs/prepare.py first" in refusal(pretrain.main, without_data)


def test_malformed_json_names_file_and_line(tmp_path: Path, folders: Folders) -> None:
    data = jsonl(tmp_path / "bad.jsonl", DIALOGUE, DIALOGUE)
    data.write_text(data.read_text() + '{"prompt": "Who", \n' + json.dumps(DIALOGUE) + "\n")
    for found in (
        refusal(sft.main, sft_config(tmp_path, folders.policy, data)),
        refusal(prepare.main, replace(TINY.prepare, runs=tmp_path, dialogues=(data,))),
        refusal(ppo.main, replace(ppo_config(tmp_path, folders), prompts=(data,))),
    ):
        assert f"{data} line 3 is not valid JSON" in found


def test_empty_data(tmp_path: Path, folders: Folders) -> None:
    empty = jsonl(tmp_path / "empty.jsonl")
    for found in (
        refusal(sft.main, sft_config(tmp_path, folders.policy, empty)),
        refusal(prepare.main, replace(TINY.prepare, runs=tmp_path, text=(empty,))),
        refusal(ppo.main, replace(ppo_config(tmp_path, folders), prompts=(empty,))),
    ):
        assert f"{empty} holds no records" in found
    useless = jsonl(tmp_path / "useless.jsonl", {"prompt": "Who?", "response": ""})
    found = refusal(sft.main, sft_config(tmp_path, folders.policy, useless))
    assert f"{useless} holds no record that sft could use" in found


def test_wrong_fields(tmp_path: Path, folders: Folders) -> None:
    data = jsonl(tmp_path / "texts.jsonl", DIALOGUE, {"question": "Who?", "reply": "A dog."})
    found = refusal(sft.main, sft_config(tmp_path, folders.policy, data))
    assert f"{data} line 2 has the fields question, reply, which are no dialogue" in found
    pairs = jsonl(tmp_path / "pairs.jsonl", {"chosen": "A dog.", "rejected": "A cat."})
    config = replace(TINY.helpfulness, runs=tmp_path, start=folders.policy, data=(pairs,))
    found = refusal(reward_model.main, config)
    assert f"{pairs} line 1" in found
    assert "no comparison" in found


def test_no_conversation_is_asked_and_held_out() -> None:
    """Prompts are its beginnings, as dialogues and comparisons are kept on a side by its first
    question."""
    turns = [Message("user", ""), Message("assistant", "Yes."), Message("user", "And then?")]
    asked = [(replace(turns[0], content=f"Question {i}"), *turns[1:]) for i in range(60)]
    prompts = [Prompt(one[:n], False, "here") for one in asked for n in (1, 3)]
    train, heldout = split_prompts(prompts, 0.3)
    sides = [{prompt.messages[0].content for prompt in side} for side in (train, heldout)]
    assert not sides[0] & sides[1] and 5 < len(sides[1]) < 40
    assert heldout[0] == prompts[0] and len(train) + len(heldout) == len(prompts)


def test_what_is_no_text(tmp_path: Path, folders: Folders) -> None:
    """A lone surrogate, which JSON can spell: named for prompts, and repaired or named for data."""
    config = ppo_config(tmp_path, folders)
    path = config.prompts[0]
    path.write_text(path.read_text() + json.dumps({"prompt": "Who \ud800?"}) + "\n")
    assert f"{path} line 41: the prompt holds half of a surrogate" in refusal(ppo.main, config)
    (dialogue,) = parse_dialogues({"prompt": "Who?", "response": "a \udc00"}, "data line 3")
    assert isinstance(dialogue, Dialogue)
    tokenizer = load_tokenizer(folders.policy)
    with pytest.raises(ValueError, match="data line 3: the text holds half of a surrogate pair"):
        list(encode(dialogue, tokenizer, CONTEXT))
    repaired = RecordCleaner(CleaningSettings(), None).clean(dialogue)
    assert isinstance(repaired, Dialogue) and list(encode(repaired, tokenizer, CONTEXT))


def test_a_prompt_as_long_as_the_context(tmp_path: Path, folders: Folders) -> None:
    tokenizer = load_tokenizer(folders.policy)
    models = Models(folders.policy, folders.reward, folders.reward)
    # A digit is a token of its own.
    others = len(encode_prompt(tokenizer, [Message("user", "1")])) - 1
    fits, too_long = ({"prompt": "1" * (n - others)} for n in (CONTEXT - 1, CONTEXT))
    config = ppo_config(tmp_path, folders)
    path = config.prompts[0]
    path.write_text(path.read_text() + json.dumps(fits) + "\n")
    assert len(find_prompts(config, tokenizer, models).train) > 30
    path.write_text(path.read_text() + json.dumps(too_long) + "\n")
    found = refusal(ppo.main, config)
    assert f"{path} line 42: the prompt has 64 tokens and the context is 64" in found
    assert "--long-prompts drop" in found
    dropping = replace(config, long_prompts="drop")
    kept = find_prompts(dropping, tokenizer, models)
    texts = {prompt.messages[-1].content for prompt in (*kept.train, *kept.heldout)}
    # Dropping leaves room for a whole answer, so the prompt of 63 tokens goes as well.
    assert texts == {f"Who sees the cat {i}?" for i in range(40)}
    with pytest.raises(SessionEntered):
        ppo.main(dropping)


def test_raw_records_are_cut_to_the_context_of_the_model(tmp_path: Path, folders: Folders) -> None:
    config = sft_config(tmp_path, folders.policy, jsonl(tmp_path / "good.jsonl", DIALOGUE))
    run = RunDirectory(tmp_path, "mine")
    model = checkpoint.check_folder(folders.policy)
    inputs = training.find_inputs(config, "sft", folders.policy, run, model)
    assert inputs.raw is not None
    assert inputs.raw.context == CONTEXT


def test_what_is_named_is_checked_before_missing_stages_run(
    tmp_path: Path, folders: Folders
) -> None:
    """The reward models would have to be trained first, for minutes."""
    config = replace(ppo_config(tmp_path, folders), helpfulness_model=None)
    with pytest.raises(SessionEntered):
        ppo.main(config)
    gone = tmp_path / "gone"
    assert str(gone) in refusal(ppo.main, replace(config, policy=gone))
    assert str(gone) in refusal(ppo.main, replace(config, prompts=(gone,)))
    assert "holds a causal" in refusal(ppo.main, replace(config, safety_model=folders.policy))
    assert "not a multiple" in refusal(ppo.main, replace(config, minibatch_size=48))


def test_batches_that_do_not_divide(tmp_path: Path, folders: Folders) -> None:
    data = jsonl(tmp_path / "good.jsonl", DIALOGUE)
    config = sft_config(tmp_path, folders.policy, data)
    few = replace(config, batch_rows=3, workers=Workers(count=4))
    assert "batch_rows 3 leaves some of 4 workers" in refusal(sft.main, few)
    with pytest.raises(SessionEntered):  # uneven shares will do
        sft.main(replace(config, batch_rows=10, workers=Workers(count=4)))
    asked = ppo_config(tmp_path, folders)
    found = refusal(ppo.main, replace(asked, batch_size=128, minibatch_size=48))
    assert "batch_size 128 is not a multiple of minibatch_size 48" in found
    found = refusal(ppo.main, replace(asked, minibatch_size=32, learner=Workers(count=3)))
    assert "minibatch_size 32 cannot be shared evenly by 3 learner workers" in found
    grouped = replace(TINY.ppo.ppo, algorithm="grpo", group_size=3)
    found = refusal(ppo.main, replace(asked, ppo=grouped))
    assert "batch_size 256 is not a multiple of ppo.group_size 3" in found
    for name in ("eval_every", "save_every", "batch_size", "iterations", "max_new_tokens",
                 "heldout_prompts"):  # fmt: skip
        for value in (0, -1):
            found = refusal(ppo.main, replace(asked, **{name: value}))
            assert f"{name} must be at least 1, not {value}" in found
    for name, least in (
        ("lr", "at least 0"),
        ("temperature", "at least 0"),
        ("timeout", "positive"),
    ):
        for value in (-1.0, float("nan")):
            found = refusal(ppo.main, replace(asked, **{name: value}))
            assert f"{name} must be {least}, not {value:g}" in found
    assert "patience must not be negative" in refusal(ppo.main, replace(asked, patience=-1))
    adapted = replace(TINY.ppo.ppo, kl_target=6.0, kl_horizon=50.0)
    assert "set ppo.kl_horizon above 51.2" in refusal(ppo.main, replace(asked, ppo=adapted))


def test_settings_that_do_not_go_together(tmp_path: Path, folders: Folders) -> None:
    data = jsonl(tmp_path / "good.jsonl", DIALOGUE)
    config = sft_config(tmp_path, folders.policy, data)
    for changed, expected in (
        ({"patience": 2, "eval_every": 0}, "eval_every 0 makes them at the end only"),
        ({"save_every": 0}, "save_every must be at least 1, not 0"),
        ({"keep_checkpoints": 0}, "keep_checkpoints must be at least 1"),
        ({"micro_batch_tokens": 0}, "micro_batch_tokens must be at least 1"),
        ({"patience": -1}, "patience must not be negative, as -1 is"),
        ({"peak_lr": float("nan")}, "peak_lr must be at least 0, not nan"),
        ({"steps": 0, "epochs": 0.0}, "epochs must be positive, not 0"),
        ({"sequence_parallel": 2, "workers": Workers(count=3)}, "3 workers cannot form sequence"),
        ({"sequence_parallel": 4, "workers": Workers(count=4)}, "does not divide the model's 2"),
    ):
        assert expected in refusal(sft.main, replace(config, **changed))  # type: ignore[arg-type]
    fresh = replace(TINY.pretrain, runs=tmp_path, data=(data,), lora=LoraConfig(rank=4))
    assert "LoRA trains updates of a model that is there" in refusal(pretrain.main, fresh)


def test_a_run_of_another_config(tmp_path: Path, folders: Folders) -> None:
    config = sft_config(tmp_path, folders.policy, jsonl(tmp_path / "good.jsonl", DIALOGUE))
    run = RunDirectory(tmp_path, "mine")
    run.open(cli.plain(config))
    found = refusal(sft.main, replace(config, peak_lr=0.5))
    assert "Run 'mine' exists with another config: peak_lr (0.001 there, 0.5 now)" in found
    with pytest.raises(SessionEntered):  # how it is computed may change, not what
        sft.main(
            replace(
                config, workers=Workers(count=4, cpus=1.0, threads=2), micro_batch_tokens=64,
                engine=replace(config.engine, zero_stage=3), on_bad_loss="skip",
            )
        )  # fmt: skip
    run.write_config(cli.plain(ppo_config(tmp_path, folders)))
    changed = replace(ppo_config(tmp_path, folders), ppo=replace(TINY.ppo.ppo, clip_range=0.3))
    assert "ppo.clip_range (0.2 there, 0.3 now)" in refusal(ppo.main, changed)
    data = replace(TINY.prepare, runs=tmp_path, name="data")
    RunDirectory(tmp_path, "data").open(cli.plain(data))
    assert "world_seed (0 there, 1 now)" in refusal(prepare.main, replace(data, world_seed=1))


def test_inputs_of_ppo_that_changed_since_it_began(
    tmp_path: Path, folders: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under the same names: a run that goes on would mix two of them."""

    @contextmanager
    def connected(config: object) -> Iterator[None]:
        yield

    def started(*arguments: object) -> None:
        raise SessionEntered

    monkeypatch.setattr(ppo, "session", connected)
    monkeypatch.setattr(ppo, "check_capacity", lambda roles: None)
    monkeypatch.setattr(ppo, "train", started)
    reward = tmp_path / "reward"
    shutil.copytree(folders.reward, reward)
    config = replace(ppo_config(tmp_path, folders), helpfulness_model=reward)
    for _ in range(2):
        with pytest.raises(SessionEntered):
            ppo.main(config)
    said = config.prompts[0].read_text()
    config.prompts[0].write_text(said.replace("cat 7", "dog 7"))
    assert "The prompts changed since mine began" in refusal(ppo.main, config)
    config.prompts[0].write_text(said)
    shutil.copyfile(folders.other_reward / "model.safetensors", reward / "model.safetensors")
    shutil.copyfile(folders.other_reward / "config.json", reward / "config.json")
    assert "The helpfulness model changed since mine began" in refusal(ppo.main, config)


def test_a_large_preset_names_the_runs_that_it_needs(tmp_path: Path) -> None:
    found = refusal(ppo.main, replace(preset("7b").ppo, runs=tmp_path))
    assert "The runs 7b-sft, 7b-helpfulness, 7b-safety, 7b-data are not there" in found
    RunDirectory(tmp_path, "7b-sft").open({})
    RunDirectory(tmp_path, "7b-sft").finish({})
    found = refusal(ppo.main, replace(preset("7b").ppo, runs=tmp_path))
    assert "The runs 7b-helpfulness, 7b-safety, 7b-data are not there" in found


def test_jobs_that_ask_for_too_much_start_no_worker(
    tmp_path: Path, folders: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def connected(config: object) -> Iterator[None]:
        yield

    def started(*arguments: object, **options: object) -> None:
        raise AssertionError("a worker was started")

    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": 2.0}}])
    for job, start in ((prepare, "prepare"), (training, "run_workers"), (ppo, "train")):
        monkeypatch.setattr(job, "session", connected)
        monkeypatch.setattr(job, start, started)
    rows = prepared(tmp_path / "rows", folders.policy, "sft", "sft", CONTEXT)
    config = replace(sft_config(tmp_path, folders.policy, rows), workers=Workers(count=4))
    assert "ask for 4 cpus (training 4)" in refusal(sft.main, config)
    asked = replace(ppo_config(tmp_path, folders), generator=GeneratorConfig(count=3))
    assert "generator 3" in refusal(ppo.main, asked)
    # Nothing is left that would tie the next attempt to this one's config.
    assert not (tmp_path / "mine").exists()
    assert "ask for 3 cpus" in refusal(prepare.main, replace(TINY.prepare, runs=tmp_path, cpus=3.0))


def test_a_second_cluster_that_could_take_no_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        port = other.getsockname()[1]
        monkeypatch.setattr(quickstart, "AGENT_PORT", port)
        other.listen()
        with pytest.raises(ValueError, match=f"Port {port} is taken, most likely by another Ray"):
            quickstart.check_agent_port(ClusterConfig())
        quickstart.check_agent_port(ClusterConfig(address="10.0.0.1:6379"))
    quickstart.check_agent_port(ClusterConfig())


def test_run_names_that_are_no_folders(tmp_path: Path) -> None:
    config: PretrainConfig = replace(TINY.pretrain, runs=tmp_path, name="../mine")
    assert "The run name '../mine' cannot be used" in refusal(pretrain.main, config)
