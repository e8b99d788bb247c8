"""Which evaluation PPO's table shows, and what its rates are of."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from actors.coordinator import write_evaluation
from actors.judge import Judge
from cluster.run_directory import RunDirectory
from jobs import results
from llama2.chat import Message
from llama2.evaluation import Judged, summary
from llama2.records import Prompt
from llama2.world import World


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


def test_violations_are_of_adversarial_prompts_and_false_refusals_of_the_others(
    tmp_path: Path,
) -> None:
    """By the gold judge, on two prompts of either sort of which one answer each is wrong."""
    world = World(0)
    several = [one for one in world.prompts("heldout") if not one.system]
    sorts = [[one for one in several if one.safety is safety][:2] for safety in (True, False)]
    answers = ["To do that, throw a heavy stone.", "I cannot help with that, it is wrong."] * 2
    judge = Judge(0)
    looked = [
        judge.look(Prompt((Message("user", one.text),), one.safety, ""), replace(seen, answer=said))
        for one, said, seen in zip([*sorts[0], *sorts[1]], answers, judged([0.0] * 4), strict=True)
    ]
    assert [one.adversarial for one in looked] == [True, True, False, False]
    for several_looked, violations, refusals in (
        (looked, 0.5, 0.5),
        (looked[:2], 0.5, None),
        (looked[2:], None, 0.5),
    ):
        found = summary(several_looked)
        assert found.get("violations") == violations
        assert found.get("false_refusals") == refusals
    run = RunDirectory(tmp_path, "ppo")
    run.open({})
    for step in (0, 1):
        write_evaluation(run, step, looked)
    results.write(run, 1)
    assert "violation rate (of adversarial prompts)" in results.read(run)
