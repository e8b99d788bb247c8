"""Academic tasks, by lm-evaluation-harness, an extra that need not be installed."""

import importlib.util
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from actors.measured_model import MeasuredModel
from jobs.evaluate_config import EvaluateConfig
from llama2.evaluation import Z_95, Measure, rate_of
from llama2.prompting import Prompting

Json = dict[str, Any]
BOOTSTRAPS = 1000
"""Resamplings for the spread of metrics that are no means."""


def load_tasks(config: EvaluateConfig) -> Any:
    """The tasks with their data, as the harness holds them; None where none is asked for.

    Raises `ValueError` where the harness is not installed, a task is unknown, its data cannot be
    had, or it would run code unasked.
    """
    if not config.tasks:
        return None
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError(
            "Academic tasks need lm-evaluation-harness, which is not installed here; install this "
            "project with its extra eval, or leave --tasks out."
        )
    if config.tasks_folder is not None and not config.tasks_folder.is_dir():
        raise FileNotFoundError(f"There is no folder of tasks at {config.tasks_folder}.")
    names = list(config.tasks)
    manager = _manager(config.tasks_folder, names)
    found: dict[str, Json] = {"tasks": {}, "groups": {}, "group_map": {}}
    for name in names:
        for part, values in _loaded(manager, name).items():
            found[part].update(values)
    unsafe = [name for name, task in found["tasks"].items() if getattr(task, "UNSAFE_CODE", False)]
    if unsafe and not config.allow_code:
        raise ValueError(
            f"The task {unsafe[0]} runs code that the model writes; add --allow-code on a machine "
            "that may run it, or leave the task out."
        )
    if unsafe:
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"
    return found


def task_files(config: EvaluateConfig) -> tuple[Path, ...]:
    """Files and folders of tasks of one's own."""
    files = [Path(name) for name in config.tasks if _is_file(name)]
    return (*files, *([] if config.tasks_folder is None else [config.tasks_folder]))


def run_tasks(
    config: EvaluateConfig, tasks: Any, model: MeasuredModel, prompting: Prompting
) -> tuple[dict[str, dict[str, Measure]], int]:
    """Every metric of every task and group, and how many contexts were shortened to fit."""
    from lm_eval import evaluator

    from actors.harness_model import HarnessModel

    for task in tasks["tasks"].values():
        shots = task.get_config("num_fewshot")
        if config.num_fewshot is not None and shots != 0:  # 0 is what the task's author demands
            shots = config.num_fewshot
        task.set_config(key="num_fewshot", value=shots or 0)
        task.set_fewshot_seed(seed=config.seed)
    seen = HarnessModel(model, prompting, config.seed)
    results = evaluator.evaluate(
        seen,
        tasks,
        limit=config.most_documents or None,
        bootstrap_iters=BOOTSTRAPS,
        apply_chat_template=config.chat_tasks,
        fewshot_as_multiturn=config.chat_tasks,
        confirm_run_unsafe_code=config.allow_code,
    )
    assert results is not None
    found = {
        name: _measures(metrics, results["samples"].get(name, []))
        for name, metrics in results["results"].items()
    }
    return {name: measures for name, measures in found.items() if measures}, seen.shortened


def _is_file(name: str) -> bool:
    return Path(name).suffix == ".yaml"


def _manager(folder: Path | None, names: Sequence[str]) -> Any:
    """Of the harness's own tasks, more than ten thousand files, only what is asked for is read."""
    from lm_eval.tasks import TaskManager

    if all(map(_is_file, names)):
        return TaskManager(include_defaults=False)
    if folder is not None:
        own = TaskManager(include_path=str(folder), include_defaults=False)
        if all(name in own.all_tasks for name in names):
            return own
    return TaskManager(include_path=None if folder is None else str(folder))


def _loaded(manager: Any, name: str) -> Mapping[str, Any]:
    is_file = _is_file(name)
    if is_file and not Path(name).is_file():
        raise FileNotFoundError(f"There is no file {name}; --tasks names tasks or yaml files.")
    if not is_file and name not in manager.all_tasks:
        raise ValueError(
            f"There is no academic task {name!r}; see the harness's list, or name the folder of "
            "your own with --tasks-folder."
        )
    try:
        return manager.load([name])
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"The task {name} cannot be loaded ({type(error).__name__}: {reason}); its data must "
            "be at hand or reachable, and its yaml whole."
        ) from error


def _measures(metrics: Mapping[str, Any], samples: Sequence[Json]) -> dict[str, Measure]:
    found: dict[str, Measure] = {}
    for key, value in metrics.items():
        metric, comma, chosen = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        name = metric if chosen == "none" else f"{metric} ({chosen})"
        own = [sample for sample in samples if sample.get("filter") == chosen]
        values = [sample[metric] for sample in own if metric in sample]
        count = len(values) or int(metrics.get("sample_len", 0))
        error = metrics.get(f"{metric}_stderr,{chosen}")
        found[name] = _measure(float(value), values, error, count)
    return found


def _measure(value: float, values: Sequence[Any], error: Any, count: int) -> Measure:
    """With Wilson's interval where the metric is a share of right answers, else by the harness's
    standard error."""
    if (
        values
        and all(v in (0, 1) for v in values)
        and abs(sum(values) / len(values) - value) < 1e-9
    ):
        return rate_of([bool(v) for v in values])
    if isinstance(error, int | float):
        return Measure(value, value - Z_95 * error, value + Z_95 * error, count)
    return Measure(value, None, None, count)
