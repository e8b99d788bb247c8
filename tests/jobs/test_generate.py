"""Answers to a prompt or a file: what is asked, what is written, where a stopped job goes on."""

import json
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jobs import generate, options
from jobs.generate_config import GenerateConfig
from llama2 import checkpoint
from llama2.chat import Message
from llama2.generation import Engine, Sampling
from llama2.prompting import Prompting, sample_seed
from tests.actors.endpoint import CONTEXT, model_folder

PROMPTS = ["the cat", "who is not there", "green", "the dog sees the red house"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    return written(tmp_path / "prompts.jsonl", [{"prompt": prompt} for prompt in PROMPTS])


def written(path: Path, records: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def config(*arguments: Any) -> GenerateConfig:
    return options.parse(
        [str(a) for a in ("--precision", "float32", *arguments)], GenerateConfig, ""
    )


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def answers_of_engine(
    model: Path, prompts: Sequence[list[int]], sampling: Sampling, seeds: Sequence[int]
) -> list[tuple[str, float]]:
    """One prompt at a time, decoded behind its prompt."""
    engine, tokenizer = Engine(checkpoint.load(model)), Prompting.read(model).tokenizer
    found = []
    for prompt, seed in zip(prompts, seeds, strict=True):
        (done,) = engine.generate([prompt], sampling, [seed])
        whole = tokenizer.decode([*tokenizer.encode("x"), *done.tokens])
        found.append((whole[1:], sum(done.logprobs)))
    return found


def test_a_file_of_prompts(model: Path, prompts: Path, tmp_path: Path) -> None:
    """Samples of every prompt in the input's order, each what the engine draws alone from the
    sample's own seed."""
    output = tmp_path / "answers.jsonl"
    asked = config(
        "--model", model, "--input", prompts, "--output", output, "--num-samples", 3,
        "--max-new-tokens", 20, "--seed", 4, "--top-p", 0.95, "--generator.max-batch-size", 3,
        "--format", "text",
    )  # fmt: skip
    generate.main(asked)
    prompting = Prompting.read(model)
    expected = answers_of_engine(
        model,
        [prompting.encode_text(prompt) for prompt in PROMPTS for _ in range(3)],
        Sampling(top_p=0.95, max_new_tokens=20, stop_ids=prompting.stop_ids),
        [sample_seed(4, str(i), s) for i in range(4) for s in range(3)],
    )
    found = lines(output)
    assert [line["id"] for line in found] == [f"{i}/{s}" for i in range(4) for s in range(3)]
    assert [line["prompt"] for line in found] == [p for p in PROMPTS for _ in range(3)]
    assert [line["response"] for line in found] == [text for text, _ in expected]
    assert [line["logprob"] for line in found] == pytest.approx(
        [sum_ for _, sum_ in expected], abs=1e-3
    )
    assert len({line["response"] for line in found}) == 12
    assert all(line["tokens"] == 20 for line in found if line["finish_reason"] == "length")


def test_chat_by_default_where_the_model_has_a_template(model: Path, tmp_path: Path) -> None:
    turns = [
        {"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sees"},
        {"role": "user", "content": "who"},
    ]  # fmt: skip
    source = written(
        tmp_path / "in.jsonl", [{"prompt": "the cat", "id": "a"}, {"messages": turns, "id": 7}]
    )
    output = tmp_path / "out.jsonl"
    asked = ["--model", model, "--input", source, "--temperature", 0, "--max-new-tokens", 20]
    generate.main(config(*asked, "--output", output))
    prompting = Prompting.read(model)
    expected = answers_of_engine(
        model,
        [
            prompting.encode_chat([Message("user", "the cat")]),
            prompting.encode_chat([Message(**turn) for turn in turns]),  # type: ignore[arg-type]
        ],
        Sampling(temperature=0, max_new_tokens=20, stop_ids=prompting.stop_ids),
        [0, 0],
    )
    first, second = lines(output)
    assert (first["id"], second["id"]) == ("a/0", "7/0")
    assert first["response"] == expected[0][0].strip()
    assert second["messages"] == [
        *turns, {"role": "assistant", "content": expected[1][0].strip()}
    ]  # fmt: skip

    (model / "tokenizer_config.json").rename(tmp_path / "kept")
    generate.main(config(*asked, "--output", tmp_path / "plain.jsonl"))
    (tmp_path / "kept").rename(model / "tokenizer_config.json")
    plain, same = lines(tmp_path / "plain.jsonl")
    assert plain["response"] != first["response"]
    assert same == second


@pytest.mark.parametrize("cut", [0, 1, 200, 900, -1])
def test_a_stopped_job_goes_on(model: Path, prompts: Path, tmp_path: Path, cut: int) -> None:
    """Wherever the file was torn, the second run writes the same bytes."""
    output = tmp_path / "answers.jsonl"
    asked = config(
        "--model", model, "--input", prompts, "--output", output, "--num-samples", 2,
        "--max-new-tokens", 12, "--seed", 1,
    )  # fmt: skip
    generate.main(asked)
    whole = output.read_bytes()
    assert whole.count(b"\n") == 8
    output.write_bytes(whole[:cut])
    begun = output.stat().st_ino
    generate.main(asked)
    assert [line["id"] for line in lines(output)] == [
        json.loads(x)["id"] for x in whole.split(b"\n")[:-1]
    ]
    assert _without_rounding(output.read_bytes()) == _without_rounding(whole)
    assert output.stat().st_ino == begun


def _without_rounding(answers: bytes) -> str:
    """Sums of log-probabilities differ in the last digits with the batch that computes them."""
    return re.sub(r'("logprob": -?\d+\.\d\d)\d*', r"\1", answers.decode())


def test_a_finished_job_computes_nothing(
    model: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    asked = config(
        "--model", model, "--input", prompts, "--output", tmp_path / "out.jsonl",
        "--max-new-tokens", 4,
    )  # fmt: skip
    generate.main(asked)
    monkeypatch.setattr(generate, "answers", None)
    generate.main(asked)
    assert "has all 4 answers already" in capsys.readouterr().out


def test_one_prompt_is_printed(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As it is written, and the same as in a file; several samples with their numbers."""
    prompting = Prompting.read(model)
    prompt = prompting.encode_chat([Message("user", "the cat")])
    sampling = Sampling(max_new_tokens=20, stop_ids=prompting.stop_ids)
    seeds = [sample_seed(3, "0", 0), sample_seed(3, "0", 1)]
    (one, _), (two, _) = answers_of_engine(model, [prompt, prompt], sampling, seeds)
    asked = ["--model", model, "--prompt", "the cat", "--max-new-tokens", 20, "--seed", 3]
    generate.main(config(*asked))
    assert capsys.readouterr().out == one.strip() + "\n"
    generate.main(config(*asked, "--num-samples", 2))
    expected = f"── 1 of 2\n{one.strip()}\n── 2 of 2\n{two.strip()}\n"
    assert capsys.readouterr().out == expected


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["--temperature", 0.5], "another temperature (1.0, now 0.5)"),
        (["--seed", 9], "another seed (0, now 9)"),
        (["--num-samples", 2], "another num_samples"),
        (["--format", "text"], "another format"),
    ],
)
def test_other_settings_are_not_mixed(
    model: Path, prompts: Path, tmp_path: Path, change: list[Any], said: str
) -> None:
    output = tmp_path / "out.jsonl"
    asked = ["--model", model, "--input", prompts, "--output", output, "--max-new-tokens", 4]
    generate.main(config(*asked))
    before = output.read_bytes()
    with pytest.raises(ValueError, match=re.escape(said)):
        generate.main(config(*asked, *change))
    assert output.read_bytes() == before


def test_other_inputs_and_models_are_not_mixed(model: Path, prompts: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    asked = config(
        "--model", model, "--input", prompts, "--output", output, "--max-new-tokens", 4
    )  # fmt: skip
    generate.main(asked)
    text = prompts.read_text()
    prompts.write_text(text.replace("green", "red"))
    with pytest.raises(ValueError, match="another input"):
        generate.main(asked)
    prompts.write_text(text)
    (model / "config.json").touch()
    with pytest.raises(ValueError, match="another files of the model"):
        generate.main(asked)


def other_file(folder: Path) -> None:
    (folder / "out.jsonl").write_text("mine\n")


WRONG: list[tuple[list[Any], Any, Callable[[Path], None] | None, str]] = [
    (["--prompt", "the", "--input", "IN"], [], None, "Give either --prompt TEXT or --input FILE"),
    ([], [], None, "Give either --prompt TEXT or --input FILE"),
    (["--input", "IN"], [], None, "--input and --output belong together"),
    (["--input", "IN", "--output", "IN"], [], None, "would overwrite --input"),
    (["--prompt", "the cat " * 60], [], None, f"context of {CONTEXT}; shorten it"),
    (["--prompt", "[INST]"], [], None, "contains the tag [INST]"),
    (["--prompt", "the", "--model", "gone"], [], None, "gone"),
    (["--prompt", "the", "--model", "BARE"], [], None, "holds neither a tokenizer.model nor"),
    (["--prompt", "the", "--temperature", -1], [], None, "temperature must be at least 0"),
    (["--prompt", "the", "--top-p", 0], [], None, "top_p must be above 0"),
    (["--prompt", "the", "--max-new-tokens", 0], [], None, "max_new_tokens must be at least 1"),
    (["--prompt", "the", "--num-samples", 0], [], None, "num_samples must be at least 1"),
    (["--prompt", "the", "--generator.backend", "vllm"], [], None, "add --where cluster"),
    (["--prompt", "the", "--speed", 3], [], None, "--speed"),
    (["FILES"], [], None, "in.jsonl holds no records"),
    (["FILES"], [{"prompt": "the"}, {"question": "a"}], None, "in.jsonl line 2"),
    (["FILES"], [{"prompt": 3}], None, "in.jsonl line 1"),
    (["FILES"], [{"prompt": " "}], None, "in.jsonl line 1: This is no dialogue: the user message"),
    (["FILES", "--format", "text"], [{"prompt": ""}], None, "line 1: The prompt is empty"),
    (["FILES"], [{"prompt": "a"}, {"prompt": "the cat " * 60}], None, "line 2: The prompt has"),
    (["FILES"], [{"prompt": "a", "id": 1}, {"prompt": "b", "id": 1}], None, "'1' occurs before"),
    (["FILES"], [{"prompt": "a"}, {"prompt": "\ud800"}], None, "line 2: The prompt holds half of"),
    (
        ["FILES"],
        [{"messages": [{"role": "assistant", "content": "a"}]}],
        None,
        "line 1: there is no user message; correct or remove that line",
    ),
    (["FILES"], [{"prompt": "a"}], other_file, "out.jsonl exists and is not of this job"),
]


@pytest.mark.parametrize(("arguments", "records", "prepare", "said"), WRONG)
def test_bad_input_in_one_sentence(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch, arguments: list[Any], records: Any,
    prepare: Callable[[Path], None] | None, said: str,
) -> None:  # fmt: skip
    source = written(tmp_path / "in.jsonl", records)
    if "BARE" in arguments:
        (tmp_path / "bare").mkdir()
        for name in ("config.json", "model.safetensors"):
            (tmp_path / "bare" / name).write_bytes((model / name).read_bytes())
    if prepare:
        prepare(tmp_path)
    files = ["--input", source, "--output", tmp_path / "out.jsonl"]
    places = {"IN": [source], "FILES": files, "BARE": [tmp_path / "bare"]}
    found = [str(part) for a in arguments for part in places.get(a, [a])]
    monkeypatch.setattr(generate, "OwnBackend", None)  # no work may begin
    monkeypatch.setattr(sys, "argv", ["jobs/generate.py", "--model", str(model), *found])
    with pytest.raises(SystemExit) as stop:
        options.run(generate.main, GenerateConfig)
    assert stop.value.code == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert re.fullmatch(r"error: [^\n]+\n", told.err)
    assert said in told.err


def test_a_damaged_line_is_named(model: Path, prompts: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    asked = config(
        "--model", model, "--input", prompts, "--output", output, "--max-new-tokens", 4
    )  # fmt: skip
    generate.main(asked)
    output.write_bytes(b"{\n" + output.read_bytes())
    with pytest.raises(ValueError, match=r"out\.jsonl line 1 is no answer that this job wrote"):
        generate.main(asked)


def test_two_jobs_do_not_write_one_file(
    model: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out.jsonl"
    asked = config(
        "--model", model, "--input", prompts, "--output", output, "--max-new-tokens", 4
    )  # fmt: skip
    real = generate.answers

    def meanwhile(*given: Any) -> Any:
        monkeypatch.setattr(generate, "answers", real)
        for other in (asked, replace(asked, temperature=0.5)):
            with pytest.raises(ValueError, match="being written by another job"):
                generate.main(other)
        return real(*given)

    monkeypatch.setattr(generate, "answers", meanwhile)
    generate.main(asked)
    assert len(lines(output)) == 4
    generate.main(asked)  # goes on under the settings of the one that wrote


def test_an_output_beside_the_models_files_is_none_of_them(model: Path, tmp_path: Path) -> None:
    """And an id that is null is none."""
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    source = written(tmp_path / "in.jsonl", [{"id": None, "prompt": p} for p in PROMPTS])
    asked = config(
        "--model", folder, "--input", source, "--output", folder / "out.jsonl",
        "--max-new-tokens", 4,
    )  # fmt: skip
    generate.main(asked)
    before = (folder / "out.jsonl").read_bytes()
    generate.main(asked)
    assert (folder / "out.jsonl").read_bytes() == before
    assert [line["id"] for line in lines(folder / "out.jsonl")] == [
        f"{i}/0" for i in range(len(PROMPTS))
    ]


def test_a_long_answer_holds_the_others_up_but_loses_none(model: Path, tmp_path: Path) -> None:
    """More samples than may be under way at once, written in order all the same."""
    source = written(tmp_path / "in.jsonl", [{"prompt": p} for p in PROMPTS * 8])
    output = tmp_path / "out.jsonl"
    generate.main(
        config(
            "--model", model, "--input", source, "--output", output, "--max-new-tokens", 60,
            "--temperature", 3, "--generator.max-batch-size", 2,
        )
    )  # fmt: skip
    found = lines(output)
    assert [line["id"] for line in found] == [f"{i}/0" for i in range(32)]
    assert len({line["tokens"] for line in found}) > 1
