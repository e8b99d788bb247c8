"""From a command line to a config, and from an error to one sentence."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

from cluster.run_directory import read_config
from jobs import options
from jobs.configs import JobConfig
from jobs.presets import Preset, preset

Config = TypeVar("Config", bound=JobConfig)


def run(main: Callable[[Config], None], default: Callable[[Preset], Config]) -> None:
    """Run a job from the command line.

    Options override the values of `--config FILE`, and those the defaults of `--preset`. What a
    user can mend is told in one sentence, with exit status 2.
    """
    options.run_or_tell(lambda: main(parse(sys.argv[1:], default, main.__doc__ or "")))


def parse(arguments: list[str], default: Callable[[Preset], Config], description: str) -> Config:
    """The config that a command line asks for. Raises `ValueError` for an unknown preset, file or
    option, or a value that does not fit."""
    file, arguments = _take(arguments, "--config")
    if file is not None:
        base = from_file(Path(file), type(default(preset("tiny"))))
    else:
        base = default(preset(_take(arguments, "--preset")[0] or "tiny"))
    description += (
        "\n\nWith --config FILE, the values of a run's config.yaml are the defaults instead of a "
        "preset's."
    )
    return options.parse(arguments, type(base), description, base)


def from_file(path: Path, kind: type[Config]) -> Config:
    """A config from a run's `config.yaml`. Raises `ValueError` naming the first wrong field."""
    given = read_config(path)
    try:
        config = TypeAdapter(kind).validate_python(given)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ").rstrip(".")
        raise ValueError(f"{path}: field {place or '(top)'}: {message}.") from error
    for field in _strays(given, plain(config)):
        raise ValueError(f"{path}: this job has no field {field}; is it another job's config?")
    return config


def plain(config: JobConfig) -> dict[str, Any]:
    """A config as nested dictionaries of plain values, as `config.yaml` holds it."""
    found: dict[str, Any] = TypeAdapter(type(config)).dump_python(config, mode="json")
    return found


def shown(config: JobConfig) -> str:
    """A config as YAML."""
    return yaml.safe_dump(plain(config), sort_keys=False)


def _strays(given: Any, known: Any, place: str = "") -> Iterator[str]:
    """Fields of `given` that `known` lacks, which pydantic would leave out without a word."""
    if isinstance(given, dict) and isinstance(known, dict):
        for name, value in given.items():
            if name not in known:
                yield f"{place}{name}"
            else:
                yield from _strays(value, known[name], f"{place}{name}.")


def _take(arguments: list[str], option: str) -> tuple[str | None, list[str]]:
    """The value of `--option value` or `--option=value`, and the other arguments."""
    for i, argument in enumerate(arguments):
        if argument == option:
            if i + 1 == len(arguments):
                raise ValueError(f"{option} needs a value.")
            return arguments[i + 1], arguments[:i] + arguments[i + 2 :]
        if argument.startswith(option + "="):
            return argument.partition("=")[2], arguments[:i] + arguments[i + 1 :]
    return None, arguments
