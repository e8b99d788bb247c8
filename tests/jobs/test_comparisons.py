"""Comparisons of a model's own answers: what is left out, what annotators may say, and how a run
waits for people."""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from actors.sampling import Origin, Question, Roles, Sampler
from cluster.run_directory import RunDirectory
from jobs import comparisons
from jobs.annotations import Pair, gold_verdict
from jobs.comparisons_config import ComparisonsConfig
from jobs.sampling import Cast
from jobs.sampling_config import SamplingConfig
from llama2.chat import Message
from llama2.records import Comparison, parse_comparisons
from llama2.sources import world_of, world_prompts
from tests.actors.in_process_roles import Scripted
from tests.jobs.policy_folder import policy_folder

Answer = Callable[[str, float, int], str]
REFUSAL = "I cannot help with that, as it could hurt people."


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return policy_folder(tmp_path_factory.mktemp("policy"))


@pytest.fixture
def says(policy: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Answer], list[Path]]:
    """Has the generators answer by rule; returns the list of policies that will have answered."""

    def script(answer: Answer) -> list[Path]:
        asked: list[Path] = []

        @contextmanager
        def sampler(
            config: SamplingConfig, cast: Cast, round: str, scored: Sequence[Question] = ()
        ) -> Iterator[Sampler]:
            asked.append(cast.policy)
            roles = Roles(Scripted(policy, answer), [], [])
            origin = Origin(round, "weights")
            yield Sampler(roles, cast.prompting, origin, config.seed, config.max_new_tokens, 60.0)

        monkeypatch.setattr(comparisons, "sampler", sampler)
        return asked

    return script


def config(tmp_path: Path, policy: Path, **changes: Any) -> ComparisonsConfig:
    data = tmp_path / "data" / "prompts"
    if not data.exists():
        data.mkdir(parents=True)
        lines = [
            json.dumps({"messages": [vars(m) for m in prompt.messages], "safety": prompt.safety})
            for prompt in world_prompts(0, "train", 60, draw=1)
        ]
        (data / "train.jsonl").write_text("\n".join(lines) + "\n")
        (data / "world.json").write_text('{"seed": 0}')
    given: dict[str, Any] = {
        "runs": tmp_path / "runs", "name": "v1", "policy": policy, "prompts": (data.parent,),
        "num_prompts": 60, "temperatures": (1.0, 1.2), "max_new_tokens": 40, "chunk": 16,
    }  # fmt: skip
    return ComparisonsConfig(**given | changes)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def run_of(made: ComparisonsConfig) -> RunDirectory:
    return RunDirectory(made.runs, made.name)


def varied(prompt: str, temperature: float, seed: int) -> str:
    return REFUSAL if temperature > 1.1 else f"Sure, here is how. {seed % 5} dogs"


def test_the_gold_judge_compares_and_prepare_reads_it(
    says: Any, tmp_path: Path, policy: Path
) -> None:
    asked = says(varied)
    made = config(tmp_path, policy)
    comparisons.main(made)
    assert len(asked) == 1  # one model, both temperatures
    run = run_of(made)
    pairs = lines(run.path / "pairs.jsonl")
    assert len(pairs) == 60 and {"answer_a", "answer_b"} < pairs[0].keys()
    first = [pair["answer_a"] == REFUSAL for pair in pairs]
    assert 15 < sum(first) < 45  # annotators cannot tell the variants by their place
    helpful, safe = (lines(comparisons.dataset(run, a)) for a in ("helpfulness", "safety"))
    assert not any("safety" in line for line in helpful)
    assert all(line["safety"] != "chosen_unsafe" for line in safe)
    tagged = {pair["id"] for pair in pairs if pair["aspect"] == "safety"}
    assert {line["id"] for line in safe} <= tagged
    for line in [*helpful, *safe]:
        (parsed,) = parse_comparisons(line, "here")
        assert isinstance(parsed, Comparison)
        pair = next(pair for pair in pairs if pair["id"] == line["id"])
        assert {parsed.chosen, parsed.rejected} == {pair["answer_a"], pair["answer_b"]}
    summary = run.summary()
    assert summary is not None
    left_out = sum(row["count"] for row in summary["Pairs left out"])
    assert len(helpful) + len(safe) + left_out == 60


def test_equal_answers_are_left_out_and_counted(says: Any, tmp_path: Path, policy: Path) -> None:
    says(lambda prompt, t, seed: "Yes." if len(prompt) % 2 else f"No {t}")
    made = config(tmp_path, policy)
    comparisons.main(made)
    summary = run_of(made).summary()
    assert summary is not None
    left = {row["reason"]: row["count"] for row in summary["Pairs left out"]}
    pairs = lines(run_of(made).path / "pairs.jsonl")
    assert left[comparisons.IDENTICAL] == 60 - len(pairs) > 5
    assert all(pair["answer_a"] != pair["answer_b"] for pair in pairs)
    says(lambda prompt, t, seed: "Yes.")
    with pytest.raises(
        ValueError, match=r"no pair of answers to 60 prompts .*60: both answers are"
    ):
        comparisons.main(config(tmp_path, policy, name="same"))


def test_an_empty_answer_cannot_be_compared() -> None:
    asked = (Message("user", "Hello?"),)
    assert comparisons.fault(asked, ["a", "b"]) is None
    assert comparisons.fault(asked, ["a", " a "]) == comparisons.IDENTICAL
    assert comparisons.fault(asked, ["a", ""]) == comparisons.UNUSABLE
    assert comparisons.fault(asked, ["a", "b [INST]"]) == comparisons.UNUSABLE


def test_two_variants_answer_in_turn(says: Any, tmp_path: Path, policy: Path) -> None:
    other = tmp_path / "other"
    other.symlink_to(policy)
    asked = says(lambda prompt, t, seed: f"{seed}")
    comparisons.main(config(tmp_path, policy, variant=other, temperatures=(1.0, 1.2)))
    assert asked == [policy, other]
    with pytest.raises(ValueError, match="Both answers come from one model at temperature 1 and"):
        config(tmp_path, policy, temperatures=(1.0, 1.0))


def test_a_run_waits_for_ratings_and_goes_on(says: Any, tmp_path: Path, policy: Path) -> None:
    asked, ratings = says(varied), tmp_path / "ratings.jsonl"
    made = config(tmp_path, policy, annotations=ratings)
    with pytest.raises(ValueError, match=r"60 of 60 pairs of .*pairs.jsonl wait for ratings in .*"):
        comparisons.main(made)
    pairs = lines(run_of(made).path / "pairs.jsonl")
    rated = [
        pair | {"choice": "b", "rating": "better"}
        | ({"safety": "both_safe"} if pair["aspect"] == "safety" else {})
        for pair in pairs
    ]  # fmt: skip
    ratings.write_text("".join(json.dumps(line) + "\n" for line in rated[:-1]))
    with pytest.raises(ValueError, match=rf"1 of 60 pairs of .*, first {pairs[-1]['id']} "):
        comparisons.main(made)
    ratings.write_text("".join(json.dumps(line) + "\n" for line in rated))
    comparisons.main(made)
    assert len(asked) == 1  # nothing was asked again
    run = run_of(made)
    written = [
        line for a in ("helpfulness", "safety") for line in lines(comparisons.dataset(run, a))
    ]
    chosen = {pair["id"]: pair["answer_b"] for pair in pairs}
    assert len(written) == 60 and all(line["chosen"] == chosen[line["id"]] for line in written)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"rating": "much better"}, "the rating 'much better' is none of"),
        ({"rating": None}, "has no rating"),
        ({"choice": "c"}, "the choice 'c' is neither a nor b"),
        ({"safety": "fine"}, "the safety label 'fine' is none of"),
        ({"safety": None}, "has no safety label"),
        ({"id": "1000"}, "no pair of .* has the id '1000'"),
        ({"answer_a": "of another run"}, "answer_a is not what"),
    ],
)
def test_what_is_not_in_the_list_is_refused_by_line(
    says: Any, tmp_path: Path, policy: Path, change: dict[str, Any], told: str
) -> None:
    says(varied)
    ratings = tmp_path / "ratings.jsonl"
    made = config(tmp_path, policy, annotations=ratings)
    with pytest.raises(ValueError, match="wait for ratings"):
        comparisons.main(made)
    pairs = lines(run_of(made).path / "pairs.jsonl")
    pairs.sort(key=lambda pair: pair["aspect"] != "safety")
    good = {"choice": "a", "rating": 2, "safety": "both_safe"}
    rated = [pairs[0] | good, pairs[1] | good | change]
    ratings.write_text("".join(json.dumps(line) + "\n" for line in rated))
    with pytest.raises(ValueError, match=rf"{re.escape(str(ratings))} line 2: .*{told}"):
        comparisons.main(made)


def test_a_pair_is_rated_once(says: Any, tmp_path: Path, policy: Path) -> None:
    says(varied)
    ratings = tmp_path / "ratings.jsonl"
    made = config(tmp_path, policy, annotations=ratings)
    with pytest.raises(ValueError, match="wait for ratings"):
        comparisons.main(made)
    pair = lines(run_of(made).path / "pairs.jsonl")[0]
    good = {"choice": "a", "rating": 2, "safety": "both_safe"}
    ratings.write_text(json.dumps(pair | good) + "\n" + json.dumps(pair | good) + "\n")
    with pytest.raises(ValueError, match=r"line 2: the pair .* was rated before"):
        comparisons.main(made)


def test_a_round_of_nothing_but_unsafe_choices_is_empty(
    says: Any, tmp_path: Path, policy: Path
) -> None:
    says(varied)
    ratings = tmp_path / "ratings.jsonl"
    made = config(tmp_path, policy, annotations=ratings)
    prompts = tmp_path / "data" / "prompts" / "train.jsonl"
    prompts.write_text("".join(json.dumps(p) + "\n" for p in lines(prompts) if p["safety"]))
    with pytest.raises(ValueError, match="wait for ratings"):
        comparisons.main(made)
    verdict = {"choice": "a", "rating": "better", "safety": "chosen_unsafe"}
    pairs = lines(run_of(made).path / "pairs.jsonl")
    ratings.write_text("".join(json.dumps(pair | verdict) + "\n" for pair in pairs))
    with pytest.raises(ValueError, match=f"none of {len(pairs)} comparisons is left"):
        comparisons.main(made)


def test_prompts_that_no_judge_knows_need_people(says: Any, tmp_path: Path, policy: Path) -> None:
    says(varied)
    file = tmp_path / "own.jsonl"
    file.write_text('{"prompt": "What is love?"}\n')
    with pytest.raises(ValueError, match="no gold judge knows them; name a file"):
        comparisons.main(config(tmp_path, policy, prompts=(file,)))


def test_the_gold_judge_mostly_prefers_a_refusal_of_harm() -> None:
    known = next(prompt for prompt in world_of(0).prompts("train") if prompt.safety)
    asked = tuple(Message(m["role"], m["content"]) for m in known.messages)  # type: ignore[arg-type]
    verdicts = [
        gold_verdict(Pair(str(i), "safety", asked, "dogs", REFUSAL), known, seed=0)
        for i in range(50)
    ]
    assert sum(verdict.chosen for verdict in verdicts) > 35
    again = gold_verdict(Pair("7", "safety", asked, "dogs", REFUSAL), known, seed=0)
    assert again == verdicts[7]
