"""Supervised fine-tuning on demonstrations.

python jobs/sft.py --preset tiny
python jobs/sft.py --name mine --start meta-llama/ --data dialogues.jsonl
"""

from jobs import cli
from jobs.configs import SftConfig
from jobs.training import start_folder, train_job


def main(config: SftConfig) -> None:
    """Fine-tune a pretrained model on dialogues, the loss on answers only."""
    train_job(config, "sft", start_folder(config, "pretrain"))


if __name__ == "__main__":
    cli.run(main, lambda preset: preset.sft)
