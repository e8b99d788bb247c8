"""Ghost Attention, context distillation and safety demonstrations as jobs, over policies and reward
models that follow a script: the dialogues that they write."""

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster.run_directory import RunDirectory
from jobs import context_distillation, ghost_attention, safety_data
from jobs.context_distillation_config import ContextDistillationConfig
from jobs.ghost_attention_config import GhostAttentionConfig
from llama2.records import Dialogue, parse_dialogues
from llama2.sources import world_of, world_prompts
from llama2.world import safety
from llama2.world.constraints import MARKS, world_constraints
from llama2.world.writers import take_stance
from tests.jobs.scripted_roles import Script, lines, prepared

WORLD = world_of(0)


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
