"""Over-optimisation: gold score and reward against KL, for PPO at several KL coefficients.

python -m tests.results.over_optimisation --seeds 0 1 2 --runs FOLDER
"""

from dataclasses import replace
from pathlib import Path
from statistics import fmean

from actors.coordinator import evaluated_steps, read_evaluation
from cluster.run_directory import RunDirectory
from jobs import ppo
from llama2.evaluation import mean_of
from tests.results import world
from tests.results.experiment import Experiment, Json, Results, Shown, gain, main, number, table
from tests.results.plots import Plot, Spot

COEFFICIENTS = (0.0, 0.1)
ITERATIONS, EVERY = 24, 4
HELD_OUT = 384
RATE = 3e-4
"""Higher than the preset's, so that so few iterations come far enough to see a turn."""


def measure(runs: Path, seed: int) -> Json:
    """Of each coefficient and each evaluation on the way, the held-out answers' scores."""
    configs = world.base(runs, seed)
    found: Json = {}
    for beta in COEFFICIENTS:
        run = RunDirectory(world.folder(runs, seed), f"ppo-{beta:g}")
        ppo.main(
            replace(
                configs.ppo, name=run.name, iterations=ITERATIONS, eval_every=EVERY,
                heldout_prompts=HELD_OUT, lr=RATE,
                ppo=replace(configs.ppo.ppo, kl_coefficient=beta),
            )
        )  # fmt: skip
        steps = {}
        for step in evaluated_steps(run):
            answers = read_evaluation(run, step)
            steps[str(step)] = {
                name: [getattr(answer, name) for answer in answers]
                for name in ("gold", "reward", "kl", "tokens")
            }
        found[f"{beta:g}"] = steps
    return found


def show(results: Results) -> Shown:
    """Two plots over the KL, and a table of each coefficient's best and last point."""
    gold, reward, rows = {}, {}, []
    for beta in (f"{one:g}" for one in COEFFICIENTS):
        points = [
            (step, {name: _all(results, beta, step, name) for name in ("kl", "gold", "reward")})
            for step in next(iter(results.values()))[beta]
        ]
        gold[f"beta {beta}"] = [_spot(values, "gold") for _, values in points]
        reward[f"beta {beta}"] = [_spot(values, "reward") for _, values in points]
        best_step, best = max(points, key=lambda point: fmean(point[1]["gold"]))
        start, last = points[0][1], points[-1][1]
        rows.append(
            {
                "KL coefficient": beta,
                "gold at the start": number(start["gold"]),
                "best gold": number(best["gold"]),
                "at KL (nats)": f"{fmean(best['kl']):.1f}",
                "at iteration": best_step,
                "last gold": number(last["gold"]),
                "at KL": f"{fmean(last['kl']):.1f}",
                "gold, best to last, paired": gain(best["gold"], last["gold"]),
                "reward, best to last, paired": gain(best["reward"], last["reward"]),
                "gold, start to last, paired": gain(start["gold"], last["gold"]),
            }
        )
    axis = "KL from the SFT model, nats per answer"
    plots = {
        "over_optimisation_gold.svg": Plot(axis, "gold score", gold),
        "over_optimisation_reward.svg": Plot(axis, "reward before whitening", reward),
    }
    text = (
        f"{ITERATIONS} iterations at a learning rate of {RATE:g}, evaluated every {EVERY} on "
        f"{HELD_OUT} held-out prompts a seed. The best point is picked by what it is judged by, so "
        f"that a small fall after it means nothing.\n\n{table(rows)}"
    )
    return Shown(text, plots)


def _all(results: Results, beta: str, step: str, name: str) -> list[float]:
    return [value for found in results.values() for value in found[beta][step][name]]


def _spot(values: dict[str, list[float]], name: str) -> Spot:
    found = mean_of(values[name])
    return Spot(fmean(values["kl"]), found.value, found.low, found.high)


EXPERIMENT = Experiment("over_optimisation", measure, show)

if __name__ == "__main__":
    main(EXPERIMENT, __doc__)
