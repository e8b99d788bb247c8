"""What `jobs/evaluate.py` leaves: evaluation.json, samples, metrics and the report."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import permutations
from typing import Any

from cluster.report import write_report
from cluster.run_directory import RunDirectory, append_json, write_atomically
from jobs.evaluation_inputs import Inputs
from jobs.measuring import Measured
from llama2.answer_evaluation import by_category, compare, compare_categories, measures
from llama2.evaluation import Measure

Json = dict[str, Any]
FILE = "evaluation.json"
TITLES = {
    "gold": "gold score",
    "reward": "reward (composite, before whitening)",
    "helpfulness": "helpfulness score",
    "safety": "safety score",
    "violations": "violations, of adversarial prompts",
    "violations_unprovoked": "violations, of other prompts",
    "false_refusals_borderline": "false refusals, of borderline prompts",
    "false_refusals": "false refusals, of all harmless prompts",
    "tokens": "answer length (tokens)",
    "words": "answer length (words)",
    "finished": "answers that end by themselves",
    "empty": "empty answers",
    "repetition": "repeated runs of four words",
    "distinct": "distinct pairs of words",
}
WIN_RATE = "win rate against {} (a tie is half)"
NOTE = (
    "In brackets: 95% confidence intervals, Wilson's for what lies between 0 and 1, Student's for "
    "other means. All models answered the same prompts."
)
SAMPLES = 12


def write(run: RunDirectory, inputs: Inputs, measured: Sequence[Measured]) -> None:
    """Write all results; the summary, which marks the run as finished, last."""
    found = evaluation(inputs, measured)
    write_atomically(run.path / FILE, json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    run.samples.unlink(missing_ok=True)
    for sample in samples(measured):
        append_json(run.samples, sample)
    run.metrics.unlink(missing_ok=True)
    for line in metrics(found):
        append_json(run.metrics, line)
    tables = {heading: rows for heading, rows in shown(found).items() if rows}
    stamps = {subject.name: inputs.stamp(subject) for subject in inputs.subjects}
    run.finish(
        {"tables": tables, "notes": found["notes"], "stamps": stamps, "scorers": inputs.scorers}
    )
    write_report(run, f"{run.name}: evaluation", tables, " ".join([NOTE, *found["notes"]]))


def read(run: RunDirectory) -> str:
    """The tables of a finished run, for a terminal."""
    summary = run.summary()
    assert summary is not None, "read the results of a finished run"
    parts = [f"{heading}\n{_aligned(rows)}" for heading, rows in summary["tables"].items()]
    return "\n\n".join([*parts, *summary["notes"]])


def evaluation(inputs: Inputs, measured: Sequence[Measured]) -> Json:
    """Every number with its interval and count: of each model, and of every two."""
    return {
        "baseline": inputs.baseline.name,
        "judge": _judge(inputs),
        "prompts": len(inputs.asked),
        "prompts left out as too long": inputs.too_long,
        "notes": notes(inputs, measured),
        "models": {one.subject.name: _of_model(one) for one in measured},
        "pairs": [_of_pair(*pair) for pair in permutations(measured, 2) if _judge(inputs)],
    }


def notes(inputs: Inputs, measured: Sequence[Measured]) -> list[str]:
    """What a reader must know to read the numbers right."""
    judge = _judge(inputs)
    found = []
    if inputs.asked and judge:
        by = {"gold": "the gold judge", "reward": "the reward models"}[judge]
        found.append(f"Wins are by {by}.")
    if inputs.asked and judge == "reward" and inputs.rewards.safety:
        found.append(
            "Violations are what the safety reward model scores below 0.5; refusals are told by "
            "their wording."
        )
    if inputs.asked and judge is None:
        found.append("No judge and no reward model was at hand, so nothing says who wins.")
    for texts in inputs.texts:
        for one in measured:
            if one.subject.kind == "model" and texts.name not in one.texts:
                found.append(
                    f"{one.subject.name} has another tokenizer than the prepared rows of "
                    f"{texts.name}, so their perplexity is not known; give --texts."
                )
    for one in measured:
        if one.shortened:
            found.append(
                f"{one.shortened} contexts of tasks were too long for {one.subject.name} and lost "
                "their beginning."
            )
    return found


def samples(measured: Sequence[Measured]) -> list[Json]:
    """Prompts with all models' answers, of as many categories as there are."""
    if not measured[0].answers:
        return []
    first: dict[str, int] = {}
    for number, answer in enumerate(measured[0].answers):
        first.setdefault(answer.category, number)
    rest = [i for i in range(len(measured[0].answers)) if i not in first.values()]
    found = []
    for number in [*first.values(), *rest][: max(SAMPLES, len(first))]:
        line: Json = {"step": 0, "category": measured[0].answers[number].category}
        line["prompt"] = measured[0].answers[number].prompt
        for one in measured:
            answer = one.answers[number]
            worth = "" if answer.worth is None else f" [{answer.worth:.2f}]"
            line[one.subject.name] = f"{answer.answer}{worth}"
        found.append(line)
    return found


def metrics(found: Json) -> list[Json]:
    """One line a model, in the order of `models`, for the report's plots: rounds V1 to V5, say, one
    behind the other."""
    lines = []
    for step, (name, model) in enumerate(found["models"].items()):
        numbers = {f"answers/{key}": value for key, value in model["answers"].items()}
        pair = _pair(found, name, found["baseline"])
        if pair is not None:
            numbers["answers/win_rate"] = pair["win_rate"]
        numbers |= {f"adherence/{turn}": value for turn, value in model["adherence"].items()}
        for group in ("texts", "tasks"):
            for row, values in model[group].items():
                numbers |= {f"{group}/{row}: {key}": value for key, value in values.items()}
        values = {key: value["value"] for key, value in numbers.items()}
        lines.append({"step": step, "model": name, **values})
    return lines


def shown(found: Json) -> dict[str, list[Json]]:
    """The tables of terminal and report, in which every number stands with its interval."""
    models: Mapping[str, Json] = found["models"]
    return {
        "Answers": _answer_table(found),
        "Every two models (win rate of the row over the column)": _pair_table(found),
        "By category": _category_table(found),
        "Ghost-Attention adherence": _rows(
            {name: {"kept": model["adherence"]} for name, model in models.items()}
        ),
        "Perplexity": _rows({name: model["texts"] for name, model in models.items()}),
        "Academic tasks": _rows({name: model["tasks"] for name, model in models.items()}),
    }


def interval(value: Json | None) -> str:
    """A number with the ends of its interval."""
    if value is None:
        return "-"
    if value["low"] is None:
        return _number(value["value"])
    return f"{_number(value['value'])} ({_number(value['low'])} to {_number(value['high'])})"


def _of_model(one: Measured) -> Json:
    answers = measures(one.answers) if one.answers else {}
    return {
        "path": str(one.subject.path),
        "kind": one.subject.kind,
        "answers": _plain(answers),
        "categories": {
            name: _plain(measures(part)) for name, part in by_category(one.answers).items()
        },
        "texts": {name: _plain(values) for name, values in one.texts.items()},
        "adherence": _plain(one.adherence),
        "tasks": {name: _plain(values) for name, values in one.tasks.items()},
    }


def _of_pair(first: Measured, second: Measured) -> Json:
    whole = compare(first.answers, second.answers)
    assert whole is not None, "there is a judge"
    parts = compare_categories(first.answers, second.answers)
    return {
        "model": first.subject.name,
        "against": second.subject.name,
        "wins": whole.wins,
        "ties": whole.ties,
        "losses": whole.losses,
        "win_rate": asdict(whole.rate),
        "categories": {name: asdict(part.rate) for name, part in parts.items()},
    }


def _plain(values: Mapping[str, Measure]) -> Json:
    return {name: asdict(value) for name, value in values.items()}


def _judge(inputs: Inputs) -> str | None:
    """Whose verdict decides who wins."""
    if not inputs.asked:
        return None
    if inputs.asked[0].known is not None:
        return "gold"
    return "reward" if inputs.rewards.helpfulness or inputs.rewards.safety else None


def _pair(found: Json, name: str, against: str) -> Json | None:
    pairs = found["pairs"]
    return next((p for p in pairs if (p["model"], p["against"]) == (name, against)), None)


def _answer_table(found: Json) -> list[Json]:
    models = found["models"]
    baseline = found["baseline"]
    rows = []
    wins = {name: _pair(found, name, baseline) for name in models}
    if any(wins.values()):
        cells = {name: interval(pair and pair["win_rate"]) for name, pair in wins.items()}
        rows.append({"": WIN_RATE.format(baseline), **cells})
    for key, title in TITLES.items():
        cells = {name: interval(model["answers"].get(key)) for name, model in models.items()}
        if any(cell != "-" for cell in cells.values()):
            rows.append({"": title, **cells})
    return rows


def _pair_table(found: Json) -> list[Json]:
    names = list(found["models"])
    if not found["pairs"] or len(names) < 3:  # of two, the first table has all
        return []
    return [
        {"": row}
        | {name: interval((_pair(found, row, name) or {}).get("win_rate")) for name in names}
        for row in names
    ]


def _category_table(found: Json) -> list[Json]:
    """Of each category the number that decides who wins, and the win rate over the baseline."""
    models, baseline, key = found["models"], found["baseline"], found["judge"]
    categories = {name for model in models.values() for name in model["categories"]}
    if key is None or len(categories) < 2:
        return []
    rows = []
    for category in sorted(categories):
        row: Json = {"": category}
        for name, model in models.items():
            row[name] = interval(model["categories"][category].get(key))
            pair = _pair(found, name, baseline)
            if pair is not None:
                row[name] += f", wins {_number(pair['categories'][category]['value'])}"
        rows.append(row)
    return rows


def _rows(values: Mapping[str, Mapping[str, Json]]) -> list[Json]:
    """A row for each number of each text or task, a column for each model."""
    keys = dict.fromkeys((row, key) for v in values.values() for row in v for key in v[row])
    return [
        {"": f"{row}: {key}"}
        | {name: interval(v.get(row, {}).get(key)) for name, v in values.items()}
        for row, key in keys
    ]


def _number(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 100 else f"{value:.1f}"


def _aligned(rows: Sequence[Json]) -> str:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [columns, *([str(row.get(column, "")) for column in columns] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    lines = ("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in cells)
    return "\n".join(line.rstrip() for line in lines)
