"""Pretraining: a model from nothing, or on from a folder.

python jobs/pretrain.py --preset tiny
python jobs/pretrain.py --preset 7b --data /data/corpus-prepared --runs /shared/runs
"""

from jobs import cli
from jobs.configs import PretrainConfig
from jobs.training import train_job


def main(config: PretrainConfig) -> None:
    """Pretrain a model on prepared rows or raw text."""
    train_job(config, "pretrain", config.start)


if __name__ == "__main__":
    cli.run(main, lambda preset: preset.pretrain)
