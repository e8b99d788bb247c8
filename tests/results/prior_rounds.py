"""Samples of all prior rounds against those of the last one alone (paper, section 3.2.3).

python -m tests.results.prior_rounds --seeds 0 1 2 --runs FOLDER

Goes on with what tests.results.rounds ran: the last version that rejection sampling made is made
again, from the same base model and demonstrations, without what earlier rounds kept.
"""

import json
from dataclasses import replace
from pathlib import Path

from actors.sampling import read_chunks
from cluster.run_directory import RunDirectory
from jobs import cli, rejection_sampling, sft
from jobs.configs import SftConfig
from jobs.presets import tiny
from jobs.rlhf_config import RlhfConfig
from llama2.rejection_sampling import Candidates
from llama2.whole_files import whole_file
from tests.results import rounds, world
from tests.results.experiment import (
    Experiment,
    Json,
    Results,
    Shown,
    gain,
    main,
    number,
    table,
    wins,
)

LAST = RlhfConfig.of(tiny()).rounds - 1
"""The version before PPO."""
MODELS = {"all rounds": f"v{LAST}-sft", "last round only": f"v{LAST}-last-round-only"}


def measure(runs: Path, seed: int) -> Json:
    """Verdicts of the gold judge on both models' answers, and how much each learned from."""
    rounds.EXPERIMENT.run(runs, [seed])
    root = rounds.folder(runs, seed)
    loop = root / "tiny-rlhf"
    sampling = loop / f"v{LAST}-rejection"
    joined, own = sampling / rejection_sampling.DATASET, root / "last-round-only.jsonl"
    lines = [
        line
        for one in map(Candidates.from_json, read_chunks(sampling / "samples"))
        for line in one.records(1)
    ]
    with whole_file(own) as file:
        file.writelines(json.dumps(line).encode() + b"\n" for line in lines)
    every, alone = RunDirectory(loop, MODELS["all rounds"]), MODELS["last round only"]
    config = cli.from_file(every.config, SftConfig)
    assert joined in config.data, "the version learned from rejection sampling"
    data = tuple(own if path == joined else path for path in config.data)
    sft.main(replace(config, name=alone, runs=root, data=data))
    evaluation = world.evaluated(
        rounds.started(runs, seed), "prior-rounds-evaluation", [every, RunDirectory(root, alone)],
        most_prompts=rounds.PROMPTS, conversations=0,
    )  # fmt: skip
    return {
        "verdicts": {
            title: world.verdicts(evaluation, name, rounds.WORLD) for title, name in MODELS.items()
        },
        "answers": {
            "all rounds": len(joined.read_text().splitlines()),
            "last round only": len(lines),
        },
    }


def show(results: Results) -> Shown:
    """A row for each of the two."""
    gold = {
        title: [one["gold"] for found in results.values() for one in found["verdicts"][title]]
        for title in MODELS
    }
    first = gold["last round only"]
    rows = []
    for title, values in gold.items():
        counts = [found["answers"][title] for found in results.values()]
        row = {"samples of": title, "answers learned, by seed": ", ".join(map(str, counts))}
        row["gold score"] = number(values)
        if title != "last round only":
            row["against the last round only, paired"] = gain(first, values)
            row["win rate against it"] = wins(first, values)
        rows.append(row)
    return Shown(f"Version V{LAST}, made in two ways:\n\n{table(rows)}")


EXPERIMENT = Experiment("prior_rounds", measure, show)

if __name__ == "__main__":
    main(EXPERIMENT, __doc__)
