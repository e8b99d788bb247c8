"""The outer loop of human feedback: versions V1, V2, ... of a chat model.

python jobs/rlhf.py --preset tiny
python jobs/rlhf.py --name mine --policy sft/ --base base/ --data runs/mine-data \\
    --annotations ratings/
"""

import json
import os
import shutil
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from actors.generator import check_backend
from cluster.lineage import Lineage
from cluster.report import write_report
from cluster.run_directory import RunDirectory, append_json, read_json_lines
from cluster.session import session
from jobs import academic, cli, ppo, reward_model, safety_data, stages, training
from jobs.annotations import check_annotator
from jobs.context_distillation import read_preprompts
from jobs.conversations import read_constraints
from jobs.evaluate_config import EvaluateConfig
from jobs.evaluation_adherence import check_constraints
from jobs.evaluation_results import interval
from jobs.evaluation_texts import find_texts
from jobs.ppo_inputs import Models, check_policy, find_prompts, pretraining_rows
from jobs.prepare import sources
from jobs.prepare_config import PrepareConfig
from jobs.rlhf_config import MAY_CHANGE, RlhfConfig
from jobs.rounds import BASE, DATA, POLICY, Plan, Stage, Start
from llama2.checkpoint import check_folder
from llama2.prompting import Prompting
from llama2.records import Comparison, Dialogue
from llama2.sources import WorldSource
from llama2.whole_files import whole_file

Json = dict[str, Any]
TABLE, SECONDS = "Versions", "Seconds of each stage"
STAGES = "stages.jsonl"
SCORED = ("rejection_sampling", "ghost_attention", "context_distillation", "ppo", "evaluate")
ROWS = {
    "gold": "gold score",
    "reward": "reward by the last reward models",
    "violations": "violations",
    "false_refusals": "false refusals",
    "tokens": "answer length (tokens)",
}
NOTE = (
    "All versions answered the same held-out prompts with the same seeds, those on which the best "
    "one was chosen. In brackets: 95% confidence intervals."
)


def main(config: RlhfConfig) -> None:
    """Make versions V1, V2, ... by rounds of comparisons, reward models, rejection sampling and,
    at last, PPO."""
    run = RunDirectory(config.runs, config.run_name("rlhf"))
    if run.config.exists():  # told before a cluster starts
        check_annotator(run, config.annotations)
        run.open(cli.plain(config), may_change=MAY_CHANGE)
    lineage = Lineage(run.path / "lineage.json")
    if not lineage.entries and (run.path / STAGES).exists():
        raise ValueError(f"{lineage.path} is gone; put it back, or begin anew with another --name.")
    lineage.check()
    if run.is_finished:
        write_missing_report(run)
        print(f"{run.name}: finished already.\n\n{told(run)}")
        return
    check_named(config)
    absent = stages.unfinished(config, _needed(config))
    stages.check_absent(config, absent, "base, policy and data")
    with session(config.cluster):
        if absent:
            before = stages.STAGES[: stages.STAGES.index(absent[-1]) + 1]
            stages.run_stages(config, stages.unfinished(config, before))
        if not run.config.exists():  # of a call that ended before it had claimed the run
            shutil.rmtree(run.path / "initial", ignore_errors=True)
        start = find_start(config, run)
        check_prompts(config, start)
        run.open(cli.plain(config), may_change=MAY_CHANGE)
        plan = Plan(config, run.path, start)
        record_start(lineage, start, chained=len(_needed(config)) == 3)
        for stage in plan.stages():
            run_stage(stage, run, lineage)
    finish(run, plan, lineage)
    print(f"\n{told(run)}")


def check_named(config: RlhfConfig) -> None:
    """Raise for a named input that is missing or wrong, before the missing ones are made."""
    _check_training(config)
    ppo.check_sizes(config.ppo)
    _check_evaluation(config.evaluate)
    if config.ghost_attention_after and config.ghost_attention.constraints is not None:
        read_constraints(config.ghost_attention.constraints)
    if config.distill and config.context_distillation.preprompts is not None:
        read_preprompts(config.context_distillation.preprompts)
    for name in ("comparisons", *SCORED):
        check_backend(getattr(config, name).generator)
    for name in SCORED:
        job = getattr(config, name)
        if job.helpfulness_reward or job.safety_reward:
            raise ValueError(
                f"{name} is scored by the round's own reward models; leave its helpfulness_reward "
                "and safety_reward out."
            )
    pretraining = config.ppo.pretraining_data or config.data
    if config.ppo.ppo.ptx_coefficient and pretraining is not None:
        pretraining_rows(replace(config.ppo, pretraining_data=pretraining))
    if config.data is not None and not (config.data / "prompts" / "train.jsonl").is_file():
        raise ValueError(f"{config.data} holds no prepared prompts; prepare some with --prompts.")
    if config.annotations is not None and not config.annotations.is_dir():
        raise FileNotFoundError(
            f"The folder {config.annotations} does not exist; create it, for ratings to be put in."
        )


def _check_training(config: RlhfConfig) -> None:
    for name, start in (
        ("helpfulness", config.policy), ("safety", config.policy), ("sft", config.base)
    ):  # fmt: skip
        one = getattr(config, name)
        model = one.model if start is None else check_folder(start, scalar=False)
        training.check_settings(one, model, fresh=False)
        if one.tokenizer is not None:
            raise ValueError(f"All models have the policy's tokenizer; leave {name}.tokenizer out.")
    for one in (config.helpfulness, config.safety):
        reward_model.check(one)


def _check_evaluation(config: EvaluateConfig) -> None:
    if not config.most_prompts:
        raise ValueError("The best version is chosen by prompts; set evaluate.most_prompts.")
    academic.load_tasks(config)
    if config.texts:
        find_texts(config)
    if config.constraints is not None:
        check_constraints(config.constraints)


def check_prompts(config: RlhfConfig, start: Start) -> None:
    """Raise `ValueError` where no prompt, or no held-out one, leaves room for the longest answer of
    PPO, which asks for the most of all stages."""
    models = Models(start.policy, start.policy, start.policy)
    asked = replace(config.ppo, prompts=start.prompts, long_prompts="drop")
    find_prompts(asked, check_policy(start.policy), models)


def _needed(config: RlhfConfig) -> list[str]:
    given = {"data": config.data, "pretrain": config.base, "sft": config.policy}
    return [stage for stage, folder in given.items() if folder is None]


def find_start(config: RlhfConfig, run: RunDirectory) -> Start:
    """Models and data to begin with. The synthetic world's records are written as files first, so
    that they can join others."""
    data = (config.data or config.runs / f"{config.preset}-data").absolute()
    base = (config.base or config.runs / f"{config.preset}-pretrain" / "model").absolute()
    policy = (config.policy or config.runs / f"{config.preset}-sft" / "model").absolute()
    check_folder(base, scalar=False)
    Prompting.read(policy)
    prepared = cli.from_file(data / "config.yaml", PrepareConfig)
    folder = run.path / "initial"
    given = {
        "sft": prepared.dialogues,
        "helpfulness": prepared.helpfulness,
        "safety": prepared.safety,
    }
    for part, named in sources(prepared).items():
        for source in named.values():
            if isinstance(source, WorldSource) and part in given:
                given[part] = (folder / f"world-{part}.jsonl",)
                write_records(source, given[part][0])
    if config.safety_demonstrations:
        path = folder / "safety-demonstrations.jsonl"
        if not path.exists():
            options = safety_data.SafetyDataConfig(
                path, config.safety_demonstrations, config.seed, prepared.world_seed
            )
            safety_data.main(options)
        given["sft"] += (path,)
    every = {part: tuple(path.absolute() for path in paths) for part, paths in given.items()}
    return Start(base, policy, data, prepared, every["sft"], every["helpfulness"], every["safety"])


def write_records(source: WorldSource, path: Path) -> None:
    """The world's dialogues or comparisons as a file of JSON lines; one that is there is left as it
    is."""
    if path.exists():
        return
    with whole_file(path) as file:
        for number in range(source.parts):
            for one in source.part(number):
                if isinstance(one, Dialogue):
                    line: Json = {"messages": [asdict(message) for message in one.messages]}
                else:
                    assert isinstance(one, Comparison)
                    line = {"prompt": [asdict(message) for message in one.prompt]}
                    line |= {"chosen": one.chosen, "rejected": one.rejected}
                    line |= {"rating": one.rating, "safety": one.safety}
                file.write(json.dumps(line).encode() + b"\n")


def record_start(lineage: Lineage, start: Start, chained: bool) -> None:
    """Enter what was there before the first round. `chained` says that each came from the one
    before."""
    parts = (start.data / part for part in ("prompts", "pretrain", "sft"))
    prepared = [part for part in parts if part.is_dir()]
    parents = {BASE: (DATA,), POLICY: (BASE, DATA)} if chained else {}
    for name, folder, made in (
        (DATA, start.data, prepared),
        (BASE, start.base.parent, [start.base]),
        (POLICY, start.policy.parent, [start.policy]),
    ):
        if name not in lineage.entries:
            config = folder / "config.yaml"
            known = config if config.is_file() else None
            lineage.record(name, parents.get(name, ()), known, (), made)


def run_stage(stage: Stage, loop: RunDirectory, lineage: Lineage) -> None:
    """Run a stage, or what is left of it, and enter it. One that was entered is not looked at
    again."""
    if stage.name in lineage.entries:
        return
    began = time.monotonic()
    print(f"\n── {loop.name}: {stage.name}", flush=True)
    run = stage.run(loop.path)
    resumed = run.path.exists()
    stage.main(stage.job())
    made = [run.path / part for part in stage.made if (run.path / part).exists()]
    seconds = round(time.monotonic() - began, 1)
    line = {"stage": stage.name, "seconds": seconds} | ({"resumed": True} if resumed else {})
    append_json(loop.path / STAGES, line)
    lineage.record(stage.name, stage.parents, run.config, stage.data, made)


def finish(run: RunDirectory, plan: Plan, lineage: Lineage) -> None:
    """Choose the best version, copy its model, and write report and summary."""
    found = json.loads((plan.root / "evaluation" / "evaluation.json").read_text("utf-8"))
    paths = {str(plan.model(number)): number for number in range(plan.config.rounds + 1)}
    versions = {paths[model["path"]]: model for model in found["models"].values()}
    best = best_version(found["judge"], versions)
    _copy_model(plan.model(best), run)
    if run.name not in lineage.entries:
        lineage.record(run.name, (plan.version(best), "evaluation"), None, (), (run.model,))
    run.metrics.unlink(missing_ok=True)
    for line in read_json_lines(plan.root / "evaluation" / "metrics.jsonl"):
        append_json(run.metrics, line)
    timed = read_json_lines(run.path / STAGES)
    rows = table(found, versions)
    run.finish(
        {
            TABLE: rows,
            "best": plan.version(best),
            "chosen by": found["judge"],
            "prompts": found["prompts"],
            SECONDS: timed,
            "seconds in all": round(sum(line["seconds"] for line in timed), 1),
            "stages whose seconds are of their last part": [
                line["stage"] for line in timed if "resumed" in line
            ],
        }
    )
    write_missing_report(run)


def write_missing_report(run: RunDirectory) -> None:
    """Write the report of a finished loop unless it is there."""
    if not run.report.exists():
        write_report(run, f"{run.name}: rounds of human feedback", note=NOTE)


def best_version(judge: str, versions: dict[int, Json]) -> int:
    """The number of the version with the highest mean score of the judge, `gold` or `reward`; of
    equals the earliest."""
    return max(sorted(versions), key=lambda number: versions[number]["answers"][judge]["value"])


def table(found: Json, versions: dict[int, Json]) -> list[Json]:
    """A row for each version, from the SFT model on."""
    names = {id(model): name for name, model in found["models"].items()}
    against = {
        pair["model"]: pair["win_rate"]
        for pair in found["pairs"]
        if pair["against"] == found["baseline"]
    }
    rows = []
    for number in sorted(versions):
        model = versions[number]
        row: Json = {"": f"V{number}" if number else "SFT", "run": names[id(model)]}
        row["win rate against SFT"] = interval(against.get(names[id(model)]))
        row |= {title: interval(model["answers"].get(key)) for key, title in ROWS.items()}
        rows.append(row)
    return rows


def told(run: RunDirectory) -> str:
    """The results of a finished loop, for a terminal."""
    summary = run.summary()
    assert summary is not None, "read the results of a finished run"
    lines = []
    for row in summary[TABLE]:
        cells = "; ".join(f"{key} {value}" for key, value in row.items() if key not in ("", "run"))
        lines.append(f"{row['']} ({row['run']}): {cells}")
    lines.append(
        f"The best of {summary['prompts']} held-out prompts is {summary['best']}; its model is in "
        f"{run.model}, the report is {run.report}."
    )
    return "\n".join(lines)


def _copy_model(model: Path, run: RunDirectory) -> None:
    part = run.path / "model.part"
    shutil.rmtree(part, ignore_errors=True)
    shutil.copytree(model, part)
    shutil.rmtree(run.model, ignore_errors=True)
    os.replace(part, run.model)


if __name__ == "__main__":
    cli.run(main, RlhfConfig.of)
