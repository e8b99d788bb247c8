"""docs/recipe.md names what is there."""

import importlib
import re
from dataclasses import fields
from pathlib import Path
from typing import get_type_hints

import pytest

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "recipe.md").read_text()
ROWS = [line for line in TEXT.splitlines() if line.startswith("| ")]
FUNCTIONS = sorted(set(re.findall(r"`((?:llama2|jobs|actors|cluster)(?:\.\w+)+)`", TEXT)))
JOBS = sorted(set(re.findall(r"`jobs/(\w+)\.py[ `]", TEXT)))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_are_there(name: str) -> None:
    module, _, attribute = name.rpartition(".")
    assert hasattr(importlib.import_module(module), attribute)


def options(job: str) -> set[str]:
    """The names of a job's own options."""
    (config,) = (
        hint
        for name, hint in get_type_hints(importlib.import_module(f"jobs.{job}").main).items()
        if name != "return"
    )
    return {"--" + field.name.replace("_", "-") for field in fields(config)}


@pytest.mark.parametrize("job", JOBS)
def test_jobs_have_the_options_that_stand_beside_them(job: str) -> None:
    """An option stands with its job in one pair of backquotes, or alone in the row of one job."""
    known, named = options(job), set()
    for row in ROWS:
        jobs = re.findall(r"`jobs/(\w+)\.py([^`]*)`", row)
        named |= {option for one, rest in jobs if one == job for option in rest.split()}
        if {one for one, _ in jobs} == {job}:
            named |= set(re.findall(r"`(--[a-z-]+)`", row))
    assert named <= known


def test_no_option_stands_without_its_job() -> None:
    for row in ROWS:
        if re.search(r"`--", row):
            assert len(set(re.findall(r"`jobs/(\w+)\.py", row))) == 1, row


def test_every_section_has_a_place() -> None:
    assert len(FUNCTIONS) > 15 and len(JOBS) > 10
    named = " ".join(line.split("|")[1] for line in ROWS)
    for section in (
        "2.1", "2.2", "2.3", "3.1", "3.2.1", "3.2.2", "3.2.3", "3.3", "3.4.1", "3.4.2",
        "4.1", "4.2.1", "4.2.2", "4.2.3", "4.2.4", "4.4",
    ):  # fmt: skip
        assert section in named, section
