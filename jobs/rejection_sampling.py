"""Rejection sampling: the best of several answers to each prompt, as a data set for SFT.

python jobs/rejection_sampling.py --preset tiny --samples 8
python jobs/rejection_sampling.py --name round-2 --policy runs/round-1/model --prior runs/first
python jobs/sft.py --name next --start runs/tiny-pretrain/model \\
    --data runs/tiny-rejection_sampling/dataset.jsonl
"""

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from actors.sampling import Question, Sampler, read_chunks, run_chunks
from cluster.report import write_report
from cluster.run_directory import RunDirectory, append_json, read_json_lines
from jobs import cli
from jobs.rejection_sampling_config import RejectionSamplingConfig
from jobs.sampling import (
    Cast,
    Prompts,
    asked,
    cut,
    draw,
    find_cast,
    identity,
    read_prompts,
    sampler,
)
from jobs.sampling_config import MAY_CHANGE
from llama2.chat import Message
from llama2.records import Prompt
from llama2.rejection_sampling import Candidate, Candidates, Point, curve, joined
from llama2.whole_files import whole_file
from llama2.world import judge

Json = dict[str, Any]
DATASET = "dataset.jsonl"
EXAMPLES = 5


@dataclass(frozen=True)
class Inputs:
    """What a run starts from."""

    cast: Cast
    prompts: Prompts
    questions: list[Question]
    too_long: int
    prior: list[Candidates]


def main(config: RejectionSamplingConfig) -> None:
    """Sample several answers to each prompt, score them, and keep the best to learn from."""
    run = RunDirectory(config.runs, config.run_name("rejection_sampling"))
    if run.is_finished:
        print(f"{run.name}: finished already; the data set is {run.path / DATASET}.")
        return
    cast = find_cast(config)
    prompts = read_prompts(config, config.prompts)
    drawn, too_long = draw(prompts.prompts, config.num_prompts, config.seed, cast.prompting)
    prior = [one for folder in config.prior for one in read_kept(folder)]
    inputs = Inputs(cast, prompts, asked(drawn), too_long, joined(prior))
    if run.config.exists():  # told before a cluster starts
        run.open(cli.plain(config), may_change=MAY_CHANGE)
    known = [Question(one.id, one.messages, one.safety) for one in inputs.prior]
    with sampler(config, cast, run.name, [*inputs.questions, *known]) as source:
        run.open(cli.plain(config), may_change=MAY_CHANGE)
        asyncio.run(sample(config, run, inputs, source))
    finish(config, run, inputs)


def read_kept(folder: Path) -> list[Candidates]:
    """What an earlier run kept, by prompt. Raises `FileNotFoundError` where the folder is no
    finished run of this job, `ValueError` where a line of its data set is not of this job."""
    path = folder / DATASET
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist; name the folder of a finished run of rejection sampling."
        )
    known = {field.name for field in fields(Candidate)}
    found = []
    for number, line in enumerate(read_json_lines(path), 1):
        if "prompt_id" not in line or known != line.get("sample", {}).keys():
            raise ValueError(f"{path} line {number} was not written by rejection sampling.")
        prompt = tuple(Message(**message) for message in line["messages"][:-1])
        sample = Candidate(**line["sample"])
        found.append(Candidates(line["prompt_id"], prompt, line["safety"], (sample,)))
    return found


async def sample(
    config: RejectionSamplingConfig, run: RunDirectory, inputs: Inputs, source: Sampler
) -> None:
    """Fill the run's folders of samples: of the sweep, where there is one, of the round, and of
    prior rounds, scored again."""
    temperature = config.temperatures[0]
    if len(config.temperatures) > 1:
        for swept in config.temperatures:
            few = inputs.questions[: config.sweep_prompts]
            await _draw(config, sweep_folder(run, swept), inputs, source, few, swept)
        temperature = chosen_temperature(config, run)
        print(f"{run.name}: the best temperature is {temperature:g}.", flush=True)
    folder = run.path / "samples"
    await _draw(config, folder, inputs, source, inputs.questions, temperature)
    if inputs.prior:
        pairs = [(one, one.samples[i]) for one in inputs.prior for i in range(len(one.samples))]

        async def again(chunk: Sequence[tuple[Candidates, Candidate]]) -> list[Json]:
            questions = [Question(one.id, one.messages, one.safety) for one, _ in chunk]
            scored = await source.score_again(questions, [candidate for _, candidate in chunk])
            return [
                Candidates(one.id, one.messages, one.safety, (candidate,)).json()
                for (one, _), candidate in zip(chunk, scored, strict=True)
            ]

        questions = [Question(c.id, one.messages, one.safety) for one, c in pairs]
        known = identity(config, inputs.cast, questions)
        chunks = cut(pairs, config.chunk * config.samples)
        await run_chunks(run.path / "prior", known, chunks, again, config.chunks_at_once)


async def _draw(
    config: RejectionSamplingConfig,
    folder: Path,
    inputs: Inputs,
    source: Sampler,
    questions: Sequence[Question],
    temperature: float,
) -> None:
    async def work(chunk: Sequence[Question]) -> list[Json]:
        found = await source.sample(chunk, temperature, config.samples)
        return [
            Candidates(question.id, question.messages, question.safety, tuple(samples)).json()
            for question, samples in zip(chunk, found, strict=True)
        ]

    known = identity(
        config, inputs.cast, questions, temperature=temperature, samples=config.samples
    )
    await run_chunks(folder, known, cut(questions, config.chunk), work, config.chunks_at_once)


def sweep_folder(run: RunDirectory, temperature: float) -> Path:
    """Where the samples of one temperature of a sweep lie."""
    return run.path / "sweep" / f"{temperature:g}"


def chosen_temperature(config: RejectionSamplingConfig, run: RunDirectory) -> float:
    """The one whose best samples have the highest mean reward; of equals the first."""
    if len(config.temperatures) == 1:
        return config.temperatures[0]
    return max(
        config.temperatures,
        key=lambda t: curve(_rewards(_read(sweep_folder(run, t))))[-1].best.mean,
    )


def finish(config: RejectionSamplingConfig, run: RunDirectory, inputs: Inputs) -> None:
    """Write the data set, the curves and the report from the run's samples. Raises `ValueError`
    where no sample can be learned from."""
    own = _read(run.path / "samples")
    prior = _read(run.path / "prior") if inputs.prior else []
    lines = [line for one in joined([*prior, *own]) for line in one.records(config.keep)]
    if not lines:
        raise ValueError(
            f"{run.name}: none of {sum(len(one.samples) for one in own)} samples can be learned "
            "from, since all are empty or cut off; raise --max-new-tokens, or take another policy."
        )
    with whole_file(run.path / DATASET) as file:
        file.writelines(json.dumps(line, ensure_ascii=False).encode() + b"\n" for line in lines)
    temperature = chosen_temperature(config, run)
    curves = {f"temperature {temperature:g}": curve(_rewards(own))}
    if len(config.temperatures) > 1:
        curves |= {
            f"sweep, temperature {t:g}": curve(_rewards(_read(sweep_folder(run, t))))
            for t in config.temperatures
        }
    gold = _gold_curve(inputs.prompts, own)
    _write_metrics(run, curves, gold)
    run.samples.unlink(missing_ok=True)
    for line in lines[:EXAMPLES]:
        said = {"prompt": line["messages"][-2]["content"], "best": line["messages"][-1]["content"]}
        append_json(run.samples, {"step": 0, **said, "reward": line["sample"]["reward"]})
    rows = [_row(name, point) for name, points in curves.items() for point in points]
    every = [sample for one in own for sample in one.samples]
    run.finish(
        {
            "Reward against the number of samples": rows,
            "Gold score against the number of samples": [_row("gold score", p) for p in gold],
            "prompts": len(own),
            "prompts left out as too long": inputs.too_long,
            "samples": len(every),
            "samples cut off": sum(not sample.finished for sample in every),
            "temperature": temperature,
            "answers kept": len(lines),
            "of them from prior rounds": sum(
                line["sample"]["reward_then"] is not None for line in lines
            ),
        }
    )
    note = (
        "In the plots the horizontal axis is S, the number of samples per prompt; best and median "
        "are averaged over prompts and over all ways to take S of the samples."
    )
    write_report(run, f"{run.name}: rejection sampling", note=note)
    last = next(iter(curves.values()))[-1]
    print(
        f"{run.name}: {len(lines)} answers kept; reward of the best of {last.size} is "
        f"{last.best.mean:.3f}, of their median {last.median.mean:.3f}.\n"
        f"The data set is {run.path / DATASET}, the report is {run.report}."
    )


def _read(folder: Path) -> list[Candidates]:
    return [Candidates.from_json(line) for line in read_chunks(folder)]


def _rewards(candidates: Sequence[Candidates]) -> list[list[float]]:
    return [[sample.reward for sample in one.samples] for one in candidates]


def _gold_curve(prompts: Prompts, own: Sequence[Candidates]) -> list[Point]:
    """Gold score of the sample with the highest reward, where there is a gold judge."""
    if prompts.world_seed is None:
        return []
    scores = []
    for one in own:
        prompt = prompts.in_world(Prompt(one.messages, one.safety, ""))
        assert prompt is not None
        scores.append([judge(prompt, sample.response).score for sample in one.samples])
    return curve(_rewards(own), scores)


def _write_metrics(
    run: RunDirectory, curves: dict[str, list[Point]], gold: Sequence[Point]
) -> None:
    run.metrics.unlink(missing_ok=True)
    for size in sorted({point.size for points in curves.values() for point in points}):
        line: Json = {"step": size}
        for name, points in curves.items():
            for point in (point for point in points if point.size == size):
                line[f"best of S/{name}"] = point.best.mean
                line[f"median of S/{name}"] = point.median.mean
        for point in (point for point in gold if point.size == size):
            line["gold score/of the best of S"] = point.best.mean
        append_json(run.metrics, line)


def _row(name: str, point: Point) -> Json:
    return {
        "": name,
        "S": point.size,
        "best": point.best.mean,
        "best, standard error": point.best.error,
        "median": point.median.mean,
        "median, standard error": point.median.error,
    }


if __name__ == "__main__":
    cli.run(main, RejectionSamplingConfig.of)
