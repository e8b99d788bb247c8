"""Safety SFT data of the synthetic world: answers to adversarial and borderline prompts.

python jobs/safety_data.py --output safety.jsonl --size 2000
python jobs/sft.py --name safer --start runs/tiny-pretrain/model --data dialogues.jsonl safety.jsonl
"""

import json
from dataclasses import dataclass
from pathlib import Path

from jobs import options
from llama2.sources import world_of
from llama2.whole_files import whole_file
from llama2.world import safety


@dataclass(frozen=True)
class SafetyDataConfig:
    """Demonstrations of safe conduct (paper, section 4.2.2), half of them under a preprompt that
    asks for it, as context distillation wants them."""

    output: Path
    """File of JSON lines to write, for `jobs/sft.py --data`."""
    size: int = 2000
    """Demonstrations."""
    seed: int = 0
    """Of prompts and answers."""
    world_seed: int = 0
    """Which synthetic world."""
    preprompt_share: float = 0.5
    """Share of the demonstrations under a preprompt; those are by careful people, the others by the
    crowd."""

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"size must be at least 1, not {self.size}.")
        if not 0 <= self.preprompt_share <= 1:
            raise ValueError(
                f"preprompt_share is {self.preprompt_share}; give a share from 0 to 1."
            )


def main(config: SafetyDataConfig) -> None:
    """Write demonstrations of safe conduct."""
    world = world_of(config.world_seed)
    dialogues = safety.safety_dialogues(world, config.size, config.seed, config.preprompt_share)
    with whole_file(config.output) as file:
        file.writelines(json.dumps({"messages": one}).encode() + b"\n" for one in dialogues)
    print(f"{config.size} demonstrations are in {config.output}.")


if __name__ == "__main__":
    options.run(main, SafetyDataConfig)
