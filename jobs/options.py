"""Command lines: options to a dataclass, and errors to one sentence."""

import io
import re
import sys
from collections.abc import Callable
from contextlib import redirect_stderr
from typing import Any, TypeVar

import tyro

Options = TypeVar("Options")
USER_ERRORS = (
    ValueError, FloatingPointError, FileNotFoundError, NotADirectoryError, PermissionError,
    ConnectionError, TimeoutError,
)  # fmt: skip


def run(main: Callable[[Options], None], kind: type[Options]) -> None:
    """Run a job whose options have no preset from the command line; see `run_or_tell`."""
    run_or_tell(lambda: main(parse(sys.argv[1:], kind, main.__doc__ or "")))


def run_or_tell(work: Callable[[], None]) -> None:
    """Do a process's work. What a user can mend is told in one sentence, with exit status 2."""
    try:
        work()
    except USER_ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def parse(
    arguments: list[str],
    kind: type[Options],
    description: str,
    default: Options | None = None,
) -> Options:
    """The config that a command line asks for; `default` has the values of options not given.

    Raises `ValueError` for an unknown option, a missing one, or a value that does not fit.
    """
    said = io.StringIO()
    defaults: dict[str, Any] = {} if default is None else {"default": default}
    try:
        with redirect_stderr(said):
            return tyro.cli(
                kind,
                args=arguments,
                description=description,
                config=(tyro.conf.AvoidSubcommands,),
                **defaults,
            )
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
        raise ValueError(f"{_sentence(said.getvalue())} (--help lists the options)") from None


def _sentence(box: str) -> str:
    """What tyro's error box says above its first rule, on one line."""
    lines = re.sub(r"\x1b\[[0-9;]*m", "", box).splitlines()[1:-1]
    text = [line.strip("│ ") for line in lines]
    rule = next((i for i, line in enumerate(text) if line.startswith("──")), len(text))
    return " ".join(text[:rule]).rstrip(".")
