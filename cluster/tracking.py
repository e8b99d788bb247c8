"""What a run shows while it runs: `metrics.jsonl`, W&B and the console. The only file that imports
wandb."""

import logging
import math
import os
import secrets
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self, TextIO

from rich import progress
from rich.console import Console as Terminal

from cluster.run_directory import RunDirectory, append_json, write_atomically

logger = logging.getLogger(__name__)

WANDB_START_SECONDS = 20
WANDB_FINISH_SECONDS = 60


class Tracker:
    """Records one dictionary of scalars per step, and samples, in the run directory and in W&B.

    Made by one process of a run, after `run.open`. `first_step` is the step that it will do first:
    what an earlier attempt recorded of it and later ones is dropped, so that each step is there
    once. Steps count from 0 to `total_steps` - 1. `headline` names the metrics shown on the
    console.

    W&B is online when WANDB_API_KEY is set, else offline (`wandb sync` uploads it later);
    WANDB_MODE overrides both. When W&B fails, a warning in the log says so and the run goes on
    without it.
    """

    def __init__(
        self,
        run: RunDirectory,
        stage: str,
        total_steps: int,
        *,
        project: str,
        first_step: int = 0,
        headline: Sequence[str] = ("loss",),
    ) -> None:
        self._run = run
        self._headline = headline
        self._last_step = first_step - 1
        run.resume_at(first_step)
        self._wandb: Any = None
        self._wandb_does("starting", lambda: self._start_wandb(stage, project))
        self._console = Console(stage, total_steps, first_step)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the metrics of one step: a line of `metrics.jsonl`, and a point of each chart.

        Call it once for a step, with all its metrics; values may be NaN.
        """
        assert step > self._last_step, f"step {step} logged after step {self._last_step}"
        assert "step" not in metrics, "'step' is taken by the step's own number"
        self._last_step = step
        values = {k: v if isinstance(v, int) else float(v) for k, v in metrics.items()}
        append_json(self._run.metrics, {"step": step, **values})
        self._send(step, lambda _: values)
        self._console.update(step, {k: values[k] for k in self._headline if k in values})

    def log_samples(self, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
        """Record samples made at `step`: lines of `samples.jsonl`, and a table in W&B.

        Each row maps column names to texts or numbers; rows may differ in their columns.
        """
        assert step >= self._last_step, f"samples of {step} logged after step {self._last_step}"
        rows = list(rows)
        for row in rows:
            assert "step" not in row, "'step' is taken by the step's own number"
            append_json(self._run.samples, {"step": step, **row})
        columns = list(dict.fromkeys(key for row in rows for key in row))
        cells = [[row.get(column) for column in columns] for row in rows]

        def table(wandb: Any) -> dict[str, Any]:
            return {"samples": wandb.Table(columns=columns, data=cells, allow_mixed_types=True)}

        self._send(step, table)

    def finish(self, exit_code: int = 0) -> None:
        """Close the console and W&B; `exit_code` other than 0 marks the run there as failed."""
        self._console.close()
        if self._wandb is not None:
            self._wandb_does("finishing", lambda: self._wandb.finish(exit_code=exit_code))
            self._wandb = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.finish(exit_code=0 if error is None else 1)

    def _start_wandb(self, stage: str, project: str) -> None:
        # Its error reporting would call home even when the run is offline.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        key = os.environ.get("WANDB_API_KEY")
        mode: Any = os.environ.get("WANDB_MODE") or ("online" if key else "offline")
        settings = wandb.Settings(
            # Another tracker in this process gets its own run instead of the one begun before it.
            reinit="create_new",
            console="off",
            # Online, uploads fail in the background, and only W&B's own messages tell it.
            silent=mode != "online",
            quiet=True,
            show_info=False,
            init_timeout=WANDB_START_SECONDS,
            login_timeout=WANDB_START_SECONDS,
            finish_timeout=WANDB_FINISH_SECONDS,
            disable_git=True,
            disable_code=True,
            x_save_requirements=False,
        )
        self._wandb = wandb.init(
            project=project,
            id=self._wandb_id(),
            name=self._run.name,
            job_type=stage,
            config=self._run.read_config(),
            dir=self._run.path,
            mode=mode,
            resume="allow",
            settings=settings,
        )

    def _wandb_id(self) -> str:
        # Kept in the folder, not made of the name alone: a run begun anew under an old name must
        # not append to the old one's chart, where W&B would drop every step that is there already.
        path = self._run.path / "wandb" / "id.txt"
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            write_atomically(path, f"{self._run.name[:50]}-{secrets.token_hex(4)}")
        return path.read_text("utf-8").strip()

    def _send(self, step: int, content: Callable[[Any], dict[str, Any]]) -> None:
        def send() -> None:
            import wandb

            # A resumed chart may be ahead of the checkpoint; it holds the same numbers for those
            # steps.
            if step >= self._wandb.step:
                self._wandb.log(content(wandb), step=step)

        if self._wandb is not None:
            self._wandb_does(f"logging step {step}", send)

    def _wandb_does(self, doing: str, action: Callable[[], object]) -> None:
        try:
            action()
        except Exception as error:
            self._wandb = None
            logger.warning(
                "W&B failed while %s (%s: %s); the run goes on without it; %s has all metrics.",
                doing,
                type(error).__name__,
                " ".join(str(error).split()),
                self._run.metrics,
            )


BAR_WIDTH = 20


class Console:
    """Progress of a stage: a bar on a terminal, otherwise a plain line every `interval` seconds.

    `first_step` is where a resumed stage begins; the time remaining is reckoned from what is done
    since.
    """

    def __init__(
        self,
        stage: str,
        total: int,
        first_step: int = 0,
        interval: float = 2.0,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stage, self._total, self._first = stage, total, first_step
        self._interval, self._clock = interval, clock
        self._stream = stream or sys.stdout
        self._started = clock()
        self._printed = -math.inf
        self._pending: str | None = None
        self._bar = self._make_bar() if self._stream.isatty() else None

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show that step number `step` (from 0) is done, with its metrics, if it is time to."""
        done = min(step + 1, self._total)
        shown = "  ".join(_labelled(name, value) for name, value in metrics.items())
        if self._bar is not None:
            self._bar.update(progress.TaskID(0), completed=done, metrics=shown)
            return
        now = self._clock()
        per_step = (now - self._started) / max(step + 1 - self._first, 1)
        filled = BAR_WIDTH * done // max(self._total, 1)
        bar = "#" * filled + "." * (BAR_WIDTH - filled)
        share = f"[{bar}] {done}/{self._total}"
        eta = f"eta {_duration(per_step * (self._total - done))}"
        self._pending = "  ".join(part for part in (self._stage, share, shown, eta) if part)
        if done == self._total or now - self._printed >= self._interval:
            self._printed = now
            self._flush()

    def close(self) -> None:
        """End the bar, or print the last step if its line was held back."""
        if self._bar is not None:
            self._bar.stop()
        self._flush()

    def _flush(self) -> None:
        if self._pending is not None:
            print(self._pending, file=self._stream, flush=True)
        self._pending = None

    def _make_bar(self) -> progress.Progress:
        bar = progress.Progress(
            progress.TextColumn("{task.description}", markup=False),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TextColumn("{task.fields[metrics]}", markup=False),
            progress.TimeRemainingColumn(),
            console=Terminal(file=self._stream),
        )
        bar.add_task(self._stage, total=self._total, completed=self._first, metrics="")
        bar.start()
        return bar


def format_number(value: float) -> str:
    """At most four significant digits, short enough for a line of text: 2.31, 3e-3, 12.35k."""
    if not math.isfinite(value) or value == 0:
        return f"{value:g}"
    value = float(f"{value:.4g}")
    if abs(value) < 0.01:
        mantissa, exponent = f"{value:.3e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    for size, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if abs(value) >= size:
            return f"{value / size:.4g}{suffix}"
    return f"{value / 1000:.4g}k" if abs(value) >= 10_000 else f"{value:.4g}"


def _labelled(name: str, value: float) -> str:
    label = name.rpartition("/")[2]
    if label.endswith("_per_second"):
        return f"{format_number(value)} {label.removesuffix('_per_second')}/s"
    return f"{label} {format_number(value)}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
