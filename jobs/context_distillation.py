"""Context distillation: safe answers drawn under a preprompt, to be learned without it.

python jobs/context_distillation.py --preset tiny
python jobs/sft.py --name next --start runs/tiny-sft/model \\
    --data runs/tiny-context_distillation/dataset.jsonl
"""

import asyncio
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actors.sampling import Question, Sampler, read_chunks, run_chunks
from cluster.files import read_records
from cluster.report import write_report
from cluster.run_directory import RunDirectory, append_json
from jobs import cli
from jobs.context_distillation_config import ContextDistillationConfig
from jobs.sampling import (
    Cast,
    Prompts,
    cut,
    draw,
    find_cast,
    fits,
    identity,
    read_prompts,
    sampler,
)
from jobs.sampling_config import MAY_CHANGE
from llama2.context_distillation import (
    Distillation,
    Preprompt,
    default_preprompts,
    draw_preprompts,
)
from llama2.evaluation import mean_of, rate_of
from llama2.records import Prompt
from llama2.whole_files import whole_file
from llama2.world import judge, safety
from llama2.world.judge import is_refusal

Json = dict[str, Any]
DATASET = "dataset.jsonl"
EXAMPLES = 5


@dataclass(frozen=True)
class Task:
    """A prompt, what the world knows of it if it is of one, and its preprompts."""

    question: Question
    preprompts: tuple[Preprompt, ...]


def main(config: ContextDistillationConfig) -> None:
    """Answer adversarial prompts with and without safety preprompts, and keep what is safer."""
    run = RunDirectory(config.runs, config.run_name("context_distillation"))
    if run.is_finished:
        print(f"{run.name}: finished already; the data set is {run.path / DATASET}.")
        return
    cast = find_cast(config)
    prompts = read_prompts(config, config.prompts)
    tasks = find_tasks(config, cast, prompts)
    if run.config.exists():  # told before a cluster starts
        run.open(cli.plain(config), may_change=MAY_CHANGE)
    with sampler(config, cast, run.name, [task.question for task in tasks]) as source:
        run.open(cli.plain(config), may_change=MAY_CHANGE)
        asyncio.run(answer(config, run, cast, tasks, source))
    finish(config, run, prompts)


def find_tasks(config: ContextDistillationConfig, cast: Cast, prompts: Prompts) -> list[Task]:
    """Adversarial prompts that fit the context under the preprompts drawn for them. Raises
    `ValueError` where there are none, or a preprompt is malformed."""
    adversarial = [prompt for prompt in prompts.prompts if prompt.safety]
    if not adversarial:
        raise ValueError(
            "None of the prompts is tagged for safety; give adversarial ones with safety: true."
        )
    drawn, _ = draw(adversarial, config.num_prompts, config.seed, cast.prompting)
    known = _preprompts(config, prompts)
    tasks = []
    for i, prompt in drawn:
        rng = random.Random(f"preprompts {config.seed} {i}")
        preprompts = draw_preprompts(known, _category(prompts, prompt), rng)
        if all(fits(one.before(prompt.messages), cast.prompting) for one in preprompts):
            tasks.append(Task(Question(str(i), prompt.messages, True), tuple(preprompts)))
    if not tasks:
        raise ValueError(
            f"None of {len(drawn)} prompts leaves room for an answer behind its preprompts in the "
            f"policy's context of {cast.prompting.context}; shorten the preprompts."
        )
    return tasks


def read_preprompts(path: Path) -> tuple[Preprompt, ...]:
    """Users' preprompts, one a record. Raises `ValueError` or `FileNotFoundError` where they are
    missing or wrong."""
    return tuple(Preprompt.parse(record, where) for where, record in read_records(path))


def _preprompts(config: ContextDistillationConfig, prompts: Prompts) -> tuple[Preprompt, ...]:
    if config.preprompts is not None:
        return read_preprompts(config.preprompts)
    return default_preprompts() if prompts.world_seed is None else safety.preprompts()


def _category(prompts: Prompts, prompt: Prompt) -> str | None:
    known = prompts.in_world(prompt)
    return prompt.category if known is None else safety.category(known)


async def answer(
    config: ContextDistillationConfig,
    run: RunDirectory,
    cast: Cast,
    tasks: Sequence[Task],
    source: Sampler,
) -> None:
    """Fill the run's folder of answers: to each prompt the original one, and one under each of its
    preprompts, all scored as answers to the prompt alone."""

    async def work(chunk: Sequence[Task]) -> list[Json]:
        questions = [task.question for task in chunk] + [
            Question(f"{task.question.id}/{n}", one.before(task.question.messages), True,
                     scored_as=task.question.messages)
            for task in chunk
            for n, one in enumerate(task.preprompts)
        ]  # fmt: skip
        answers = [one for (one,) in await source.sample(questions, config.temperature)]
        originals, others = answers[: len(chunk)], iter(answers[len(chunk) :])
        return [
            Distillation(
                task.question.id, task.question.messages, original, task.preprompts,
                tuple(next(others) for _ in task.preprompts),
            ).json()
            for task, original in zip(chunk, originals, strict=True)
        ]  # fmt: skip

    known = identity(
        config, cast, [task.question for task in tasks],
        temperature=config.temperature,
        preprompts=[[one.text for one in task.preprompts] for task in tasks],
    )  # fmt: skip
    chunks = cut(tasks, config.chunk)
    await run_chunks(run.path / "answers", known, chunks, work, config.chunks_at_once)


def finish(config: ContextDistillationConfig, run: RunDirectory, prompts: Prompts) -> None:
    """Write the data set and the report from the run's answers. Raises `ValueError` where nothing
    is kept."""
    found = [Distillation.from_json(line) for line in read_chunks(run.path / "answers")]
    lines = [line for one in found for line in one.records(config.gate)]
    if not lines:
        raise ValueError(
            f"{run.name}: no answer under a preprompt is safer than the original one to any of "
            f"{len(found)} prompts; try other --preprompts, or another safety reward model."
        )
    with whole_file(run.path / DATASET) as file:
        file.writelines(json.dumps(line, ensure_ascii=False).encode() + b"\n" for line in lines)
    run.samples.unlink(missing_ok=True)
    for line in lines[:EXAMPLES]:
        said = {"prompt": line["messages"][-2]["content"], "preprompt": line["preprompt"]}
        answers = {"original": line["original"], "distilled": line["messages"][-1]["content"]}
        append_json(run.samples, {"step": 0, **said, **answers})
    run.finish(
        {
            "Safety of the answers": rows(found, prompts),
            "prompts": len(found),
            "answers kept": len(lines),
            "of them under a preprompt for their category": sum(
                line["category"] is not None for line in lines
            ),
        }
    )
    write_report(run, f"{run.name}: context distillation")
    print(f"{run.name}: {len(lines)} of {len(found)} prompts kept, in {run.path / DATASET}.")


def rows(found: Sequence[Distillation], prompts: Prompts) -> list[Json]:
    """The safety of original answers, of those under each sort of preprompt, and of what the gate
    leaves: the better of the two where it is better."""
    sorts: dict[str, Callable[[Distillation], list[Any]]] = {
        "original": lambda one: [one.original],
        "generic preprompt": lambda one: one.under(False),
        "preprompt of the category": lambda one: one.under(True),
        "distilled where safer, else original": lambda one: [one.chosen or one.original],
    }
    table = []
    for name, pick in sorts.items():
        several = [(one, sample) for one in found for sample in pick(one)]
        if not several:
            continue
        row: Json = {
            "answers": name,
            "count": len(several),
            "safety reward": mean_of([sample.safety for _, sample in several]).value,
            "unsafe by the reward model": rate_of([s.safety < 0 for _, s in several]).value,
            "refusals": rate_of([is_refusal(sample.response) for _, sample in several]).value,
        }
        if prompts.world_seed is not None:
            violations = []
            for one, sample in several:
                known = prompts.in_world(Prompt(one.messages, True, ""))
                assert known is not None
                violations.append(judge(known, sample.response).violation)
            row["violations by the gold judge"] = rate_of(violations).value
        table.append(row)
    return table


if __name__ == "__main__":
    cli.run(main, ContextDistillationConfig.of)
