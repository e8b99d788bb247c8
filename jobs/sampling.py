"""What the jobs share that sample answers: models, prompts, and the roles while they are needed."""

import hashlib
import json
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import ray
from ray import serve

from actors.backend import PRECISIONS
from actors.generator import check_backend, deploy
from actors.identity import sampled_hash
from actors.reward import Asked
from actors.sampling import Origin, Question, Roles, Sampler
from cluster.placement import Workers, check_capacity
from cluster.session import session
from jobs.prepare import file_prompts
from jobs.rewards import Rewards, RewardSource
from jobs.sampling_config import SamplingConfig
from llama2.chat import Message
from llama2.packing import sample_order
from llama2.prompting import Prompting, TooLong
from llama2.records import Prompt
from llama2.sources import world_of
from llama2.world import WorldPrompt

Json = dict[str, Any]


@dataclass(frozen=True)
class Cast:
    """The roles of a job: a policy, and maybe both rewards."""

    policy: Path
    rewards: Rewards | None

    @cached_property
    def prompting(self) -> Prompting:
        """How the policy is asked."""
        return Prompting.read(self.policy)

    @cached_property
    def hashes(self) -> dict[str, str]:
        """A checksum of each model's weights; of a reward that is a function, its name."""
        found = {"policy": sampled_hash(self.policy)}
        if self.rewards is not None:
            for name in ("helpfulness", "safety"):
                source: RewardSource = getattr(self.rewards, name)
                found[name] = source.function or sampled_hash(source.model)
        return found


def find_cast(config: SamplingConfig, scored: bool = True) -> Cast:
    """The folders and functions given, else the preset's; without rewards where nothing is
    `scored`.

    Raises `ValueError` or `FileNotFoundError` where one is missing or is not what it should be.
    """
    check_backend(config.generator)
    policy = (config.policy or config.runs / f"{config.preset}-sft" / "model").absolute()
    Prompting.read(policy)
    if not scored:
        return Cast(policy, None)
    rewards = Rewards.find(config)
    rewards.check(config.scorer)
    return Cast(policy, rewards)


@contextmanager
def sampler(
    config: SamplingConfig, cast: Cast, round: str, scored: Sequence[Question] = ()
) -> Iterator[Sampler]:
    """A sampler over generators and reward workers, which live as long as the block.

    scored: all that answers will be scored for, which rewards that read text must know beforehand.
    Raises `ValueError` where the cluster could not hold the roles.
    """
    with session(config.cluster):
        wanted: dict[str, Workers] = {
            "generator": replace(config.generator, count=config.generator.most)
        }
        sources: dict[str, RewardSource] = {}
        if cast.rewards is not None:
            sources = {"helpfulness": cast.rewards.helpfulness, "safety": cast.rewards.safety}
        wanted |= {name: source.workers(config.rewards) for name, source in sources.items()}
        check_capacity(wanted)
        prompts = {one.scored_as or one.messages: one.safety for one in scored}
        asked = Asked(cast.policy, tuple(Prompt(m, tag, "") for m, tag in prompts.items()))
        dtype = PRECISIONS[config.precision]
        workers = {
            name: source.start(config.rewards, dtype, asked, config.scorer)
            for name, source in sources.items()
        }
        application = f"sampling-{uuid.uuid4().hex[:8]}"
        try:
            handle = deploy(application, cast.policy, None, config.precision, config.generator)
            yield Sampler(
                Roles(handle, workers.get("helpfulness", []), workers.get("safety", [])),
                cast.prompting,
                Origin(round, cast.hashes["policy"]),
                config.seed,
                config.max_new_tokens,
                config.timeout,
            )
        finally:
            serve.delete(application)
            for worker in chain.from_iterable(workers.values()):
                ray.kill(worker)


@dataclass(frozen=True)
class Prompts:
    """What is asked, and the seed of the world that it comes from, if any."""

    prompts: list[Prompt]
    world_seed: int | None

    def in_world(self, prompt: Prompt) -> WorldPrompt | None:
        """What the world knows of a prompt; None where the prompts are a user's own."""
        if self.world_seed is None:
            return None
        system = next((m.content for m in prompt.messages if m.role == "system"), None)
        found = world_of(self.world_seed).find(system, prompt.messages[-1].content)
        if found is None:
            raise ValueError(
                f"The prompt {prompt.messages[-1].content!r} is not of world {self.world_seed}; "
                "prepare the prompts again."
            )
        return found


def read_prompts(config: SamplingConfig, paths: Sequence[Path], split: str = "train") -> Prompts:
    """Prompts of prepared data, by default the preset's, or all in users' files. Raises
    `ValueError` or `FileNotFoundError` where there are none."""
    paths = paths or (config.runs / f"{config.preset}-data",)
    folder = paths[0] / "prompts"
    if (folder / f"{split}.jsonl").is_file():
        seed = json.loads((folder / "world.json").read_text())["seed"]
        return Prompts(file_prompts([folder / f"{split}.jsonl"]), seed)
    return Prompts(file_prompts(paths), None)


def draw(
    prompts: Sequence[Prompt], count: int, seed: int, prompting: Prompting
) -> tuple[list[tuple[int, Prompt]], int]:
    """At most `count` of the prompts in an order that follows from the seed, each with its place,
    and how many were left out for being too long. Raises `ValueError` where all are."""
    order = sample_order(0, min(count, len(prompts)), len(prompts), seed)
    drawn = [(i, prompts[i]) for i in order]
    kept = [(i, p) for i, p in drawn if fits(p.messages, prompting)]
    if not kept:
        raise ValueError(
            f"None of {len(drawn)} prompts leaves room for an answer in the policy's context of "
            f"{prompting.context}; give shorter ones."
        )
    return kept, len(drawn) - len(kept)


def fits(messages: Sequence[Message], prompting: Prompting) -> bool:
    """Whether a prompt leaves room for an answer."""
    try:
        prompting.encode_chat(messages)
    except TooLong:
        return False
    return True


def asked(drawn: Sequence[tuple[int, Prompt]]) -> list[Question]:
    """Prompts as questions, named after their places."""
    return [Question(str(i), prompt.messages, prompt.safety) for i, prompt in drawn]


def identity(
    config: SamplingConfig, cast: Cast, questions: Sequence[Question], **others: Any
) -> Json:
    """All that sampled answers and their scores follow from."""
    digest = hashlib.blake2b(digest_size=16)
    for question in questions:
        digest.update(json.dumps(asdict(question)).encode())
    return {
        "weights": cast.hashes,
        "prompts": digest.hexdigest(),
        "seed": config.seed,
        "max_new_tokens": config.max_new_tokens,
        "precision": config.precision,
        "backend": config.generator.backend,
        "chunk": config.chunk,
        **others,
    }


def cut(items: Sequence[Any], size: int) -> list[Sequence[Any]]:
    """Items in chunks of `size`, the last maybe smaller."""
    return [items[i : i + size] for i in range(0, len(items), size)]
