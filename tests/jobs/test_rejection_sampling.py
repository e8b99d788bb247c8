"""Rejection sampling as a job, over a policy and reward models that follow a script: what is
written, what is kept, where a killed job goes on."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster.run_directory import RunDirectory
from jobs import rejection_sampling
from jobs.rejection_sampling_config import RejectionSamplingConfig
from llama2.encoding import encode
from llama2.records import Dialogue, parse_dialogues
from llama2.sources import world_prompts
from llama2.tokenizer import load_tokenizer
from tests.jobs.scripted_roles import Script, lines, number, prepared


def rejection(tmp_path: Path, **changes: Any) -> RejectionSamplingConfig:
    data = tmp_path / "data"
    if not data.exists():
        prepared(data, [p for p in world_prompts(0, "train", 60, draw=1) if not p.safety])
    made = RejectionSamplingConfig(
        runs=tmp_path / "runs", name="first", prompts=(data,), num_prompts=10, samples=5,
        temperatures=(1.0,), max_new_tokens=20, chunk=4, chunks_at_once=1,
    )  # fmt: skip
    return replace(made, **changes)


def test_the_best_of_the_samples_is_what_is_learned(script: Script, tmp_path: Path) -> None:
    config = rejection(tmp_path)
    rejection_sampling.main(config)
    run = RunDirectory(config.runs, "first")
    dataset = lines(run.path / "dataset.jsonl")
    assert len(dataset) == 10
    for line in dataset:
        best = line["messages"][-1]["content"]
        assert line["rewards_of_all"][0] == pytest.approx(number(best), abs=1e-6)
        assert len(line["rewards_of_all"]) == 5 and line["sample"]["round"] == "first"
        assert line["sample"]["id"].startswith(f"{line['prompt_id']}/1/")
        (dialogue,) = parse_dialogues(line, "here")
        assert isinstance(dialogue, Dialogue) and dialogue.loss_on == "last"
        (row,) = encode(dialogue, load_tokenizer(script.policy), 500)
        assert row.sequences[0].is_target.any()
    summary = run.summary()
    assert summary is not None
    assert (summary["prompts"], summary["samples"], summary["answers kept"]) == (10, 50, 10)
    table = summary["Reward against the number of samples"]
    assert [row["S"] for row in table] == [1, 2, 3, 4, 5]
    kept = [line["rewards_of_all"][0] for line in dataset]
    assert table[-1]["best"] == pytest.approx(sum(kept) / 10)
    assert table[0]["best"] == pytest.approx(
        sum(sum(line["rewards_of_all"]) for line in dataset) / 50
    )
    assert run.report.read_text().count("<svg") == 3  # best, median, gold


def test_a_killed_job_goes_on_to_the_same_bytes(script: Script, tmp_path: Path) -> None:
    whole = rejection(tmp_path)
    rejection_sampling.main(whole)
    config = replace(whole, name="killed")
    count = 0

    def failing(text: str) -> float:
        nonlocal count
        count += 1
        if count > 25:  # within the second of three chunks
            raise ConnectionError("lost")
        return 3.0

    script.safety = failing
    with pytest.raises(ConnectionError):
        rejection_sampling.main(config)
    script.safety = lambda text: 3.0
    samples = tmp_path / "runs" / "killed" / "samples"
    assert [path.name for path in sorted(samples.glob("0*"))] == ["000000.jsonl"]
    rejection_sampling.main(replace(config, chunks_at_once=3))
    for name in ("dataset.jsonl", "samples/000000.jsonl", "samples/000001.jsonl"):
        before, after = (
            (tmp_path / "runs" / run / name).read_text().replace("killed", "first")
            for run in ("first", "killed")
        )
        assert before == after


def test_other_prompts_under_the_same_name_are_refused(script: Script, tmp_path: Path) -> None:
    config = rejection(tmp_path)
    script.safety = lambda text: float("nan")
    with pytest.raises(ValueError, match="The scorer scores the answer"):
        rejection_sampling.main(config)
    file = tmp_path / "data" / "prompts" / "train.jsonl"
    file.write_text("\n".join(file.read_text().splitlines()[::-1]) + "\n")
    with pytest.raises(ValueError, match="was begun with another prompts"):
        rejection_sampling.main(config)


def test_several_are_kept_and_each_is_another_text(script: Script, tmp_path: Path) -> None:
    rejection_sampling.main(rejection(tmp_path, keep=3, samples=12))
    dataset = lines(tmp_path / "runs" / "first" / "dataset.jsonl")
    by_prompt: dict[str, list[str]] = {}
    for line in dataset:
        by_prompt.setdefault(line["prompt_id"], []).append(line["messages"][-1]["content"])
    assert all(len(said) == len(set(said)) == 3 for said in by_prompt.values())
    assert all(said == sorted(said, reverse=True) for said in by_prompt.values())


def test_the_sweep_takes_the_temperature_of_the_best(script: Script, tmp_path: Path) -> None:
    worth = {0.7: 2, 1.3: 5, 1.6: 4}
    script.answer = lambda prompt, t, seed: f"{worth[t]} dogs"
    config = rejection(tmp_path, temperatures=(0.7, 1.3, 1.6), sweep_prompts=4)
    rejection_sampling.main(config)
    run = RunDirectory(config.runs, "first")
    assert {line["sample"]["temperature"] for line in lines(run.path / "dataset.jsonl")} == {1.3}
    summary = run.summary()
    assert summary is not None and summary["temperature"] == 1.3
    best = {row[""]: row["best"] for row in summary["Reward against the number of samples"]}
    swept = {f"sweep, temperature {t:g}": w - 3.0 for t, w in worth.items()}
    assert best == pytest.approx({"temperature 1.3": 2.0} | swept)
    assert len(list((run.path / "sweep").iterdir())) == 3


def test_prior_rounds_join_with_their_scores(script: Script, tmp_path: Path) -> None:
    """The first round's answers join for all prompts; by this round's rewards, twice as large, they
    win where they are better, and keep the rewards that they had."""
    first = rejection(tmp_path)
    rejection_sampling.main(first)
    script.answer = lambda prompt, t, seed: f"{seed % 5} cats"
    script.helpfulness = lambda text: 2 * number(text)
    prior = tmp_path / "runs" / "first"
    second = replace(first, name="second", seed=1, prior=(prior,), num_prompts=30)
    rejection_sampling.main(second)
    dataset = lines(tmp_path / "runs" / "second" / "dataset.jsonl")
    old = {json.dumps(line["messages"][:-1]): line for line in lines(prior / "dataset.jsonl")}
    from_prior = [line for line in dataset if line["sample"]["round"] == "first"]
    assert from_prior and len(dataset) > 30
    for line in from_prior:
        before = old[json.dumps(line["messages"][:-1])]
        assert line["sample"]["reward_then"] == before["sample"]["reward"]
        assert line["sample"]["reward"] == pytest.approx(2 * before["sample"]["reward"], abs=1e-6)
        assert line["sample"]["model"] == before["sample"]["model"]
    asked = {line["id"] for path in sorted((prior.parent / "second" / "samples").glob("0*"))
             for line in lines(path)}  # fmt: skip
    both = [line for line in dataset if line["prompt_id"] in asked]
    for line in both:
        assert line["sample"]["reward"] == max(line["rewards_of_all"])
    assert any(line["prompt_id"] not in asked for line in from_prior)
    assert any(line["sample"]["round"] == "second" for line in both)
    script.answer = lambda prompt, t, seed: "4 mice"
    folders = (prior, prior.parent / "second")
    rejection_sampling.main(replace(second, name="third", seed=2, prior=folders))
    third = lines(prior.parent / "third" / "dataset.jsonl")
    again = [line for line in third if line["sample"]["round"] == "first"]
    for line in again:  # its reward in its own round, though two rounds have scored it since
        before = old[json.dumps(line["messages"][:-1])]
        assert line["sample"]["reward_then"] == before["sample"]["reward"]


@pytest.mark.parametrize("missing", [True, False])
def test_a_wrong_prior_is_named(script: Script, tmp_path: Path, missing: bool) -> None:
    folder = tmp_path / "other"
    folder.mkdir()
    if not missing:
        (folder / "dataset.jsonl").write_text('{"messages": []}\n')
    said = "does not exist; name the folder" if missing else "line 1 was not written by rejection"
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        rejection_sampling.main(rejection(tmp_path, prior=(folder,)))


def test_nothing_to_learn_is_one_sentence(script: Script, tmp_path: Path) -> None:
    script.answer = lambda prompt, t, seed: " "
    script.helpfulness = lambda text: 0.0
    with pytest.raises(ValueError, match="none of 50 samples can be learned from") as caught:
        rejection_sampling.main(rejection(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"samples": 0}, "samples must be at least 1"), ({"temperatures": ()}, "at least one"),
     ({"temperatures": (-1.0,)}, "temperature must be"), ({"timeout": 0.0}, "timeout must be")],
)  # fmt: skip
def test_numbers_that_make_no_sense(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        RejectionSamplingConfig(**changes)


def test_prompts_that_fill_the_context_are_left_out(script: Script, tmp_path: Path) -> None:
    short, long = tmp_path / "short.jsonl", tmp_path / "long.jsonl"
    wordy = json.dumps({"prompt": "dog " * 1100}) + "\n"
    short.write_text(wordy + json.dumps({"prompt": "Name a dog."}) + "\n")
    long.write_text(wordy)
    config = rejection(tmp_path, prompts=(short,))
    rejection_sampling.main(config)
    summary = RunDirectory(config.runs, "first").summary()
    assert summary is not None
    assert (summary["prompts"], summary["prompts left out as too long"]) == (1, 1)
    with pytest.raises(ValueError, match="None of 1 prompts leaves room for an answer"):
        rejection_sampling.main(rejection(tmp_path, prompts=(long,), name="long"))
