"""The house: who may import whom, where the outside world comes in, and how long things may be."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("llama2", "cluster", "actors", "jobs")
MAY_IMPORT = {
    "llama2": {"llama2"},
    "cluster": {"cluster"},
    "actors": {"actors", "cluster", "llama2"},
    "jobs": {"jobs", "actors", "cluster", "llama2"},
}
# Packages that only these files may import.
ONE_DOOR = {"deepspeed": {"cluster/engine.py"}, "wandb": {"cluster/tracking.py"}}
NOT_IN_LLAMA2 = {"ray", "tyro", "argparse", "rich", "pyarrow"}
FILES = [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]


def imports(path: Path) -> Iterator[str]:
    """Top-level names of all modules that a file imports, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            yield (node.module or "").split(".")[0]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_import_law(path: Path) -> None:
    place = path.relative_to(ROOT)
    names = set(imports(path))
    assert names & set(ROOMS) <= MAY_IMPORT[place.parts[0]]
    for package, doors in ONE_DOOR.items():
        assert package not in names or str(place) in doors
    if place.parts[0] == "llama2":
        assert not names & NOT_IN_LLAMA2


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_sizes(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            length = node.end_lineno - node.lineno + 1
            assert length <= 60, f"{node.name} has {length} lines"


def test_every_file_is_seen() -> None:
    assert len(FILES) > 40
