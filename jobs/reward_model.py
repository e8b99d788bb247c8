"""A reward model from comparisons, started from the chat model.

python jobs/reward_model.py --preset tiny --kind safety
python jobs/reward_model.py --name mine --start runs/tiny-sft/model --data pairs.jsonl
python jobs/reward_model.py --kind safety --safety-weight 1 --other-share 0.1
"""

import math
from pathlib import Path

from cluster.run_directory import RunDirectory
from jobs import cli
from jobs.configs import RewardModelConfig
from jobs.training import start_folder, train_job
from llama2.preference_mix import choose, write_mix


def main(config: RewardModelConfig) -> None:
    """Train a reward model with the ranking loss and its margins, and report on it."""
    check(config)

    def mix(prepared: Path, run: RunDirectory) -> Path:
        return mixed(config, prepared, run)

    train_job(config, "reward_model", start_folder(config, "sft"), mix)


def check(config: RewardModelConfig) -> None:
    """Raise `ValueError` for numbers that mean nothing."""
    if not (math.isfinite(config.safety_weight) and config.safety_weight >= 0):
        raise ValueError(
            f"safety_weight must be a number of at least 0, not {config.safety_weight:g}."
        )
    if not 0 <= config.other_share < 1:
        raise ValueError(f"other_share must be at least 0 and below 1, not {config.other_share:g}.")


def mixed(config: RewardModelConfig, prepared: Path, run: RunDirectory) -> Path:
    """The folder of the rows to train on: the model's own where no others are asked for, else a mix
    in the run's folder.

    Raises `ValueError` as `llama2.preference_mix.choose` does.
    """
    if not config.other_share and not config.open_data:
        return prepared / config.kind / "train"
    mix = choose(config.kind, prepared, config.other_share, config.open_data, config.seed)
    for one in mix.data_sets:
        print(f"{run.name}: {len(one.rows)} pairs of {one.name}")
    if mix.taken < mix.wanted:
        print(f"{run.name}: only {mix.taken} of the {mix.wanted} other pairs asked for are there.")
    folder = run.path / "mix"
    write_mix(mix, folder)
    return folder


if __name__ == "__main__":
    cli.run(main, lambda preset: preset.helpfulness)
