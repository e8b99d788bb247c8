"""What the rounds of jobs/rlhf.py consist of: each stage with its parents, its data and its job."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cluster.run_directory import RunDirectory
from jobs import (
    academic,
    comparisons,
    context_distillation,
    evaluate,
    ghost_attention,
    ppo,
    prepare,
    rejection_sampling,
    reward_model,
    sft,
)
from jobs.annotations import Aspect
from jobs.configs import JobConfig
from jobs.ppo_inputs import pretraining_rows
from jobs.prepare_config import PrepareConfig
from jobs.rlhf_config import RlhfConfig


@dataclass(frozen=True)
class Start:
    """What the first round begins with. Runs of these are named in the lineage as here."""

    base: Path
    policy: Path
    data: Path
    prepared: PrepareConfig
    """How `data` was prepared."""
    dialogues: tuple[Path, ...]
    """Files of demonstrations."""
    helpfulness: tuple[Path, ...]
    """Files of comparisons, here and below."""
    safety: tuple[Path, ...]

    @property
    def prompts(self) -> tuple[Path, ...]:
        """The folder of prompts, as jobs want it."""
        return (self.data,)


BASE, POLICY, DATA = "base", "sft", "data"


@dataclass(frozen=True)
class Stage:
    """A run of a job, in a folder of its own."""

    name: str
    parents: tuple[str, ...]
    main: Callable[[Any], None]
    job: Callable[[], JobConfig]
    """Its config; asked for when all parents have finished."""
    data: tuple[Path, ...] = ()
    """Files it reads that no parent made."""
    made: tuple[str, ...] = ("model",)
    """What it leaves to others, below its folder."""

    def run(self, root: Path) -> RunDirectory:
        """The stage's run, below that of the loop."""
        return RunDirectory(root, self.name)


@dataclass(frozen=True)
class Plan:
    """All stages of a loop. `root` is the loop's own folder."""

    config: RlhfConfig
    root: Path
    start: Start

    def stages(self) -> list[Stage]:
        """In the order in which they run."""
        rounds = (self._round(number) for number in range(1, self.config.rounds + 1))
        return [*(stage for one in rounds for stage in one), self._evaluation()]

    def version(self, number: int) -> str:
        """The stage whose model is a version; 0 is the SFT model."""
        if number == 0:
            return POLICY
        return f"v{number}-{'ppo' if number == self.config.rounds else 'sft'}"

    def model(self, number: int) -> Path:
        """The folder of a version."""
        return self.start.policy if number == 0 else self.root / self.version(number) / "model"

    def _round(self, number: int) -> Iterator[Stage]:
        yield self._comparisons(number)
        yield self._reward_data(number)
        yield from (self._reward_model(number, kind) for kind in comparisons.ASPECTS)
        if number == self.config.rounds:
            yield self._ppo(number)
            return
        yield self._rejection_sampling(number)
        if self._has_ghosts(number):
            yield self._ghost_attention(number)
        if self.config.distill:
            yield self._distillation(number)
        yield self._sft(number)

    def _job(self, job: Any, name: str, number: int, **changes: Any) -> Any:
        """A stage's config; each round draws and shuffles by a seed of its own."""
        config = self.config
        return replace(
            job, preset=config.preset, name=name, runs=self.root, cluster=config.cluster,
            wandb_project=config.wandb_project, seed=config.seed + 1000 * number, **changes,
        )  # fmt: skip

    def _comparisons(self, number: int) -> Stage:
        config, name, last = self.config, f"v{number}-comparisons", number - 1
        folder = config.annotations
        ratings = None if folder is None else (folder / f"v{number}.jsonl").absolute()
        variant = self.model(last - 1) if last else None
        versions = {self.version(last), self.version(max(0, last - 1))}

        def job() -> JobConfig:
            found: JobConfig = self._job(
                config.comparisons, name, number, policy=self.model(last), variant=variant,
                prompts=self.start.prompts, annotations=ratings,
            )  # fmt: skip
            return found

        return Stage(
            name, (*sorted(versions), DATA), comparisons.main, job,
            data=() if ratings is None else (ratings,), made=comparisons.ASPECTS,
        )  # fmt: skip

    def _reward_data(self, number: int) -> Stage:
        start, name = self.start, f"v{number}-reward-data"
        parents = tuple(f"v{n}-comparisons" for n in range(1, number + 1))

        def collected(kind: Aspect, initial: tuple[Path, ...]) -> tuple[Path, ...]:
            found = (comparisons.dataset(RunDirectory(self.root, one), kind) for one in parents)
            every = initial + tuple(path for path in found if path.is_file())
            if not every:
                raise ValueError(
                    f"Round {number} has no comparisons for the {kind} reward model; give some "
                    f"with --data, or prompts {'with' if kind == 'safety' else 'without'} "
                    "safety: true."
                )
            return every

        def job() -> JobConfig:
            found: JobConfig = self._job(
                start.prepared, name, 0, text=(), dialogues=(), prompts=(), mix={},
                helpfulness=collected("helpfulness", start.helpfulness),
                safety=collected("safety", start.safety), tokenizer=self.start.policy,
            )  # fmt: skip
            return found

        return Stage(
            name, (*parents, POLICY), prepare.main, job,
            data=start.helpfulness + start.safety + start.prepared.benchmarks,
            made=("helpfulness", "safety", "tokenizer"),
        )  # fmt: skip

    def _reward_model(self, number: int, kind: Aspect) -> Stage:
        config, name, data = self.config, f"v{number}-{kind}", f"v{number}-reward-data"
        chosen = config.helpfulness if kind == "helpfulness" else config.safety

        def job() -> JobConfig:
            found: JobConfig = self._job(
                chosen, name, number, data=(self.root / data,), start=self.model(number - 1)
            )
            return found

        return Stage(name, (self.version(number - 1), data), reward_model.main, job)

    def _sampled(self, job: Any, name: str, number: int, **changes: Any) -> JobConfig:
        """A job in which the newest version answers and the newest reward models score."""
        found: JobConfig = self._job(
            job, name, number, policy=self.model(number - 1),
            helpfulness_model=self.root / f"v{number}-helpfulness" / "model",
            safety_model=self.root / f"v{number}-safety" / "model",
            prompts=self.start.prompts, **changes,
        )  # fmt: skip
        return found

    def _cast(self, number: int) -> tuple[str, ...]:
        rewards = tuple(f"v{number}-{kind}" for kind in comparisons.ASPECTS)
        return (self.version(number - 1), *rewards, DATA)

    def _rejection_sampling(self, number: int) -> Stage:
        name = f"v{number}-rejection"
        # What the round before kept holds the samples of all rounds before it.
        before = (f"v{number - 1}-rejection",) if number > 1 else ()
        prior = tuple(self.root / one for one in before)
        return Stage(
            name, (*self._cast(number), *before), rejection_sampling.main,
            lambda: self._sampled(self.config.rejection_sampling, name, number, prior=prior),
            made=(rejection_sampling.DATASET,),
        )  # fmt: skip

    def _has_ghosts(self, number: int) -> bool:
        return 0 < self.config.ghost_attention_after < number

    def _ghost_attention(self, number: int) -> Stage:
        name = f"v{number}-ghosts"
        return Stage(
            name, self._cast(number), ghost_attention.main,
            lambda: self._sampled(self.config.ghost_attention, name, number),
            data=_given(self.config.ghost_attention.constraints),
            made=(ghost_attention.DATASET,),
        )  # fmt: skip

    def _distillation(self, number: int) -> Stage:
        name = f"v{number}-distillation"
        return Stage(
            name, self._cast(number), context_distillation.main,
            lambda: self._sampled(self.config.context_distillation, name, number),
            data=_given(self.config.context_distillation.preprompts),
            made=(context_distillation.DATASET,),
        )  # fmt: skip

    def _sft(self, number: int) -> Stage:
        """From the base model, on demonstrations and what this round's model was best at."""
        name, sampled = f"v{number}-sft", [f"v{number}-rejection"]
        sampled += [f"v{number}-ghosts"] if self._has_ghosts(number) else []
        sampled += [f"v{number}-distillation"] if self.config.distill else []
        files = tuple(self.root / one / rejection_sampling.DATASET for one in sampled)

        def job() -> JobConfig:
            found: JobConfig = self._job(
                self.config.sft, name, number, start=self.start.base,
                tokenizer=self.start.policy, data=self.start.dialogues + files,
            )  # fmt: skip
            return found

        # The chat model's tokenizer, as it has the chat format.
        return Stage(name, (BASE, POLICY, *sampled), sft.main, job, data=self.start.dialogues)

    def _ppo(self, number: int) -> Stage:
        name, chosen = f"v{number}-ppo", self.config.ppo
        mixed = replace(chosen, pretraining_data=chosen.pretraining_data or self.start.data)
        rows = (pretraining_rows(mixed),) if chosen.ppo.ptx_coefficient else ()

        def job() -> JobConfig:
            return self._sampled(mixed, name, number, long_prompts="drop")

        return Stage(
            name, self._cast(number), ppo.main, job, data=rows,
        )  # fmt: skip

    def _evaluation(self) -> Stage:
        last = self.config.rounds
        rewards = tuple(f"v{last}-{kind}" for kind in comparisons.ASPECTS)
        versions = range(last + 1)

        def job() -> JobConfig:
            found: JobConfig = self._job(
                self.config.evaluate, "evaluation", 0,
                models=tuple(self.model(number) for number in versions), against=self.model(0),
                prompts=self.start.prompts, long_prompts="drop",
                helpfulness_model=self.root / rewards[0] / "model",
                safety_model=self.root / rewards[1] / "model",
            )  # fmt: skip
            return found

        parents = (*(self.version(number) for number in versions), *rewards, DATA)
        chosen = self.config.evaluate
        files = _given(chosen.constraints, *chosen.texts, *academic.task_files(chosen))
        return Stage("evaluation", parents, evaluate.main, job, files, ("evaluation.json",))


def _given(*paths: Path | None) -> tuple[Path, ...]:
    return tuple(path for path in paths if path is not None)
