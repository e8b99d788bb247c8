"""Generation: `Engine(model).generate(prompts, Sampling(...)) -> list[Completion]`."""

from llama2.generation.engine import Completion, Engine
from llama2.generation.request import Token
from llama2.generation.sampling import Sampling

__all__ = ["Completion", "Engine", "Sampling", "Token"]
