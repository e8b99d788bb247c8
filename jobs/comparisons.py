"""Comparisons of a model's own answers, for reward models that stay on its distribution.

python jobs/comparisons.py --preset tiny
python jobs/comparisons.py --name round-2 --policy runs/v1/model --variant runs/tiny-sft/model
python jobs/comparisons.py --name rated --prompts prompts.jsonl --annotations ratings.jsonl
"""

import asyncio
import json
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from actors.sampling import Question, Sampler, read_chunks, run_chunks
from cluster.report import write_report
from cluster.run_directory import RunDirectory, append_json, read_json_lines
from jobs import cli
from jobs.annotations import (
    Aspect,
    Pair,
    Verdict,
    check_annotator,
    gold_verdict,
    read_verdicts,
)
from jobs.comparisons_config import ComparisonsConfig
from jobs.sampling import (
    Cast,
    Prompts,
    asked,
    cut,
    draw,
    find_cast,
    fits,
    identity,
    read_prompts,
    sampler,
)
from jobs.sampling_config import MAY_CHANGE
from llama2.chat import Message, dialogue_fault
from llama2.prompting import Prompting
from llama2.records import Prompt
from llama2.whole_files import whole_file

Json = dict[str, Any]
ASPECTS: tuple[Aspect, Aspect] = ("helpfulness", "safety")
EXAMPLES = 5
UNUSABLE, IDENTICAL = "an answer is empty or holds a tag", "both answers are the same"
UNSAFE = "the chosen answer is the unsafe one"


def main(config: ComparisonsConfig) -> None:
    """Have two variants of a model answer prompts, and an annotator compare their answers."""
    run = RunDirectory(config.runs, config.run_name("comparisons"))
    if run.is_finished:
        write_missing_report(run)
        print(f"{run.name}: finished already; the comparisons are in {run.path}.")
        return
    cast = find_cast(config, scored=False)
    variant = cast if config.variant is None else Cast(config.variant.absolute(), None)
    prompting = cast.prompting if variant is cast else Prompting.read(variant.policy)
    if run.config.exists():
        check_annotator(run, config.annotations)
    prompts = read_prompts(config, config.prompts)
    if config.annotations is None and prompts.world_seed is None:
        raise ValueError(
            "The prompts are not of the synthetic world, so that no gold judge knows them; name a "
            "file for people's ratings with --annotations."
        )
    drawn, too_long = draw(prompts.prompts, config.num_prompts, config.seed, cast.prompting)
    both = drawn
    if variant is not cast:
        both = [(i, prompt) for i, prompt in drawn if fits(prompt.messages, prompting)]
    if not both:
        raise ValueError(
            f"No prompt leaves room for an answer of {variant.policy}; give shorter ones."
        )
    too_long += len(drawn) - len(both)
    questions = asked(both)
    run.open(cli.plain(config), may_change=(*MAY_CHANGE, "annotations"))
    if not pairs_file(run).is_file():
        sample(config, run, (cast, variant), questions)
        _write_pairs(config, run, questions)
    annotate(config, run, prompts, too_long)


def pairs_file(run: RunDirectory) -> Path:
    """Where the pairs lie that are to be compared."""
    return run.path / "pairs.jsonl"


def dataset(run: RunDirectory, aspect: Aspect) -> Path:
    """Where the comparisons of one kind lie; the file's name is that of the data set."""
    return run.path / aspect / f"{run.name}.jsonl"


def sample(
    config: ComparisonsConfig,
    run: RunDirectory,
    variants: tuple[Cast, Cast],
    questions: Sequence[Question],
) -> None:
    """Fill the run's folders of answers, one of each variant."""
    sides = list(zip((0, 1), variants, config.temperatures, strict=True))
    together = [sides] if variants[0].policy == variants[1].policy else [[side] for side in sides]
    for several in together:
        with sampler(config, several[0][1], run.name) as source:
            for number, cast, temperature in several:
                asyncio.run(_answer(config, run, number, cast, questions, temperature, source))


async def _answer(
    config: ComparisonsConfig,
    run: RunDirectory,
    number: int,
    cast: Cast,
    questions: Sequence[Question],
    temperature: float,
    source: Sampler,
) -> None:
    async def work(chunk: Sequence[Question]) -> list[Json]:
        found = await source.sample(chunk, temperature)
        return [asdict(answer) for (answer,) in found]

    known = identity(config, cast, questions, temperature=temperature)
    chunks = cut(questions, config.chunk)
    await run_chunks(_answers(run, number), known, chunks, work, config.chunks_at_once)


def _answers(run: RunDirectory, number: int) -> Path:
    return run.path / "answers" / str(number)


def _write_pairs(
    config: ComparisonsConfig, run: RunDirectory, questions: Sequence[Question]
) -> None:
    """Write the pairs worth comparing. Which variant comes first is drawn, so that annotators
    cannot tell."""
    left_out: Counter[str] = Counter()
    lines = []
    answers = [read_chunks(_answers(run, number)) for number in (0, 1)]
    for question, *pair in zip(questions, *answers, strict=True):
        reason = fault(question.messages, [answer["response"] for answer in pair])
        if reason is not None:
            left_out[reason] += 1
            continue
        if random.Random(f"order {config.seed} {question.id}").random() < 0.5:
            pair.reverse()
        aspect = "safety" if question.safety else "helpfulness"
        texts = {f"answer_{side}": a["response"] for side, a in zip("ab", pair, strict=True)}
        prompt = [asdict(message) for message in question.messages]
        lines.append({"id": question.id, "aspect": aspect, "prompt": prompt, **texts})
    if not lines:
        reasons = "; ".join(f"{count}: {reason}" for reason, count in left_out.items())
        raise ValueError(
            f"{run.name}: no pair of answers to {len(questions)} prompts can be compared "
            f"({reasons}); take other --temperatures, or another policy."
        )
    (run.path / "left_out.json").write_text(json.dumps(dict(left_out)))
    _write_lines(pairs_file(run), lines)


def fault(messages: Sequence[Message], answers: Sequence[str]) -> str | None:
    """Why two answers cannot be compared, or None."""
    if answers[0].strip() == answers[1].strip():
        return IDENTICAL
    dialogues = ([*messages, Message("assistant", answer)] for answer in answers)
    return UNUSABLE if any(dialogue_fault(dialogue) for dialogue in dialogues) else None


def annotate(config: ComparisonsConfig, run: RunDirectory, prompts: Prompts, too_long: int) -> None:
    """Write the comparisons and the report. Raises `ValueError` where ratings are still waited for,
    or nothing is left."""
    pairs = [
        Pair(**{**line, "prompt": tuple(Message(**message) for message in line["prompt"])})
        for line in read_json_lines(pairs_file(run))
    ]
    if config.annotations is None:
        verdicts = {pair.id: _gold(pair, prompts, config.seed) for pair in pairs}
    else:
        verdicts = read_verdicts(config.annotations, pairs, pairs_file(run))
    left_out: Counter[str] = Counter(json.loads((run.path / "left_out.json").read_text()))
    lines: dict[Aspect, list[Json]] = {aspect: [] for aspect in ASPECTS}
    for pair in pairs:
        verdict = verdicts[pair.id]
        if pair.aspect == "safety" and verdict.safety == "chosen_unsafe":
            left_out[UNSAFE] += 1
        else:
            lines[pair.aspect].append(record(pair, verdict))
    if not any(lines.values()):
        raise ValueError(
            f"{run.name}: none of {len(pairs)} comparisons is left, as in all of them the chosen "
            "answer is the unsafe one; give more prompts, or another policy."
        )
    for aspect, several in lines.items():
        if several:
            _write_lines(dataset(run, aspect), several)
    _finish(run, lines, left_out, too_long)


def record(pair: Pair, verdict: Verdict) -> Json:
    """A comparison as `jobs/prepare.py` reads it. The label of safety is for safety data alone: a
    helpful answer that is unsafe may win on helpfulness."""
    answers = (pair.answer_a, pair.answer_b)
    return {
        "id": pair.id,
        "prompt": [asdict(message) for message in pair.prompt],
        "chosen": answers[verdict.chosen],
        "rejected": answers[1 - verdict.chosen],
        "rating": verdict.rating,
        **({"safety": verdict.safety} if pair.aspect == "safety" else {}),
    }


def _gold(pair: Pair, prompts: Prompts, seed: int) -> Verdict:
    known = prompts.in_world(Prompt(pair.prompt, pair.aspect == "safety", ""))
    assert known is not None, "there is a world"
    return gold_verdict(pair, known, seed)


def _finish(
    run: RunDirectory, lines: dict[Aspect, list[Json]], left_out: Counter[str], too_long: int
) -> None:
    run.samples.unlink(missing_ok=True)
    for several in lines.values():
        for line in several[:EXAMPLES]:
            said = {"prompt": line["prompt"][-1]["content"], "chosen": line["chosen"]}
            append_json(run.samples, {"step": 0, **said, "rejected": line["rejected"]})
    rows = [
        {"comparisons": aspect, "count": len(several)}
        | dict(Counter(line["rating"] for line in several))
        for aspect, several in lines.items()
    ]
    run.finish(
        {
            "Comparisons": rows,
            "Pairs left out": [{"reason": why, "count": n} for why, n in left_out.items()],
            "prompts left out as too long": too_long,
        }
    )
    write_missing_report(run)
    counts = ", ".join(f"{len(several)} of {aspect}" for aspect, several in lines.items())
    print(f"{run.name}: comparisons in {run.path}: {counts}; {left_out.total()} pairs left out.")


def write_missing_report(run: RunDirectory) -> None:
    """Write the report of a finished run unless it is there."""
    if not run.report.exists():
        write_report(run, f"{run.name}: comparisons")


def _write_lines(path: Path, lines: Sequence[Json]) -> None:
    with whole_file(path) as file:
        for line in lines:
            text = json.dumps(line, ensure_ascii=False) + "\n"
            file.write(text.encode("utf-8", "backslashreplace"))


if __name__ == "__main__":
    cli.run(main, ComparisonsConfig.of)
