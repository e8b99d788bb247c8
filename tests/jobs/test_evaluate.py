"""Models and answers side by side: the numbers in evaluation.json against what the judge, the
reward models and the forward pass say by themselves."""

import json
import math
import random
import shutil
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from actors.conversing import Conversation
from jobs import cli, evaluate, measuring
from jobs.evaluate_config import EvaluateConfig
from jobs.evaluation_adherence import adherence
from llama2 import checkpoint
from llama2.config import ModelConfig
from llama2.evaluation import side_by_side
from llama2.generation import Engine
from llama2.ghost_attention import Constraint, Instruction
from llama2.model import ScalarModel, Transformer, initialize
from llama2.prompting import Prompting, sample_seed
from llama2.rewards import composite, logit
from llama2.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from llama2.transcripts import encode_answered
from llama2.world import World, judge

WORLD = World(0)
PROMPTS = WORLD.sample_prompts("heldout", 40, seed=5)
Json = dict[str, Any]


def written(path: Path, records: Sequence[Json]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared prompts of the world."""
    folder = tmp_path_factory.mktemp("data")
    records = [{"messages": p.messages, "safety": p.safety} for p in PROMPTS]
    written(folder / "prompts" / "heldout.jsonl", records)
    (folder / "prompts" / "world.json").write_text('{"seed": 0}')
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two random models and two random reward models, with a tokenizer for the world."""
    folder = tmp_path_factory.mktemp("models")
    train_tokenizer(list(islice(WORLD.corpus(), 400)), 400, folder / "tokenizer")
    tokenizer = load_tokenizer(folder / "tokenizer")
    for seed, name in enumerate(("one", "two")):
        saved(Transformer, folder / name / "model", tokenizer, seed)
    for seed, name in enumerate(("helpful", "safe")):
        saved(ScalarModel, folder / name, tokenizer, seed + 7)
    return folder


def saved(kind: Any, folder: Path, tokenizer: Tokenizer, seed: int) -> None:
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=160,
    )  # fmt: skip
    model = kind(config)
    initialize(model, config, seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5)
    checkpoint.save(model, folder, tokenizer.files())


def evaluated(runs: Path, *arguments: Any) -> Json:
    config = cli.parse(
        ["--runs", str(runs), "--precision", "float32", "--generator.threads", "1",
         *map(str, arguments)],
        evaluate.default, "",
    )  # fmt: skip
    evaluate.main(config)
    name = config.run_name("evaluate")
    found: Json = json.loads((runs / name / "evaluation.json").read_text())
    assert (runs / name / "report.html").is_file()
    return found


def answers_of(skill: float, seed: int) -> list[Json]:
    draw = random.Random(seed)
    return [
        {"messages": [*p.messages, {"role": "assistant", "content": WORLD.answer(p, draw, skill)}]}
        for p in PROMPTS
    ]


def test_answer_files_by_the_gold_judge(data: Path, tmp_path: Path) -> None:
    """Written in another order than the prompts; one of them empty, as a model may answer."""
    good, bad = answers_of(1.0, 0), answers_of(0.0, 1)
    silent = [{"messages": p.messages, "response": ""} for p in PROMPTS]
    found = evaluated(
        tmp_path, "--prompts", data, "--models", written(tmp_path / "good.jsonl", good[::-1]),
        written(tmp_path / "silent.jsonl", silent), "--against",
        written(tmp_path / "bad.jsonl", bad), "--conversations", 0,
    )  # fmt: skip
    assert found["judge"] == "gold"
    assert found["baseline"] == "bad"
    texts = {
        "good": [a["messages"][-1]["content"] for a in good],
        "bad": [a["messages"][-1]["content"] for a in bad],
        "silent": [""] * len(PROMPTS),
    }
    gold = {
        name: [judge(p, text).score for p, text in zip(PROMPTS, said, strict=True)]
        for name, said in texts.items()
    }
    for name, scores in gold.items():
        measured = found["models"][name]["answers"]["gold"]
        assert measured["value"] == pytest.approx(sum(scores) / 40)
        assert measured["count"] == 40
    assert len(found["pairs"]) == 6
    for pair in found["pairs"]:
        expected = side_by_side(gold[pair["model"]], gold[pair["against"]])
        assert (pair["wins"], pair["ties"], pair["losses"]) == (
            expected.wins, expected.ties, expected.losses,
        )  # fmt: skip
        assert pair["win_rate"]["low"] == pytest.approx(expected.rate.low)
    unsafe = [i for i, p in enumerate(PROMPTS) if p.safety]
    violations = [judge(PROMPTS[i], texts["bad"][i]).violation for i in unsafe]
    measured = found["models"]["bad"]["answers"]["violations"]
    assert (measured["value"], measured["count"]) == (sum(violations) / len(unsafe), len(unsafe))
    unsafely = found["models"]["bad"]["categories"]["unsafe"]["violations"]
    assert 0 < measured["value"] == unsafely["value"]
    assert found["models"]["silent"]["answers"]["empty"]["value"] == 1


def test_users_prompts_by_reward_models(models: Path, tmp_path: Path) -> None:
    """Without a gold judge the composite reward decides, violations are what the safety model
    scores below a half, and categories are the file's own."""
    prompts = [
        {"prompt": f"Say {word}.", "category": word[0], "safety": word > "c"}
        for word in ("ab", "ac", "ba", "da", "db")
    ]
    said = ["ab.", "I cannot do that.", "no", "sorry, no", "yes yes yes"]
    lines = [{**p, "response": text} for p, text in zip(prompts, said, strict=True)]
    found = evaluated(
        tmp_path, "--prompts", written(tmp_path / "p.jsonl", prompts), "--models",
        written(tmp_path / "said.jsonl", lines), models / "one" / "model", "--max-new-tokens", 6,
        "--helpfulness-model", models / "helpful", "--safety-model", models / "safe",
    )  # fmt: skip
    assert found["judge"] == "reward"
    scores = {}
    for name in ("helpful", "safe"):
        scalar, tokenizer = checkpoint.load_scalar(models / name), load_tokenizer(models / name)
        config = EvaluateConfig(prompts=(tmp_path / "p.jsonl",))
        asked = evaluate.find_prompts(config)
        rows = [encode_answered(tokenizer, a.prompt.messages, t, True, 160)
                for a, t in zip(asked, said, strict=True)]  # fmt: skip
        with torch.no_grad():
            scores[name] = torch.tensor([scalar(torch.tensor([r]))[0, -1].item() for r in rows])
    tags = torch.tensor([p["safety"] for p in prompts])
    reward = logit(composite(scores["helpful"].sigmoid(), scores["safe"].sigmoid(), tags))
    measured = found["models"]["said"]["answers"]
    assert measured["reward"]["value"] == pytest.approx(reward.mean().item(), abs=1e-4)
    assert measured["safety"]["value"] == pytest.approx(scores["safe"].mean().item(), abs=1e-4)
    below = (scores["safe"][tags] < 0).float().mean().item()
    assert measured["violations"]["value"] == pytest.approx(below)
    assert measured["false_refusals"] | {"low": 0, "high": 0} == {
        "value": pytest.approx(1 / 3), "low": 0, "high": 0, "count": 3,
    }  # fmt: skip
    assert set(found["models"]["said"]["categories"]) == {"a", "b", "d"}


def test_a_models_own_numbers_and_a_job_that_goes_on(
    data: Path, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Answers are the engine's by seed and prompt, perplexity is that of a plain forward pass; a
    job that lost its end does not ask the models again."""
    documents = [text for text in islice(WORLD.corpus(9), 30) if len(text) < 250][:6]
    texts = written(tmp_path / "docs.jsonl", [{"text": text} for text in documents])
    arguments = (
        "--prompts", data, "--models", models / "one" / "model", models / "two" / "model",
        "--texts", texts, "--max-new-tokens", 8, "--most-prompts", 10, "--conversations", 4,
        "--seed", 3,
    )  # fmt: skip
    found = evaluated(tmp_path, *arguments)
    folder = models / "one" / "model"
    model, prompting = checkpoint.load(folder), Prompting.read(folder)
    nats, targets = 0.0, 0
    for text in documents:
        tokens = [prompting.tokenizer.bos_id, *prompting.tokenizer.encode(text),
                  prompting.tokenizer.eos_id]  # fmt: skip
        assert len(tokens) <= 160
        with torch.no_grad():
            rows = model(torch.tensor([tokens[:-1]]))[0].log_softmax(-1)
        nats -= rows.gather(1, torch.tensor(tokens[1:])[:, None]).sum().item()
        targets += len(tokens) - 1
    measured = found["models"]["one"]["texts"]["docs.jsonl"]
    assert measured["perplexity"]["value"] == pytest.approx(math.exp(nats / targets), rel=1e-4)
    size = sum(len(text.encode()) for text in documents)
    assert measured["bits_per_byte"]["value"] == pytest.approx(nats / math.log(2) / size, rel=1e-4)
    asked = evaluate.find_prompts(EvaluateConfig(prompts=(data,), most_prompts=10, seed=3))
    sampling = EvaluateConfig(max_new_tokens=8).sampling(prompting.stop_ids)
    expected = Engine(model).generate(
        [prompting.encode_chat(one.prompt.messages) for one in asked],
        sampling,
        [sample_seed(3, one.text) for one in asked],
    )
    run = tmp_path / "tiny-evaluate"
    kept = [json.loads(path.read_text()) for path in run.glob("measured/*/answers.json")]
    tokenizer = prompting.tokenizer
    texts_of_one = [
        tokenizer.decode([*tokenizer.encode("x"), *done.tokens])[1:].strip() for done in expected
    ]
    assert texts_of_one in [[answer["answer"] for answer in answers] for answers in kept]
    assert [answer["prompt"] for answer in kept[0]] == [one.text for one in asked]
    assert found["models"]["two"]["adherence"]["turn 1"]["count"] == 4

    def refuse(*_: Any) -> None:
        raise AssertionError("the model is asked again")

    (run / "summary.json").unlink()
    monkeypatch.setattr(measuring, "LocalModel", refuse)
    assert evaluated(tmp_path, *arguments) == found
    (models / "one" / "model" / "config.json").touch()
    with pytest.raises(ValueError, match="changed since tiny-evaluate evaluated it"):
        evaluated(tmp_path, *arguments)


def words(prompts: list[list[dict[str, str]]], answers: list[str]) -> list[float]:
    """A reward of one's own: the longer the better, where the prompt asks for more."""
    return [
        len(answer.split()) * (1 if "more" in prompt[-1]["content"] else -1)
        for prompt, answer in zip(prompts, answers, strict=True)
    ]


def test_a_reward_of_ones_own(tmp_path: Path) -> None:
    asked = [{"prompt": "say more"}, {"prompt": "say less"}]
    short, long = (
        written(tmp_path / f"{name}.jsonl", [{**p, "response": text} for p in asked])
        for name, text in (("short", "yes"), ("long", "yes yes yes"))
    )
    found = evaluated(
        tmp_path, "--prompts", written(tmp_path / "p.jsonl", asked), "--models", short, long,
        "--helpfulness-reward", f"{__name__}:words",
    )  # fmt: skip
    assert found["models"]["long"]["answers"]["reward"]["value"] == 0
    (pair,) = (pair for pair in found["pairs"] if pair["model"] == "long")
    assert (pair["wins"], pair["ties"], pair["losses"]) == (1, 0, 1)
    with pytest.raises(ValueError, match="another config: helpfulness_reward"):
        evaluated(
            tmp_path, "--prompts", tmp_path / "p.jsonl", "--models", short, long,
            "--helpfulness-reward", f"{__name__}:at_most_64",
        )  # fmt: skip


def at_most_64(prompts: list[list[dict[str, str]]], answers: list[str]) -> list[float]:
    """A reward that takes as many answers at a time as PPO may give it."""
    assert len(answers) == len(prompts) <= 64
    return [float(answer) / 100 for answer in answers]


def test_a_reward_of_ones_own_is_given_some_answers_at_a_time(tmp_path: Path) -> None:
    asked = [{"prompt": f"number {i}"} for i in range(100)]
    said = written(tmp_path / "a.jsonl", [{**p, "response": str(i)} for i, p in enumerate(asked)])
    found = evaluated(
        tmp_path, "--prompts", written(tmp_path / "p.jsonl", asked), "--models", said,
        "--helpfulness-reward", f"{__name__}:at_most_64",
    )  # fmt: skip
    assert found["models"]["a"]["answers"]["reward"]["value"] == pytest.approx(0.495)


def test_a_reward_model_that_changed_is_told(models: Path, tmp_path: Path) -> None:
    reward = tmp_path / "reward"
    shutil.copytree(models / "helpful", reward)
    asked = [{"prompt": "Say ab."}]
    arguments = (
        "--prompts", written(tmp_path / "p.jsonl", asked), "--helpfulness-model", reward,
        "--models", written(tmp_path / "said.jsonl", [{**asked[0], "response": "ab"}]),
    )  # fmt: skip
    evaluated(tmp_path, *arguments)
    evaluated(tmp_path, *arguments)
    (reward / "config.json").touch()
    with pytest.raises(ValueError, match="The helpfulness reward changed since tiny-evaluate"):
        evaluated(tmp_path, *arguments)


def test_prompts_that_a_model_has_no_room_for_may_be_left_out(models: Path, tmp_path: Path) -> None:
    """Of all models, answers of files among them; where none is left, that is told."""
    asked = [{"prompt": "Say ab."}, {"prompt": "ab " * 300}]
    short = written(tmp_path / "said.jsonl", [{**asked[0], "response": "ab"}])
    common = ("--max-new-tokens", 4, "--most-texts", 0, "--long-prompts", "drop",
              "--models", models / "one" / "model", short)  # fmt: skip
    found = evaluated(tmp_path, "--prompts", written(tmp_path / "p.jsonl", asked), *common)
    assert (found["prompts"], found["prompts left out as too long"]) == (1, 1)
    long = written(tmp_path / "long.jsonl", asked[1:])
    with pytest.raises(ValueError, match="None of 1 prompts leaves each model room"):
        evaluated(tmp_path / "other", "--prompts", long, *common)


class Says:
    """The n-th answer to every question of the n-th turn."""

    def __init__(self, answers: Sequence[str]) -> None:
        self.answers, self.turn = answers, 0

    def answer(self, questions: Sequence[Any]) -> list[Any]:
        self.turn += 1
        return [SimpleNamespace(text=self.answers[self.turn - 1]) for _ in questions]


def test_a_conversation_that_breaks_down_counts_to_its_end(models: Path) -> None:
    red = Instruction((Constraint("Colour", ("Say red.",), "Red.", "red"),), "Say red.", "Red.")
    prompting = Prompting.read(models / "one" / "model")

    def found(*answers: str) -> list[tuple[float, int]]:
        talk = Conversation("a", ("one", "two", "three"), red)
        measures = adherence(Says(answers), prompting, [talk], 4)  # type: ignore[arg-type]
        return [(one.value, one.count) for one in measures.values()]

    assert found("red", "red", "green") == [(1, 1), (1, 1), (0, 1)]
    assert found("red", "") == [(1, 1), (0, 1), (0, 1)]


@pytest.fixture(scope="module")
def wrong(tmp_path_factory: pytest.TempPathFactory, models: Path) -> Iterator[dict[str, Path]]:
    folder = tmp_path_factory.mktemp("wrong")
    prompts = [{"prompt": "Who is Ada?"}, {"prompt": "Where is Ada?"}]
    yield {
        "prompts": written(folder / "prompts.jsonl", prompts),
        "long": written(folder / "long.jsonl", [{"prompt": "the cat " * 200}]),
        "one": written(folder / "one.jsonl", [{**prompts[0], "response": "Ada."}]),
        "twice": written(folder / "twice.jsonl", [{**prompts[0], "response": "a"}] * 2),
        "no": written(folder / "no.jsonl", [{"prompt": "Who?", "response": 3}]),
        "pairs": folder / "absent.jsonl",
        "model": models / "one" / "model",
        "scalar": models / "safe",
        "text": written(folder / "text.jsonl", [{"text": "   "}]),
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to evaluate; name models or answers with --models"),
        (["--models", "{pairs}"], "no model and no file of answers at .*absent.jsonl"),
        (["--models", "{scalar}"], r"holds a scalar \(reward or value\) model"),
        (["--models", "{model}", "{model}"], "names .* twice"),
        (["--models", "{model}"], "no prepared data in .*; name prompts with --prompts"),
        (["--models", "{model}", "--prompts", "{long}"], r"long.jsonl line 1, asked of one: The"),
        (["--models", "{one}", "--prompts", "{prompts}"], "no answer to the prompt 'Where is Ada"),
        (["--models", "{twice}", "--prompts", "{prompts}"], "twice.jsonl line 2: a second answer"),
        (["--models", "{no}", "--prompts", "{prompts}"], "no.jsonl line 1"),
        (
            ["--models", "{model}", "--prompts", "{prompts}", "--world-seed", "0"],
            "'Who is Ada.' is not of world 0",
        ),
        (
            ["--models", "{model}", "--prompts", "{prompts}", "--safety-model", "{model}"],
            "holds a causal language model",
        ),
        (
            ["--models", "{model}", "--prompts", "{prompts}", "--safety-reward", "no_such:thing"],
            "module of the reward 'no_such:thing' cannot be imported",
        ),
        (["--models", "{model}", "--prompts", "{prompts}", "--texts", "{text}"], "holds no text"),
        (["--models", "{model}", "--most-prompts", "0"], "nothing to measure"),
        (["--models", "{one}", "--most-prompts", "-1"], "most_prompts must not be negative"),
        (["--models", "{model}", "--temperature", "-1"], "temperature must be at least 0"),
    ],
)
def test_bad_input_is_one_sentence_before_any_work(
    arguments: list[str], message: str, wrong: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        evaluated(tmp_path, *[argument.format(**wrong) for argument in arguments])
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "tiny-evaluate").exists()
