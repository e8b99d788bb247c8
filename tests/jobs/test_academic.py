"""Academic tasks from local files, with lm-evaluation-harness, against counts by hand."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from actors.generator_config import GeneratorConfig
from actors.measured_model import LocalModel
from jobs import academic, evaluate
from jobs.evaluate_config import EvaluateConfig
from llama2 import checkpoint
from llama2.evaluation import rate_of
from llama2.prompting import Prompting
from llama2.scoring import continuations
from tests.actors.endpoint import model_folder

CHOICES = ["cat", "dog", "house"]
QUESTIONS = [
    {"question": f"who sees the {word} {other}", "answer": (i * 7 + j) % 3}
    for i, word in enumerate(("red", "green", "cat", "dog", "house", "garden"))
    for j, other in enumerate(("house", "garden", "cat"))
]
CHOICE = """
task: made_up_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/questions.jsonl}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: ["cat", "dog", "house"]
doc_to_target: answer
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
WRITING = """
task: made_up_writing
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/questions.jsonl}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{said}}}}"
generation_kwargs: {{until: [" "], max_gen_toks: 6}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""
TEXT = """
task: made_up_text
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/questions.jsonl}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{question}}}}"
metric_list: [{{metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}}]
"""
UNSAFE = WRITING.replace("made_up_writing", "made_up_code") + "unsafe_code: true\n"
GROUP = """
group: made_up
task: [made_up_choice, made_up_writing]
aggregate_metric_list: []
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    """A third of the writing questions have the answer that the model gives."""
    pytest.importorskip("lm_eval", reason="needs the extra eval")
    import datasets
    from lm_eval.api.instance import Instance

    from actors.harness_model import HarnessModel

    folder = tmp_path_factory.mktemp("tasks")
    datasets.config.HF_DATASETS_CACHE = folder / "cache"  # not the user's
    seen = HarnessModel(LocalModel(model, "float32", GeneratorConfig()), Prompting.read(model))
    settings = {"until": [" "], "max_gen_toks": 6}
    asked = [Instance("generate_until", {}, (q["question"], settings), 0) for q in QUESTIONS]
    said = seen.generate_until(asked)
    lines = [
        {**question, "said": text if i % 3 == 0 else f"{text}?"}
        for i, (question, text) in enumerate(zip(QUESTIONS, said, strict=True))
    ]
    (folder / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    named = {"choice": CHOICE, "writing": WRITING, "text": TEXT, "code": UNSAFE, "group": GROUP}
    for name, text in named.items():
        (folder / f"{name}.yaml").write_text(text.format(folder=folder))
    return folder


def config(model: Path, runs: Path, **changes: Any) -> EvaluateConfig:
    return EvaluateConfig(
        models=(model,), runs=runs, most_prompts=0, precision="float32", **changes
    )


def test_tasks_of_a_folder(model: Path, tasks: Path, tmp_path: Path) -> None:
    evaluate.main(config(model, tmp_path, tasks=("made_up", "made_up_text"), tasks_folder=tasks))
    found = json.loads((tmp_path / "tiny-evaluate" / "evaluation.json").read_text())
    (measured,) = found["models"].values()
    prompting = Prompting.read(model)
    loaded, tokenizer = checkpoint.load(model), prompting.tokenizer
    right, nats = [], 0.0
    for question in QUESTIONS:
        text = question["question"]
        context = prompting.encode_text(text)
        pairs = [
            (context, prompting.encode_text(f"{text} {choice}")[len(context) :])
            for choice in CHOICES
        ]
        values = [likelihood.logprob for likelihood in continuations(loaded, pairs)]
        right.append(values.index(max(values)) == question["answer"])
        nats -= continuations(loaded, [([tokenizer.bos_id], tokenizer.encode(text))])[0].logprob
    expected = rate_of(right)
    accuracy = measured["tasks"]["made_up_choice"]["acc"]
    assert accuracy == {
        "value": pytest.approx(expected.value), "low": pytest.approx(expected.low),
        "high": pytest.approx(expected.high), "count": len(QUESTIONS),
    }  # fmt: skip
    assert 0 < accuracy["value"] < 1
    written = measured["tasks"]["made_up_writing"]["exact_match"]
    assert (written["value"], written["count"]) == (pytest.approx(1 / 3), len(QUESTIONS))
    size = sum(len(str(q["question"]).encode()) for q in QUESTIONS)
    bits = measured["tasks"]["made_up_text"]["bits_per_byte"]
    assert bits["value"] == pytest.approx(nats / 0.693147 / size, rel=1e-3)
    assert bits["low"] is None or bits["low"] < bits["value"] < bits["high"]


def test_fewer_questions_of_a_file(model: Path, tasks: Path) -> None:
    asked = config(model, tasks, tasks=(str(tasks / "choice.yaml"),), most_documents=5)
    found, shortened = academic.run_tasks(
        asked,
        academic.load_tasks(asked),
        LocalModel(model, "float32", GeneratorConfig()),
        Prompting.read(model),
    )
    assert found["made_up_choice"]["acc"].count == 5
    assert shortened == 0


def test_refusals(model: Path, tasks: Path, tmp_path: Path) -> None:
    """Each in one sentence, before any work."""
    (tmp_path / "broken.yaml").write_text(CHOICE.format(folder=tmp_path))
    cases = {
        "made_up_code": "runs code that the model writes; add --allow-code",
        str(tmp_path / "broken.yaml"): "cannot be loaded .*its data must be at hand",
        str(tmp_path / "absent.yaml"): "There is no file .*absent.yaml",
    }
    for task, message in cases.items():
        with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
            academic.load_tasks(config(model, tmp_path, tasks=(task,), tasks_folder=tasks))
        assert "\n" not in str(caught.value)
    allowed = config(model, tmp_path, tasks=("made_up_code",), tasks_folder=tasks, allow_code=True)
    assert list(academic.load_tasks(allowed)["tasks"]) == ["made_up_code"]


@pytest.mark.slow
def test_the_harness_own_tasks_are_known(model: Path, tasks: Path) -> None:
    """Reads all of the harness's files."""
    with pytest.raises(ValueError, match="no academic task 'mmlu_of_nobody'"):
        academic.load_tasks(config(model, tasks, tasks=("mmlu_of_nobody",)))


def test_the_extra_is_named_where_it_is_missing(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ValueError, match="with its extra eval"):
        academic.load_tasks(config(model, tmp_path, tasks=("mmlu",)))
