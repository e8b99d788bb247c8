"""What a user may get wrong is told in one sentence, before a worker or a cluster starts."""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from actors.generator_config import GeneratorConfig
from cluster.placement import Workers, check_capacity
from cluster.run_directory import RunDirectory
from jobs import cli, ppo, prepare, pretrain, reward_model, sft, training
from jobs.configs import PPOConfig, PretrainConfig, SftConfig
from jobs.ppo import Models, find_prompts
from jobs.presets import preset
from llama2 import checkpoint
from llama2.batches import TokenSequence
from llama2.chat import Message, encode_prompt
from llama2.config import ModelConfig
from llama2.lora import LoraConfig
from llama2.model import ScalarModel, Transformer, initialize
from llama2.shards import Kind, Manifest, ShardWriter
from llama2.tokenizer import load_tokenizer, train_tokenizer

CONTEXT = 64
TINY = preset("tiny")


class SessionEntered(Exception):
    """Everything was accepted: the next step would be to start Ray."""


@dataclass(frozen=True)
class Folders:
    """Model folders of one vocabulary, and one of another."""

    policy: Path
    reward: Path
    other_reward: Path


def model_folder(path: Path, tokenizer: Path, kind: type[Transformer | ScalarModel]) -> Path:
    found = load_tokenizer(tokenizer)
    config = ModelConfig(
        vocab_size=found.vocab_size, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=CONTEXT,
    )  # fmt: skip
    model = kind(config)
    initialize(model, config, seed=0)
    checkpoint.save(model, path, found.files())
    return path


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    root = tmp_path_factory.mktemp("models")
    text = "the cat dog sees hears green red house garden in and who is not there"
    words = text.split()
    lines = [" ".join(words[(i * j) % len(words)] for j in range(1, 9)) for i in range(300)]
    train_tokenizer(lines, 310, root / "tokenizer")
    train_tokenizer(lines, 320, root / "other-tokenizer")
    return Folders(
        model_folder(root / "policy", root / "tokenizer", Transformer),
        model_folder(root / "reward", root / "tokenizer", ScalarModel),
        model_folder(root / "other-reward", root / "other-tokenizer", ScalarModel),
    )


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    @contextmanager
    def entered(config: object) -> Iterator[None]:
        raise SessionEntered
        yield

    for job in (prepare, training, ppo):
        monkeypatch.setattr(job, "session", entered)
    yield
    assert not ray.is_initialized()


def refusal(main: Callable[[Any], None], config: object) -> str:
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        main(config)
    message = str(caught.value)
    assert "\n" not in message
    return message


def jsonl(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def questions(path: Path, count: int = 40) -> Path:
    return jsonl(path, *({"prompt": f"Who sees the cat {i}?"} for i in range(count)))


def sft_config(runs: Path, start: Path, *data: Path) -> SftConfig:
    return replace(TINY.sft, runs=runs, name="mine", start=start, data=data)


def ppo_config(runs: Path, folders: Folders) -> PPOConfig:
    """Names all inputs, so that nothing is missing."""
    return replace(
        TINY.ppo, runs=runs, name="mine", policy=folders.policy, max_new_tokens=8,
        helpfulness_model=folders.reward, safety_model=folders.reward,
        prompts=(questions(runs / "prompts.jsonl"),),
    )  # fmt: skip


def prepared(root: Path, tokenizer: Path, part: str, kind: Kind, context: int) -> Path:
    """A folder as jobs/prepare.py leaves it, with one row in each split."""
    found = load_tokenizer(tokenizer)
    found.save(root / "tokenizer")
    tokens = torch.tensor([1, 270, 2], dtype=torch.int32).numpy()
    sequence = TokenSequence(tokens, torch.tensor([False, True, True]).numpy())
    for split in ("train", "heldout"):
        writer = ShardWriter(root / part / split, Manifest(kind, found.fingerprint, context))
        writer.add([sequence] * (2 if kind == "preference" else 1))
        writer.close(0)
    return root


DIALOGUE = {"prompt": "Who sees the cat?", "response": "the dog"}


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


def test_raw_records_are_cut_to_the_context_of_the_model(tmp_path: Path, folders: Folders) -> None:
    config = sft_config(tmp_path, folders.policy, jsonl(tmp_path / "good.jsonl", DIALOGUE))
    run = RunDirectory(tmp_path, "mine")
    model = checkpoint.check_folder(folders.policy)
    inputs = training.find_inputs(config, "sft", folders.policy, run, model)
    assert inputs.raw is not None
    assert inputs.raw.context == CONTEXT


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
        ppo.check_models(Models(folders.policy, folders.reward, folders.other_reward))


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
    for name in ("eval_every", "save_every", "batch_size"):
        assert f"{name} must be at least 1" in refusal(ppo.main, replace(asked, **{name: 0}))
    assert "patience must not be negative" in refusal(ppo.main, replace(asked, patience=-1))
    adapted = replace(TINY.ppo.ppo, kl_target=6.0, kl_horizon=50.0)
    assert "set ppo.kl_horizon above 51.2" in refusal(ppo.main, replace(asked, ppo=adapted))


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


def test_settings_that_do_not_go_together(tmp_path: Path, folders: Folders) -> None:
    data = jsonl(tmp_path / "good.jsonl", DIALOGUE)
    config = sft_config(tmp_path, folders.policy, data)
    for changed, expected in (
        ({"patience": 2, "eval_every": 0}, "eval_every 0 makes them at the end only"),
        ({"save_every": 0}, "save_every must be at least 1, not 0"),
        ({"keep_checkpoints": 0}, "keep_checkpoints must be at least 1"),
        ({"micro_batch_tokens": 0}, "micro_batch_tokens must be at least 1"),
        ({"patience": -1}, "patience must not be negative, as -1 is"),
        ({"sequence_parallel": 2, "workers": Workers(count=3)}, "3 workers cannot form sequence"),
        ({"sequence_parallel": 4, "workers": Workers(count=4)}, "does not divide the model's 2"),
    ):
        assert expected in refusal(sft.main, replace(config, **changed))  # type: ignore[arg-type]
    fresh = replace(TINY.pretrain, runs=tmp_path, data=(data,), lora=LoraConfig(rank=4))
    assert "LoRA trains updates of a model that is there" in refusal(pretrain.main, fresh)


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


def test_a_large_preset_names_the_runs_that_it_needs(tmp_path: Path) -> None:
    found = refusal(ppo.main, replace(preset("7b").ppo, runs=tmp_path))
    assert "The runs 7b-sft, 7b-helpfulness, 7b-safety, 7b-data are not there" in found
    RunDirectory(tmp_path, "7b-sft").open({})
    RunDirectory(tmp_path, "7b-sft").finish({})
    found = refusal(ppo.main, replace(preset("7b").ppo, runs=tmp_path))
    assert "The runs 7b-helpfulness, 7b-safety, 7b-data are not there" in found


def nodes(*resources: dict[str, float]) -> list[dict[str, Any]]:
    return [{"Alive": True, "Resources": found} for found in resources]


def test_more_workers_than_the_cluster_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    dead = {"Alive": False, "Resources": {"CPU": 64.0, "GPU": 8.0}}
    monkeypatch.setattr(ray, "nodes", lambda: [*nodes({"CPU": 2.0}), dead])
    check_capacity({"learner": Workers(count=2, cpus=0.5), "generator": Workers(cpus=1.0)})
    with pytest.raises(ValueError, match=r"ask for 2.5 cpus \(learner 1.5, generator 1\) .* has 2"):
        check_capacity({"learner": Workers(count=3, cpus=0.5), "generator": Workers(cpus=1.0)})
    with pytest.raises(ValueError, match=r"ask for 1 gpus \(learner 1\) and the cluster has 0"):
        check_capacity({"learner": Workers(gpus=1.0)})


def test_a_worker_larger_than_any_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "nodes", lambda: nodes({"CPU": 2.0}, {"CPU": 2.0}))
    check_capacity({"learner": Workers(count=2, cpus=2.0)})
    with pytest.raises(ValueError, match="Each learner worker asks for 3 cpus and no node has mor"):
        check_capacity({"learner": Workers(cpus=3.0)})


def test_jobs_that_ask_for_too_much_start_no_worker(
    tmp_path: Path, folders: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def connected(config: object) -> Iterator[None]:
        yield

    def started(*arguments: object, **options: object) -> None:
        raise AssertionError("a worker was started")

    monkeypatch.setattr(ray, "nodes", lambda: nodes({"CPU": 2.0}))
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


def test_run_names_that_are_no_folders(tmp_path: Path) -> None:
    config: PretrainConfig = replace(TINY.pretrain, runs=tmp_path, name="../mine")
    assert "The run name '../mine' cannot be used" in refusal(pretrain.main, config)
