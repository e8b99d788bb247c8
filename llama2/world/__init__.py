"""The embedded default: a small synthetic world, generated from a seed, without any file."""

from llama2.world.annotator import Annotation, Comparison, annotate
from llama2.world.judge import Judgement, judge
from llama2.world.prompt import Mark, WorldPrompt
from llama2.world.world import WEIGHTS, World

__all__ = [
    "WEIGHTS",
    "Annotation",
    "Comparison",
    "Judgement",
    "Mark",
    "World",
    "WorldPrompt",
    "annotate",
    "judge",
]
