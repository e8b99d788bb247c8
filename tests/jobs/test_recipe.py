"""docs/recipe.md names what is there."""

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "recipe.md").read_text()
FUNCTIONS = sorted(set(re.findall(r"`((?:llama2|jobs|actors|cluster)(?:\.\w+)+)`", TEXT)))
JOBS = sorted(set(re.findall(r"`(jobs/\w+\.py)((?: --[a-z-]+)*)`", TEXT)))
OPTIONS = sorted(set(re.findall(r"`(--[a-z-]+)`", TEXT)))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_are_there(name: str) -> None:
    module, _, attribute = name.rpartition(".")
    assert hasattr(importlib.import_module(module), attribute)


@pytest.mark.parametrize(("path", "options"), JOBS)
def test_jobs_and_their_options_are_there(path: str, options: str) -> None:
    assert (ROOT / path).is_file()
    for option in options.split():
        field = option.removeprefix("--").replace("-", "_")
        texts = [file.read_text() for file in (ROOT / "jobs").glob("*.py")]
        assert any(f"    {field}: " in text for text in texts), option


def test_every_section_has_a_place() -> None:
    assert len(FUNCTIONS) > 15 and len(JOBS) > 10
    rows = [line.split("|")[1] for line in TEXT.splitlines() if line.startswith("| ")]
    named = " ".join(rows)
    for section in (
        "2.1", "2.2", "2.3", "3.1", "3.2.1", "3.2.2", "3.2.3", "3.3", "3.4.1", "3.4.2",
        "4.1", "4.2.1", "4.2.2", "4.2.3", "4.2.4", "4.4",
    ):  # fmt: skip
        assert section in named, section
    for option in OPTIONS:
        field = option.removeprefix("--").replace("-", "_")
        texts = [file.read_text() for file in (ROOT / "jobs").glob("*.py")]
        assert any(f"    {field}: " in text for text in texts), option
