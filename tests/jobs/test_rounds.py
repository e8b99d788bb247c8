"""The rounds of the outer loop: what follows what, and from whom each stage takes its input."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from actors.generator_config import GeneratorConfig
from cluster.lineage import Lineage
from cluster.run_directory import RunDirectory
from jobs import cli, rlhf
from jobs.annotations import check_annotator
from jobs.configs import RewardModelConfig, SftConfig
from jobs.presets import PRESETS, preset, tiny
from jobs.rlhf_config import MAY_CHANGE, RlhfConfig
from jobs.rounds import Plan, Stage, Start
from llama2.ppo import PPOSettings
from llama2.records import Comparison, Dialogue, parse_comparisons, parse_dialogues
from llama2.sources import WorldSource

VLLM = GeneratorConfig(backend="vllm")


def plan(tmp_path: Path, **changes: Any) -> Plan:
    config = replace(RlhfConfig.of(tiny()), runs=tmp_path, **changes)
    files = [tmp_path / f"{name}.jsonl" for name in ("dialogues", "helpful", "safe")]
    start = Start(
        tmp_path / "base", tmp_path / "chat", tmp_path / "data", tiny().prepare,
        (files[0],), (files[1],), (files[2],),
    )  # fmt: skip
    return Plan(config, tmp_path / "loop", start)


def by_name(made: Plan) -> dict[str, Stage]:
    return {stage.name: stage for stage in made.stages()}


def test_the_papers_five_rounds(tmp_path: Path) -> None:
    """Rejection sampling through V4, Ghost Attention after V3, PPO in V5 (sections 3.2 and 3.3)."""
    names = [stage.name for stage in plan(tmp_path).stages()]
    always = ["comparisons", "reward-data", "helpfulness", "safety"]
    rounds = [[*always, "rejection", "sft"]] * 3
    rounds += [[*always, "rejection", "ghosts", "sft"], [*always, "ppo"]]
    wanted = [f"v{n}-{name}" for n, several in enumerate(rounds, 1) for name in several]
    assert names == [*wanted, "evaluation"]


def test_every_parent_comes_before_its_child(tmp_path: Path) -> None:
    for changes in ({}, {"rounds": 1}, {"distill": True, "ghost_attention_after": 1}):
        seen = {"base", "sft", "data"}
        for stage in plan(tmp_path, **changes).stages():
            assert set(stage.parents) <= seen, stage.name
            assert len(set(stage.parents)) == len(stage.parents)
            seen.add(stage.name)


def test_each_stage_takes_what_the_newest_version_gives(tmp_path: Path) -> None:
    made = plan(tmp_path)
    stages, root = by_name(made), made.root
    asked = {name: stage.job() for name, stage in stages.items()}
    first, third = asked["v1-comparisons"], asked["v3-comparisons"]
    assert (first.policy, first.variant) == (tmp_path / "chat", None)
    assert (third.policy, third.variant) == (root / "v2-sft" / "model", root / "v1-sft" / "model")
    assert third.temperatures[0] != third.temperatures[1]
    reward = asked["v3-safety"]
    assert isinstance(reward, RewardModelConfig) and reward.kind == "safety"
    assert reward.start == root / "v2-sft" / "model"
    assert reward.data == (root / "v3-reward-data",)
    sampled = asked["v3-rejection"]
    assert sampled.policy == root / "v2-sft" / "model"
    assert sampled.helpfulness_model == root / "v3-helpfulness" / "model"
    assert sampled.prior == (root / "v2-rejection",)
    assert asked["v1-rejection"].prior == ()
    tuned = asked["v4-sft"]
    assert isinstance(tuned, SftConfig)
    assert tuned.start == tmp_path / "base"  # each version begins at the base model
    assert [path.parent.name for path in tuned.data[1:]] == ["v4-rejection", "v4-ghosts"]
    last = asked["v5-ppo"]
    assert last.policy == root / "v4-sft" / "model"
    assert last.safety_model == root / "v5-safety" / "model"
    final = asked["evaluation"]
    assert [path.parent.name for path in final.models[1:]] == [
        "v1-sft", "v2-sft", "v3-sft", "v4-sft", "v5-ppo"
    ]  # fmt: skip
    assert final.against == final.models[0] == tmp_path / "chat"
    assert last.long_prompts == final.long_prompts == "drop"  # as the other stages do
    assert all(job.runs == root and job.name == name for name, job in asked.items())
    assert asked["v1-rejection"].seed != asked["v2-rejection"].seed


def test_reward_models_learn_from_all_comparisons_so_far(tmp_path: Path) -> None:
    made = plan(tmp_path)
    for number in (1, 2):
        folder = made.root / f"v{number}-comparisons" / "helpfulness"
        folder.mkdir(parents=True)
        (folder / f"v{number}-comparisons.jsonl").write_text("{}\n")
    stages = by_name(made)
    job = stages["v2-reward-data"].job()
    assert [path.name for path in job.helpfulness] == [
        "helpful.jsonl", "v1-comparisons.jsonl", "v2-comparisons.jsonl"
    ]  # fmt: skip
    assert [path.name for path in job.safety] == ["safe.jsonl"]  # no prompt was one of safety
    assert set(stages["v2-reward-data"].parents) == {"v1-comparisons", "v2-comparisons", "sft"}
    assert stages["v1-reward-data"].job().helpfulness == job.helpfulness[:2]


def test_the_lineage_has_all_files_that_no_stage_made(tmp_path: Path) -> None:
    compared = RlhfConfig.of(tiny()).evaluate
    names = ("constraints.jsonl", "texts.jsonl", "task.yaml", "tasks")
    constraints, texts, task, folder = (tmp_path / name for name in names)
    compared = replace(
        compared, constraints=constraints, texts=(texts,), tasks=(str(task), "gsm8k"),
        tasks_folder=folder,
    )  # fmt: skip
    made = plan(tmp_path, evaluate=compared)
    benchmark = tmp_path / "benchmark.jsonl"
    prepared = replace(made.start.prepared, benchmarks=(benchmark,))
    stages = by_name(replace(made, start=replace(made.start, prepared=prepared)))
    assert set(stages["evaluation"].data) == {constraints, texts, task, folder}
    assert benchmark in stages["v2-reward-data"].data


def test_a_round_without_comparisons_of_a_kind_says_so(tmp_path: Path) -> None:
    made = plan(tmp_path)
    bare = replace(made, start=replace(made.start, safety=()))
    with pytest.raises(ValueError, match="Round 1 has no comparisons for the safety reward model"):
        by_name(bare)["v1-reward-data"].job()


def test_people_rate_each_round_in_a_file_of_its_own(tmp_path: Path) -> None:
    stages = by_name(plan(tmp_path, annotations=tmp_path / "ratings"))
    assert stages["v2-comparisons"].job().annotations == tmp_path / "ratings" / "v2.jsonl"
    assert stages["v2-comparisons"].data == (tmp_path / "ratings" / "v2.jsonl",)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_has_a_loop_that_replays(name: str, tmp_path: Path) -> None:
    config = RlhfConfig.of(preset(name))
    (tmp_path / "config.yaml").write_text(cli.shown(config))
    assert cli.from_file(tmp_path / "config.yaml", RlhfConfig) == config
    assert config.ppo.preset == config.preset == name


def test_what_may_change_is_there(tmp_path: Path) -> None:
    found = cli.plain(RlhfConfig.of(tiny()))
    for name in MAY_CHANGE:
        place: Any = found
        for part in name.split("."):
            assert part in place, name
            place = place[part]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"rounds": 0}, "rounds must be from 1 to 99, not 0"),
        ({"ghost_attention_after": -1}, "ghost_attention_after must not be negative"),
        ({"safety": tiny().helpfulness}, "safety.kind is helpfulness"),
    ],
)
def test_numbers_that_mean_nothing(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        replace(RlhfConfig.of(tiny()), **changes)


def test_inputs_that_are_not_there(tmp_path: Path) -> None:
    config = replace(RlhfConfig.of(tiny()), runs=tmp_path)
    with pytest.raises(FileNotFoundError, match="ratings does not exist; create it"):
        rlhf.main(replace(config, annotations=tmp_path / "ratings"))
    with pytest.raises(ValueError, match="holds no prepared prompts"):
        rlhf.main(replace(config, data=tmp_path))
    large = replace(RlhfConfig.of(preset("7b")), runs=tmp_path)
    with pytest.raises(ValueError, match=r"7b-data, 7b-pretrain, 7b-sft .* base, policy and data"):
        rlhf.main(large)


def test_options_of_late_stages_are_refused_before_the_first(tmp_path: Path) -> None:
    config = replace(RlhfConfig.of(tiny()), runs=tmp_path)
    for name, changes, message in (
        ("ppo", {"batch_size": 100}, "batch_size 100 is not a multiple of minibatch_size 64"),
        ("safety", {"other_share": 2.0}, "other_share must be at least 0 and below 1"),
        ("ppo", {"safety_reward": "a:b"}, "ppo is scored by the round's own reward models"),
        ("evaluate", {"helpfulness_reward": "a:b"}, "evaluate is scored by the round's own"),
        ("ppo", {"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ("sft", {"batch_rows": 0}, "batch_rows 0 leaves some of"),
        ("sft", {"save_every": 0}, "save_every must be at least 1"),
        ("safety", {"sequence_parallel": 3}, "sequence_parallel 3 does not divide"),
        ("helpfulness", {"tokenizer": tmp_path}, "leave helpfulness.tokenizer out"),
        ("evaluate", {"most_prompts": 0}, "set evaluate.most_prompts"),
        ("evaluate", {"tasks": ("no_such.yaml",)}, "There is no file no_such.yaml"),
        ("evaluate", {"texts": (tmp_path / "gone.txt",)}, "gone.txt"),
        ("evaluate", {"constraints": tmp_path / "gone.jsonl"}, "gone.jsonl"),
        ("ghost_attention", {"constraints": tmp_path / "gone.jsonl"}, "gone.jsonl"),
        ("rejection_sampling", {"generator": VLLM}, "vllm, which is not installed here"),
        (
            "ppo",
            {"ppo": PPOSettings(ptx_coefficient=1.0), "pretraining_data": tmp_path},
            "holds no prepared pretraining data",
        ),
    ):
        changed = replace(getattr(config, name), **changes)  # type: ignore[arg-type]
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            rlhf.main(replace(config, **{name: changed}))
    distilling = replace(config.context_distillation, preprompts=tmp_path / "gone.jsonl")
    with pytest.raises(FileNotFoundError, match=r"gone\.jsonl"):
        rlhf.main(replace(config, context_distillation=distilling, distill=True))
    assert not list(tmp_path.iterdir())


def test_pretraining_rows_are_those_of_the_loops_data(tmp_path: Path) -> None:
    (tmp_path / "data" / "pretrain" / "train").mkdir(parents=True)
    mixed = replace(tiny().ppo, ppo=PPOSettings(ptx_coefficient=1.0))
    stage = by_name(plan(tmp_path, ppo=mixed))["v5-ppo"]
    assert stage.data == (tmp_path / "data" / "pretrain" / "train",)
    assert stage.job().pretraining_data == tmp_path / "data"
    assert by_name(plan(tmp_path))["v5-ppo"].data == ()


def test_people_and_judge_do_not_take_turns(tmp_path: Path) -> None:
    rated = RunDirectory(tmp_path, "rated")
    rated.open({"annotations": "ratings"})
    check_annotator(rated, tmp_path / "moved")
    with pytest.raises(ValueError, match=r"people's ratings \(ratings\) count; go on with"):
        check_annotator(rated, None)
    judged = RunDirectory(tmp_path, "judged")
    judged.open({"annotations": None})
    check_annotator(judged, None)
    with pytest.raises(ValueError, match="the gold judge compares; go on without"):
        check_annotator(judged, tmp_path)


def test_a_lineage_that_was_deleted_is_told(tmp_path: Path) -> None:
    config = replace(RlhfConfig.of(tiny()), runs=tmp_path)
    run = RunDirectory(tmp_path, "tiny-rlhf")
    run.open(cli.plain(config))
    (run.path / "stages.jsonl").write_text('{"stage": "v1-comparisons", "seconds": 1}\n')
    with pytest.raises(ValueError, match=r"lineage\.json is gone"):
        rlhf.main(config)


def test_the_worlds_records_as_files_are_what_they_were(tmp_path: Path) -> None:
    for kind, parse in (("sft", parse_dialogues), ("safety", parse_comparisons)):
        source = WorldSource(kind, seed=0, size=30, part_size=20)  # type: ignore[arg-type]
        path = tmp_path / f"{kind}.jsonl"
        rlhf.write_records(source, path)
        before = [one for number in range(2) for one in source.part(number)]
        after = [parse(json.loads(line), "")[0] for line in path.read_text().splitlines()]
        assert len(before) == 30
        for one, other in zip(before, after, strict=True):
            assert isinstance(other, Dialogue | Comparison)
            assert not hasattr(one, "messages") or one.messages == other.messages  # type: ignore[union-attr]
            assert replace(other, source=one.source) == one  # type: ignore[type-var]


def test_finished_stages_are_not_looked_at_again(tmp_path: Path) -> None:
    """A stage that stopped half-way runs again; the one before it does not."""
    loop, calls = RunDirectory(tmp_path, "loop"), []
    loop.path.mkdir()
    lineage = Lineage(loop.path / "lineage.json")

    def work(config: SftConfig) -> None:
        calls.append(config.name)
        run = RunDirectory(config.runs, config.name)
        run.open(cli.plain(config))
        if calls == ["one", "two"]:
            raise ConnectionError("lost")
        (run.model / "weights").write_text(config.name)
        run.finish({})

    def stage(name: str, *parents: str) -> Stage:
        return Stage(name, parents, work, lambda: SftConfig(name=name, runs=loop.path))

    both = [stage("one"), stage("two", "one")]
    with pytest.raises(ConnectionError):
        for one in both:
            rlhf.run_stage(one, loop, lineage)
    before = (loop.path / "one" / "model" / "weights").stat().st_mtime_ns
    again = Lineage(loop.path / "lineage.json")
    again.check()
    for one in both:
        rlhf.run_stage(one, loop, again)
    assert calls == ["one", "two", "two"]
    assert (loop.path / "one" / "model" / "weights").stat().st_mtime_ns == before
    assert list(again.entries["two"].made) == ["two/model/weights"]
    assert again.entries["two"].parents == {"one": again.entries["one"].digest}
    assert list(again.entries["two"].config) == ["two/config.yaml"]


def test_the_best_version_is_that_of_the_highest_score_and_the_earliest() -> None:
    def scored(value: float) -> dict[str, Any]:
        return {"answers": {"gold": {"value": value}}}

    scores = {0: scored(0.5), 1: scored(0.7), 2: scored(0.6), 3: scored(0.7)}
    assert rlhf.best_version("gold", scores) == 1
    assert rlhf.best_version("gold", scores | {4: scored(0.71)}) == 4
