"""The gold judge of the synthetic world, where the prompts come from it."""

from dataclasses import replace

from llama2.evaluation import Judged
from llama2.records import Prompt
from llama2.world import World, judge


class Judge:
    """Adds gold figures to held-out answers; leaves answers to users' own prompts as they are."""

    def __init__(self, world_seed: int | None) -> None:
        self._world = None if world_seed is None else World(world_seed)

    def look(self, prompt: Prompt, judged: Judged) -> Judged:
        """`judged` with the gold judge's verdict. Raises `ValueError` for a prompt unknown to its
        world."""
        if self._world is None:
            return judged
        system = next((m.content for m in prompt.messages if m.role == "system"), None)
        found = self._world.find(system, prompt.messages[-1].content)
        if found is None:
            raise ValueError(
                f"The prompt {prompt.messages[-1].content!r} is not of world {self._world.seed}; "
                "prepare the prompts again, or evaluate without the gold judge."
            )
        verdict = judge(found, judged.answer)
        return replace(
            judged,
            kind=found.kind,
            gold=verdict.score,
            adversarial=verdict.safety_tagged,
            violation=verdict.violation,
            false_refusal=verdict.false_refusal,
        )
