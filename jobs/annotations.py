"""Who compares two answers: the gold judge of the synthetic world, or people through a file."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cluster.files import read_records
from cluster.run_directory import RunDirectory
from llama2.chat import Message
from llama2.record_fields import rating_field, safety_field
from llama2.records import Rating, SafetyLabel
from llama2.world import WorldPrompt
from llama2.world.annotator import annotate

Json = dict[str, Any]
Aspect = Literal["helpfulness", "safety"]
CHOICES = ("a", "b")


def check_annotator(run: RunDirectory, annotations: Path | None) -> None:
    """Raise `ValueError` where a run that people rate would go on with the gold judge, or the other
    way round."""
    before = run.read_config()["annotations"]
    if (before is None) != (annotations is None):
        who = "the gold judge compares" if before is None else f"people's ratings ({before}) count"
        raise ValueError(
            f"In the run {run.name} {who}; go on {'without' if before is None else 'with'} "
            "--annotations, or give another --name."
        )


@dataclass(frozen=True)
class Pair:
    """Two answers to be compared. Prompts tagged for safety are rated for safety, others for
    helpfulness (paper, section 3.2.1)."""

    id: str
    aspect: Aspect
    prompt: tuple[Message, ...]
    answer_a: str
    answer_b: str


@dataclass(frozen=True)
class Verdict:
    """What was said of a pair. chosen: 0 for the first answer, 1 for the second."""

    chosen: int
    rating: Rating
    safety: SafetyLabel | None


def gold_verdict(pair: Pair, known: WorldPrompt, seed: int) -> Verdict:
    """What the world's annotator says, the same each time for a seed and a pair's id."""
    rng = random.Random(f"annotation {seed} {pair.id}")
    found = annotate(known, pair.answer_a, pair.answer_b, rng, pair.aspect)
    return Verdict(found.chosen, found.rating, found.safety_label)


def read_verdicts(path: Path, pairs: Sequence[Pair], asked: Path) -> dict[str, Verdict]:
    """What people said of the pairs, by id; `path` has a line a pair, with `id`, `choice` (a or
    b), `rating`, and `safety` where safety is what is compared. `asked` is the file with the pairs.

    Raises `ValueError` that names the line of what is unknown, said twice or not in the list, or,
    where some pairs have no verdict yet, says which.
    """
    known = {pair.id: pair for pair in pairs}
    found: dict[str, Verdict] = {}
    for where, record in read_records(path) if path.is_file() else _nothing():
        name = record.get("id")
        if not isinstance(name, str) or name not in known:
            raise ValueError(
                f"{where}: no pair of {asked} has the id {name!r}; copy it from there."
            )
        if name in found:
            raise ValueError(f"{where}: the pair {name} was rated before; leave one line of it.")
        found[name] = _verdict(record, known[name], where, asked)
    waiting = [pair for pair in pairs if pair.id not in found]
    if waiting:
        first = waiting[0]
        raise ValueError(
            f"{len(waiting)} of {len(pairs)} pairs of {asked} wait for ratings in {path}, first "
            f"{first.id} ({first.prompt[-1].content[:60]!r}): copy their lines there, add choice "
            "(a or b), rating and, where aspect is safety, safety, and run this again."
        )
    return found


def _verdict(record: Json, pair: Pair, where: str, asked: Path) -> Verdict:
    for name, answer in (("answer_a", pair.answer_a), ("answer_b", pair.answer_b)):
        if record.get(name, answer) != answer:
            raise ValueError(
                f"{where}: {name} is not what {asked} has for the pair {pair.id}; rate the pairs "
                "that are there."
            )
    choice = record.get("choice")
    if choice not in CHOICES:
        raise ValueError(f"{where}: the choice {choice!r} is neither a nor b.")
    rating, safety = rating_field(record, where), safety_field(record, where)
    if rating is None:
        raise ValueError(f"{where}: the pair {pair.id} has no rating; add one.")
    if pair.aspect == "safety" and safety is None:
        raise ValueError(
            f"{where}: the pair {pair.id} has no safety label; add safety, which says whether the "
            "chosen and the other answer are safe."
        )
    return Verdict(CHOICES.index(choice), rating, safety)


def _nothing() -> Iterator[tuple[str, Json]]:
    yield from ()
