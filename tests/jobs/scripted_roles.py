"""Roles of the sampling jobs that follow a script, and the folder of prompts that they answer."""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actors.records import Sample
from actors.sampling import Origin, Question, Roles, Sampler
from jobs.sampling import Cast
from jobs.sampling_config import SamplingConfig
from llama2.records import Prompt
from tests.actors.in_process_roles import Scripted, worker

Answer = Callable[[str, float, int], str]


def prepared(folder: Path, train: list[Prompt], seed: int | None = 0) -> Path:
    """A folder as `prepare` leaves it, with its prompts alone."""
    (folder / "prompts").mkdir(parents=True)
    lines = [
        json.dumps({"messages": [vars(m) for m in prompt.messages], "safety": prompt.safety})
        for prompt in train
    ]
    for split in ("train", "heldout"):
        (folder / "prompts" / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "prompts" / "world.json").write_text(json.dumps({"seed": seed}))
    return folder


@dataclass
class Script:
    """What the roles of the jobs do."""

    policy: Path
    answer: Answer
    helpfulness: Callable[[str], float]
    safety: Callable[[str], float]

    @contextmanager
    def sampler(
        self, config: SamplingConfig, cast: Cast, round: str, scored: Sequence[Question] = ()
    ) -> Iterator[Sampler]:
        tokenizer = cast.prompting.tokenizer

        def read(score: Callable[[str], float]) -> Callable[[Sample], float]:
            return lambda sample: score(tokenizer.decode(sample.response.tolist()).strip())

        roles = Roles(
            Scripted(self.policy, self.answer),
            [worker(read(self.helpfulness))],
            [worker(read(self.safety))],
        )
        origin = Origin(round, cast.hashes["policy"])
        yield Sampler(roles, cast.prompting, origin, config.seed, config.max_new_tokens, 60.0)


def number(text: str) -> float:
    return float(re.findall(r"\d+", text)[0]) - 3


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]
