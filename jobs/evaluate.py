"""Evaluation: models side by side.

python jobs/evaluate.py --models runs/tiny-sft/model runs/tiny-ppo/model
python jobs/evaluate.py --name chat --models A B --against C --prompts prompts.jsonl --tasks gsm8k
"""

from contextlib import ExitStack
from dataclasses import fields, replace

from actors.generator import check_backend
from actors.generator_config import GeneratorConfig
from cluster.placement import check_capacity
from cluster.run_directory import RunDirectory
from cluster.session import session
from jobs import academic, cli, evaluation_results
from jobs.evaluate_config import EvaluateConfig
from jobs.evaluation_adherence import find_conversations
from jobs.evaluation_inputs import (
    Inputs,
    baseline,
    find_prompts,
    find_rewards,
    find_subjects,
    prompt_tokens,
    read_answers,
)
from jobs.evaluation_texts import encoded, find_texts
from jobs.measuring import judged, measure
from jobs.presets import Preset
from jobs.sampling import fits
from llama2.prompting import Prompting

MAY_CHANGE = (
    "cluster", "runs", "wandb_project", "where", "timeout",
    # Another backend draws other answers.
    *(f"generator.{field.name}" for field in fields(GeneratorConfig) if field.name != "backend"),
)  # fmt: skip


def main(config: EvaluateConfig) -> None:
    """Evaluate models, or answers, and compare every two of them."""
    run = RunDirectory(config.runs, config.run_name("evaluate"))
    if run.config.exists():
        run.open(cli.plain(config), may_change=MAY_CHANGE)
    inputs = read_inputs(config)
    if run.is_finished:
        check_unchanged(run, inputs)
        print(f"{run.name}: finished already.\n\n{evaluation_results.read(run)}")
        return
    with ExitStack() as stack:
        if config.where == "cluster":
            stack.enter_context(session(config.cluster))
            most = replace(config.generator, count=config.generator.most)
            check_capacity({"generator": most})
        run.open(cli.plain(config), may_change=MAY_CHANGE)
        folder = run.path / "measured"
        measured = [measure(config, folder, inputs, subject) for subject in inputs.subjects]
        measured = judged(config, inputs, measured)
    evaluation_results.write(run, inputs, measured)
    print(f"\n{evaluation_results.read(run)}\n")
    print(f"All numbers are in {run.path / 'evaluation.json'}, the report is {run.report}.")


def read_inputs(config: EvaluateConfig) -> Inputs:
    """Read and check everything. Raises `ValueError` or `FileNotFoundError` for what is missing,
    malformed, or does not fit together."""
    check_backend(config.generator)
    subjects = find_subjects(config)
    given_prompts = asked = find_prompts(config)
    texts = find_texts(config)
    models = {s.name: Prompting.read(s.path) for s in subjects if s.kind == "model"}
    if config.long_prompts == "drop":
        asked = [one for one in asked if all(fits(one.prompt.messages, p) for p in models.values())]
        if given_prompts and not asked:
            raise ValueError(
                f"None of {len(given_prompts)} prompts leaves each model room for an answer; give "
                "shorter ones."
            )
    for subject in subjects:
        if subject.kind == "answers":
            read_answers(subject, asked)
            continue
        prompting = models[subject.name]
        prompt_tokens(subject, prompting, asked)
        for given in texts if config.texts else ():
            if encoded(given, prompting, config.most_texts) is None:
                raise ValueError(
                    f"{given.path} was prepared with another tokenizer than that of "
                    f"{subject.path}; give the texts themselves instead."
                )
    tasks = academic.load_tasks(config)
    of_world = any(one.known for one in asked)
    conversations = find_conversations(config, of_world)
    if not (asked or texts or tasks or conversations):
        raise ValueError(
            "There is nothing to measure; give --prompts, --texts or --tasks, or prepare data."
        )
    if not asked and all(subject.kind == "answers" for subject in subjects):
        raise ValueError("Answers alone are measured by prompts; give --most-prompts above 0.")
    return Inputs(
        subjects,
        baseline(config, subjects),
        asked,
        len(given_prompts) - len(asked),
        find_rewards(config),
        texts,
        conversations,
        tasks,
        academic.task_files(config),
    )


def check_unchanged(run: RunDirectory, inputs: Inputs) -> None:
    """Raise `ValueError` where what a finished evaluation was of is no longer the same."""
    summary = run.summary() or {}
    # Evaluations of before rewards were looked at have no stamps of them.
    before, scorers = summary["stamps"], summary.get("scorers", inputs.scorers)
    for name in ("helpfulness", "safety"):
        if scorers.get(name) != inputs.scorers.get(name):
            raise ValueError(
                f"The {name} reward changed since {run.name} scored by it; give another --name."
            )
    for subject in inputs.subjects:
        if before.get(subject.name) != inputs.stamp(subject):
            raise ValueError(
                f"{subject.path}, or what it is asked, changed since {run.name} evaluated it; give "
                "another --name."
            )


def default(preset: Preset) -> EvaluateConfig:
    """Of a preset: answers as long as those of its PPO."""
    return EvaluateConfig(preset=preset.ppo.preset, max_new_tokens=preset.ppo.max_new_tokens)


if __name__ == "__main__":
    cli.run(main, default)
