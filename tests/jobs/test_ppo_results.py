"""Which evaluation PPO's table shows."""

from pathlib import Path
from typing import Any

from actors.coordinator import write_evaluation
from cluster.run_directory import RunDirectory
from jobs import results
from llama2.evaluation import Judged


def judged(rewards: list[float]) -> list[Judged]:
    rest: dict[str, Any] = {"helpfulness": 0.0, "safety": 0.0, "kl": 0.0, "tokens": 3}
    return [
        Judged(str(i), "Who?", f"answer {reward}", "prompt", reward, **rest)
        for i, reward in enumerate(rewards)
    ]


def test_early_stopping_shows_the_first_of_the_best(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path, "ppo")
    run.open({})
    for step, rewards in ((0, [0.0, 0.0]), (2, [3.0, 0.0]), (4, [1.0, 2.0]), (10, [1.0, 1.0])):
        write_evaluation(run, step, judged(rewards))
    assert results.best_step(run) == 2
    results.write(run, results.best_step(run))
    found = run.summary()
    assert found is not None
    assert (found["before"]["reward"], found["after"]["reward"]) == (0.0, 1.5)
    assert found["gain"] == 1.5
