"""What `jobs/evaluate.py` reads, and refuses, before any work starts."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import xxhash

from actors.conversing import Conversation
from actors.reward_function import load_scorer
from cluster.files import read_records
from cluster.lineage import stamp
from cluster.run_directory import RunDirectory
from jobs.evaluate_config import EvaluateConfig
from jobs.evaluation_texts import TextSet
from jobs.prepare import file_prompts
from llama2.chat import Message
from llama2.checkpoint import check_folder
from llama2.packing import shuffled
from llama2.prompting import Prompting
from llama2.records import Dialogue, Prompt, Skipped, parse_dialogues, parse_prompts
from llama2.tokenizer import check_vocabulary, load_tokenizer
from llama2.world import World, WorldPrompt


@dataclass(frozen=True)
class Subject:
    """One of the things compared: a model, or answers that something else gave."""

    name: str
    path: Path
    kind: Literal["model", "answers"]
    stamp: str
    """Changes when the files do."""


@dataclass(frozen=True)
class Asked:
    """A prompt, and what the world's judge knows of it, where it is of that world."""

    prompt: Prompt
    known: WorldPrompt | None = None

    @property
    def category(self) -> str:
        """What kind of prompt it is."""
        return self.known.kind if self.known else self.prompt.category or "all"

    @property
    def adversarial(self) -> bool:
        """Whether it is tagged for safety."""
        return self.known.safety if self.known else self.prompt.safety

    @property
    def text(self) -> str:
        """The whole dialogue, as a person reads it."""
        return shown(self.prompt.messages)


@dataclass(frozen=True)
class Rewards:
    """The folders of reward models or the names of functions in their place, where there are
    any."""

    helpfulness: Path | str | None
    safety: Path | str | None


@dataclass(frozen=True)
class Inputs:
    """All that is read before work starts."""

    subjects: list[Subject]
    baseline: Subject
    """What all others are compared with."""
    asked: list[Asked]
    too_long: int
    """Prompts that were left out, as they leave one of the models no room for an answer."""
    rewards: Rewards
    texts: list[TextSet]
    conversations: list[Conversation]
    tasks: Any
    """Academic tasks, as lm-evaluation-harness holds them; None for none."""
    task_files: tuple[Path, ...]
    """Files and folders of tasks of one's own."""

    def stamp(self, subject: Subject) -> str:
        """Changes when the subject does, or what it is asked."""
        digest = xxhash.xxh3_64(f"{subject.name}\0{subject.stamp}\0".encode())
        for one in self.asked:
            digest.update(f"{one.text}\0{one.category}\0{one.adversarial}\0".encode())
        for texts in self.texts:
            digest.update(f"{texts.name}\0{texts.stamp}\0".encode())
        for held in self.conversations:
            digest.update(f"{held.instruction.text}\0{held.questions}\0".encode())
        for path in self.task_files:
            digest.update(f"{path}\0{stamp(path)}\0".encode())
        return digest.hexdigest()

    @property
    def scorers(self) -> dict[str, str]:
        """What changes when a reward model does; the name of a function or a scorer."""
        sources = (("helpfulness", self.rewards.helpfulness), ("safety", self.rewards.safety))
        return {
            name: stamp(source) if isinstance(source, Path) else source
            for name, source in sources
            if source is not None
        }


def shown(messages: Sequence[Message]) -> str:
    """A dialogue as text; a single question as it is."""
    if len(messages) == 1:
        return messages[0].content.strip()
    return "\n".join(f"{message.role}: {message.content.strip()}" for message in messages)


def find_subjects(config: EvaluateConfig) -> list[Subject]:
    """What is compared, `against` among it, by names that tell them apart.

    Raises `ValueError` or `FileNotFoundError` where one is not there, cannot be read, or is named
    twice.
    """
    if not config.models:
        raise ValueError("There is nothing to evaluate; name models or answers with --models.")
    paths = list(config.models)
    if config.against is not None and config.against not in paths:
        paths.append(config.against)
    twice = {path for path in paths if paths.count(path) > 1}
    if twice:
        raise ValueError(f"--models names {twice.pop()} twice; name it once.")
    names = [_name(path) for path in paths]
    names = [
        str(path) if names.count(name) > 1 else name
        for path, name in zip(paths, names, strict=True)
    ]
    return [_subject(name, path) for name, path in zip(names, paths, strict=True)]


def baseline(config: EvaluateConfig, subjects: Sequence[Subject]) -> Subject:
    """What all others are compared with."""
    if config.against is None:
        return subjects[0]
    return next(subject for subject in subjects if subject.path == config.against)


def find_prompts(config: EvaluateConfig) -> list[Asked]:
    """The prompts to ask, at most `most_prompts` of them in their files' order, each once.

    Raises `ValueError` for files without prompts, and for prompts that the world does not know
    whose judge is to judge.
    """
    if not config.most_prompts:
        return []
    paths = config.prompts or (config.runs / f"{config.preset}-data",)
    folder, world_seed = paths[0] / "prompts", config.world_seed
    if (folder / "heldout.jsonl").is_file():
        prompts = file_prompts([folder / "heldout.jsonl"])
        if world_seed is None:
            world_seed = json.loads((folder / "world.json").read_text())["seed"]
    elif config.prompts:
        prompts = file_prompts(paths)
    else:
        raise ValueError(
            f"There is no prepared data in {paths[0]}; name prompts with --prompts, or leave them "
            "out with --most-prompts 0."
        )
    unique = list({shown(prompt.messages): prompt for prompt in prompts}.values())
    if not unique:
        raise ValueError(f"There are no prompts in {paths[0]}; give a file that holds some.")
    numbers = range(min(config.most_prompts, len(unique)))
    picked = sorted(shuffled(i, len(unique), config.seed) for i in numbers)
    chosen = [unique[i] for i in picked]
    if world_seed is None:
        return [Asked(prompt) for prompt in chosen]
    world = World(world_seed)
    return [_known(prompt, world) for prompt in chosen]


def find_rewards(config: EvaluateConfig) -> Rewards:
    """What scores the answers. Raises `ValueError` where a named model or function is none, or both
    are named for one place."""
    return Rewards(
        _reward(config, "helpfulness", config.helpfulness_model, config.helpfulness_reward),
        _reward(config, "safety", config.safety_model, config.safety_reward),
    )


def read_answers(subject: Subject, asked: Sequence[Asked]) -> list[str]:
    """The answers of a file, in the order of the prompts.

    Raises `ValueError` for a line that is no answer, for two answers to one prompt, and for a
    prompt without one.
    """
    found: dict[str, str] = {}
    for where, record in read_records(subject.path):
        prompt, answer = _answer(record, where)
        key = shown(prompt)
        if key in found:
            raise ValueError(
                f"{where}: a second answer to the prompt {key[:60]!r}; give one to each prompt."
            )
        found[key] = answer
    for one in asked:
        if one.text not in found:
            raise ValueError(
                f"{subject.path} has no answer to the prompt {one.text[:60]!r} of "
                f"{one.prompt.source}; give answers to all prompts, or name --prompts that it "
                "answers."
            )
    return [found[one.text] for one in asked]


def prompt_tokens(
    subject: Subject, prompting: Prompting, asked: Sequence[Asked]
) -> list[list[int]]:
    """Token ids of all prompts for a model. Raises `ValueError`, naming the prompt's place, where
    one leaves no room for an answer."""
    found = []
    for one in asked:
        try:
            found.append(prompting.encode_chat(one.prompt.messages))
        except ValueError as error:
            raise ValueError(f"{one.prompt.source}, asked of {subject.name}: {error}") from error
    return found


def _subject(name: str, path: Path) -> Subject:
    if path.is_file():
        next(read_records(path))
        return Subject(name, path, "answers", stamp(path))
    if not path.exists():
        raise FileNotFoundError(f"There is no model and no file of answers at {path}.")
    Prompting.read(path)
    return Subject(name, path, "model", stamp(path))


def _name(path: Path) -> str:
    """Runs keep their models in folders called model."""
    found = path.absolute()
    if path.is_file():
        return found.name.partition(".")[0]
    return (found.parent if found.name == "model" else found).name


def _reward(
    config: EvaluateConfig, kind: str, model: Path | None, function: str
) -> Path | str | None:
    if function:
        if model is not None:
            raise ValueError(
                f"Both {kind}_model {model} and {kind}_reward {function} are given; leave one out."
            )
        load_scorer(function, Path.cwd(), config.scorer)
        return function
    run = RunDirectory(config.runs, f"{config.preset}-{kind}")
    folder = model or (run.model if run.is_finished else None)
    if folder is not None:
        check_vocabulary(load_tokenizer(folder), check_folder(folder, scalar=True).vocab_size)
    return folder


def _known(prompt: Prompt, world: World) -> Asked:
    system = next((m.content for m in prompt.messages if m.role == "system"), None)
    found = world.find(system, prompt.messages[-1].content)
    if found is None:
        raise ValueError(
            f"{prompt.source}: the prompt {prompt.messages[-1].content[:60]!r} is not of world "
            f"{world.seed}; prepare the prompts again, or leave --world-seed out."
        )
    return Asked(prompt, found)


def _answer(record: Mapping[str, Any], where: str) -> tuple[tuple[Message, ...], str]:
    """Prompt and answer of a line. `response` may be empty, which no dialogue's answer may."""
    if isinstance(record.get("response"), str):
        prompts = parse_prompts(record, where)
        if len(prompts) == 1 and isinstance(prompts[0], Prompt):
            return prompts[0].messages, record["response"]
        skipped = [found for found in prompts if isinstance(found, Skipped)]
    else:
        dialogues = parse_dialogues(record, where)
        if len(dialogues) == 1 and isinstance(dialogues[0], Dialogue):
            return dialogues[0].messages[:-1], dialogues[0].messages[-1].content
        skipped = [found for found in dialogues if isinstance(found, Skipped)]
    reason = skipped[0].reason if skipped else "it holds several dialogues"
    raise ValueError(f"{where}: {reason}; give one prompt with its answer a line.")
