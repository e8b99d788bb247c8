"""Rejection sampling, Ghost Attention and context distillation as jobs, over policies and reward
models that follow a script: what is written, what is kept, where a killed job goes on."""

import json
import random
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from actors.records import Sample
from actors.sampling import Origin, Question, Roles, Sampler
from cluster.run_directory import RunDirectory
from jobs import context_distillation, ghost_attention, rejection_sampling, safety_data
from jobs.context_distillation_config import ContextDistillationConfig
from jobs.ghost_attention_config import GhostAttentionConfig
from jobs.rejection_sampling_config import RejectionSamplingConfig
from jobs.sampling import Cast
from jobs.sampling_config import SamplingConfig
from llama2.encoding import encode
from llama2.records import Dialogue, Prompt, parse_dialogues
from llama2.sources import world_of, world_prompts
from llama2.tokenizer import load_tokenizer
from llama2.world import safety
from llama2.world.constraints import MARKS, world_constraints
from llama2.world.writers import take_stance
from tests.actors.in_process_roles import Scripted, worker
from tests.jobs.policy_folder import policy_folder

Answer = Callable[[str, float, int], str]
WORLD = world_of(0)


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return policy_folder(tmp_path_factory.mktemp("policy"))


def prepared(folder: Path, train: list[Prompt], seed: int | None = 0) -> Path:
    """A folder as `prepare` leaves it, with its prompts alone."""
    (folder / "prompts").mkdir(parents=True)
    lines = [
        json.dumps({"messages": [vars(m) for m in prompt.messages], "safety": prompt.safety})
        for prompt in train
    ]
    for split in ("train", "heldout"):
        (folder / "prompts" / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "prompts" / "world.json").write_text(json.dumps({"seed": seed}))
    return folder


@dataclass
class Script:
    """What the roles of the jobs do."""

    policy: Path
    answer: Answer
    helpfulness: Callable[[str], float]
    safety: Callable[[str], float]

    @contextmanager
    def sampler(
        self, config: SamplingConfig, cast: Cast, round: str, scored: Sequence[Question] = ()
    ) -> Iterator[Sampler]:
        tokenizer = cast.prompting.tokenizer

        def read(score: Callable[[str], float]) -> Callable[[Sample], float]:
            return lambda sample: score(tokenizer.decode(sample.response.tolist()).strip())

        roles = Roles(
            Scripted(self.policy, self.answer),
            [worker(read(self.helpfulness))],
            [worker(read(self.safety))],
        )
        origin = Origin(round, cast.hashes["policy"])
        yield Sampler(roles, cast.prompting, origin, config.seed, config.max_new_tokens, 60.0)


@pytest.fixture
def script(policy: Path, monkeypatch: pytest.MonkeyPatch) -> Script:
    """Roles that a test changes as it likes."""
    found = Script(policy, lambda prompt, t, seed: f"{seed % 7} dogs", _number, lambda text: 3.0)
    cast = Cast(policy, None)
    for job in (rejection_sampling, ghost_attention, context_distillation):
        monkeypatch.setattr(job, "sampler", found.sampler)
        monkeypatch.setattr(job, "find_cast", lambda config, scored=True: cast)
    return found


def _number(text: str) -> float:
    return float(re.findall(r"\d+", text)[0]) - 3


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


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
        assert line["rewards_of_all"][0] == pytest.approx(_number(best), abs=1e-6)
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
    script.helpfulness = lambda text: 2 * _number(text)
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


def persona(prompt: str, temperature: float, seed: int) -> str:
    """Keeps every instruction of the last turn; the system message is part of the first."""
    last = prompt.rsplit("[INST]", 1)[1]
    said = "It is so."
    for mark in MARKS:
        who = mark.name.partition(": ")[2]
        if who in last and seed % 4:
            said = mark.put_on(said)
    return said


def ghost(tmp_path: Path, **changes: Any) -> GhostAttentionConfig:
    data = tmp_path / "data"
    if not data.exists():
        prepared(data, world_prompts(0, "train", 4, draw=1))
    common: dict[str, Any] = {
        "runs": tmp_path / "runs", "prompts": (data,), "conversations": 12, "turns": 4,
        "max_new_tokens": 20, "chunk": 5,
    }  # fmt: skip
    return GhostAttentionConfig(**common | changes)


def test_ghost_attention_writes_what_keeps_the_instruction(script: Script, tmp_path: Path) -> None:
    script.answer = persona
    script.helpfulness = lambda text: 0.0
    ghost_attention.main(ghost(tmp_path, name="ga", samples=2))
    run = RunDirectory(tmp_path / "runs", "ga")
    dataset, summary = lines(run.path / "dataset.jsonl"), run.summary()
    assert summary is not None and summary["turns held"] == 48
    broken = summary["answers that broke their instruction"]
    assert 0 < broken < 12 and len(dataset) == 48 - broken == summary["answers to learn from"]
    rows = summary["Adherence with the instruction in every turn"]
    assert [(row["turn"], row["count"]) for row in rows] == [(n, 12) for n in (1, 2, 3, 4)]
    assert sum(row["value"] for row in rows) == pytest.approx(4 * (1 - broken / 48))
    wordings = {form for c in ghost_attention_constraints() for form in c}
    for line in dataset:
        assert line["loss_on"] == "last" and line["messages"][0]["role"] == "system"
        asked = [m["content"] for m in line["messages"] if m["role"] == "user"]
        assert len(asked) == line["turn"]
        assert not any(form in text for form in wordings for text in asked)
    assert {line["turn"] for line in dataset} == {1, 2, 3, 4}


def ghost_attention_constraints() -> list[tuple[str, ...]]:
    return [(*one.instructions, one.short) for one in world_constraints()]


def test_constraints_of_ones_own(script: Script, tmp_path: Path) -> None:
    """Users' dialogues give the questions; what cannot be told to break the instruction is
    learned."""
    dialogues, constraints = tmp_path / "talk.jsonl", tmp_path / "constraints.jsonl"
    turns = [{"role": role, "content": f"{role} {n}"} for n in (1, 2)
             for role in ("user", "assistant")]  # fmt: skip
    dialogues.write_text(json.dumps({"messages": turns}) + "\n")
    one = {"kind": "Colour", "instructions": ["Say red."], "short": "Colour: red."}
    constraints.write_text(json.dumps(one) + "\n")
    script.answer = lambda prompt, t, seed: "red"
    script.helpfulness = lambda text: 0.0
    config = ghost(
        tmp_path, name="own", samples=1, prompts=(dialogues,),
        constraints=constraints,
    )  # fmt: skip
    ghost_attention.main(config)
    first, second = lines(tmp_path / "runs" / "own" / "dataset.jsonl")
    assert [m["content"] for m in second["messages"]][1:] == ["user 1", "red", "user 2", "red"]
    assert first["messages"][0]["content"] in ("Say red.", "Colour: red.")


def test_context_distillation_learns_the_safe_answer_alone(script: Script, tmp_path: Path) -> None:
    """A script that complies, and refuses under a preprompt; the safety reward sees a refusal."""
    known = {p.text: p for p in WORLD.prompts("train")}
    wordings = [one.text for one in safety.preprompts()]

    def answer(prompt: str, temperature: float, seed: int) -> str:
        if any(text in prompt for text in wordings):
            return "I cannot help with that, because it is against the law."
        asked = next(p for text, p in known.items() if f"{text} [/INST]" in prompt)
        return take_stance(asked, "complying", random.Random(0))

    script.answer = answer
    script.helpfulness = lambda text: 0.0
    script.safety = lambda text: 2.0 if "cannot" in text else -2.0
    config = ContextDistillationConfig(
        runs=tmp_path / "runs", name="cd", num_prompts=8, max_new_tokens=20, chunk=3,
        prompts=(prepared(tmp_path / "data", world_prompts(0, "train", 60, draw=1)),),
    )  # fmt: skip
    context_distillation.main(config)
    run = RunDirectory(config.runs, "cd")
    dataset, summary = lines(run.path / "dataset.jsonl"), run.summary()
    assert summary is not None and len(dataset) == summary["prompts"] == 8
    for line in dataset:
        assert not any(text in json.dumps(line["messages"]) for text in wordings)
        assert line["preprompt"] in wordings and line["original_safety"] == -2.0
        assert known[line["messages"][-2]["content"]].safety
        assert line["messages"][-1]["content"].startswith("I cannot")
    rows = {row["answers"]: row for row in summary["Safety of the answers"]}
    assert rows["original"]["violations by the gold judge"] == 1
    assert rows["original"]["refusals"] == 0 and rows["generic preprompt"]["refusals"] == 1
    last = rows["distilled where safer, else original"]
    assert (last["violations by the gold judge"], last["unsafe by the reward model"]) == (0, 0)
    script.safety = lambda text: 1.0
    with pytest.raises(ValueError, match="is safer than the original one to any of 8 prompts"):
        context_distillation.main(replace(config, name="equal"))


def test_context_distillation_needs_adversarial_prompts(script: Script, tmp_path: Path) -> None:
    harmless = [p for p in world_prompts(0, "train", 60, draw=1) if not p.safety]
    config = ContextDistillationConfig(
        runs=tmp_path / "runs", prompts=(prepared(tmp_path / "data", harmless),)
    )
    with pytest.raises(ValueError, match="None of the prompts is tagged for safety"):
        context_distillation.main(config)


def test_safety_data_is_read_as_demonstrations(tmp_path: Path) -> None:
    output = tmp_path / "safety.jsonl"
    safety_data.main(safety_data.SafetyDataConfig(output, size=50, seed=3))
    found = [d for line in lines(output) for d in parse_dialogues(line, "here")]
    assert len(found) == 50 and all(isinstance(d, Dialogue) and d.loss_on == "all" for d in found)
    first = output.read_bytes()
    safety_data.main(safety_data.SafetyDataConfig(output, size=50, seed=3))
    assert output.read_bytes() == first
    with pytest.raises(ValueError, match="give a share from 0 to 1"):
        safety_data.SafetyDataConfig(output, preprompt_share=2)


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
