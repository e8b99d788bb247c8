"""A reward model from comparisons, started from the chat model.

python jobs/reward_model.py --preset tiny --kind safety
python jobs/reward_model.py --name mine --start runs/tiny-sft/model --data pairs.jsonl
"""

from jobs import cli
from jobs.configs import RewardModelConfig
from jobs.training import start_folder, train_job


def main(config: RewardModelConfig) -> None:
    """Train a reward model with the ranking loss and its margins."""
    train_job(config, "reward_model", start_folder(config, "sft"))


if __name__ == "__main__":
    cli.run(main, lambda preset: preset.helpfulness)
