"""What `jobs/evaluate.py` measures of each model by itself, and how answers are judged."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import ray
import torch

from actors.measured_model import ClusterModel, LocalModel, MeasuredModel, Question
from actors.reward_function import called, load_scorer
from actors.text_rewards import Reply, TextRewards
from cluster.run_directory import write_atomically
from jobs import academic
from jobs.evaluate_config import EvaluateConfig
from jobs.evaluation_adherence import adherence
from jobs.evaluation_inputs import Inputs, Subject, prompt_tokens, read_answers
from jobs.evaluation_texts import encoded, perplexity
from jobs.sampling import cut
from llama2.answer_evaluation import Answer
from llama2.evaluation import Measure
from llama2.prompting import Prompting, sample_seed
from llama2.rewards import composite, logit
from llama2.world import judge
from llama2.world.judge import is_refusal

Json = dict[str, Any]
Table = dict[str, dict[str, Measure]]
SCORED_AT_ONCE = 64
"""Answers that a user's own reward is given at a time, within its limits."""


@dataclass(frozen=True)
class Measured:
    """A subject and what was found of it."""

    subject: Subject
    answers: list[Answer]
    texts: Table = field(default_factory=dict)
    """Perplexity of each set of texts."""
    adherence: dict[str, Measure] = field(default_factory=dict)
    """Share of conversations that keep to their instruction, by turn."""
    tasks: Table = field(default_factory=dict)
    """Metrics of each academic task."""
    shortened: int = 0
    """Contexts of tasks that lost their beginning, as they did not fit."""


def measure(config: EvaluateConfig, folder: Path, inputs: Inputs, subject: Subject) -> Measured:
    """All that a subject gives by itself. Each part is kept in `folder` once it is there, so that a
    job that was stopped does not do it again."""
    if subject.kind == "answers":
        return Measured(subject, _given_answers(inputs, subject))
    kept = folder / inputs.stamp(subject)
    kept.mkdir(parents=True, exist_ok=True)
    prompting = Prompting.read(subject.path)
    with _opened(config, subject) as model:
        answers = _once(kept / "answers.json", lambda: _ask(config, inputs, subject, model))
        texts = _once(kept / "texts.json", lambda: _read(config, inputs, prompting, model))
        turns = _once(kept / "turns.json", lambda: _converse(config, inputs, prompting, model))
        tasks = _once(kept / "tasks.json", lambda: _examine(config, inputs, prompting, model))
    return Measured(
        subject,
        [Answer(**answer) for answer in answers],
        _table(texts),
        _table({"": turns})[""],
        _table(tasks["results"]),
        tasks["shortened"],
    )


def judged(config: EvaluateConfig, inputs: Inputs, measured: Sequence[Measured]) -> list[Measured]:
    """The same with the answers' scores and verdicts. Each reward model is read once."""
    everything = [answer for one in measured for answer in one.answers]
    asked = inputs.asked * len(measured)
    replies = [
        Reply(one.prompt.messages, answer.answer, answer.finished is not False)
        for one, answer in zip(asked, everything, strict=True)
    ]
    helpfulness, safety = (
        None if reward is None or not replies else _scores(config, reward, replies)
        for reward in (inputs.rewards.helpfulness, inputs.rewards.safety)
    )
    rewards = _rewards(helpfulness, safety, [answer.adversarial for answer in everything])
    found = []
    for i, (one, answer) in enumerate(zip(asked, everything, strict=True)):
        scored = replace(
            answer,
            helpfulness=helpfulness[i] if helpfulness else None,
            safety=safety[i] if safety else None,
            reward=rewards[i] if rewards else None,
            # The decision boundary of the safety reward model (paper, section 3.2.2).
            violation=safety[i] < 0 if safety else None,
            refusal=is_refusal(answer.answer),
        )
        if one.known is not None:
            verdict = judge(one.known, answer.answer)
            scored = replace(
                scored,
                gold=verdict.score,
                violation=verdict.violation,
                refusal=verdict.refusal,
            )
        found.append(scored)
    size = len(inputs.asked)
    return [
        replace(one, answers=found[number * size : (number + 1) * size])
        for number, one in enumerate(measured)
    ]


@contextmanager
def _opened(config: EvaluateConfig, subject: Subject) -> Iterator[Callable[[], MeasuredModel]]:
    """A function that reads the model when it is first asked for."""
    models: list[MeasuredModel] = []

    def model() -> MeasuredModel:
        if not models:
            print(f"{subject.name}: reading {subject.path}", flush=True)
            arguments = (subject.path, config.precision, config.generator)
            models.append(
                LocalModel(*arguments)
                if config.where == "here"
                else ClusterModel(*arguments, config.timeout)
            )
        return models[0]

    try:
        yield model
    finally:
        for one in models:
            one.close()


def _once(path: Path, make: Callable[[], Any]) -> Any:
    if not path.exists():
        write_atomically(path, json.dumps(make()))
    return json.loads(path.read_text())


def _given_answers(inputs: Inputs, subject: Subject) -> list[Answer]:
    texts = read_answers(subject, inputs.asked)
    return [
        Answer(one.text, one.category, one.adversarial, text)
        for one, text in zip(inputs.asked, texts, strict=True)
    ]


def _ask(
    config: EvaluateConfig, inputs: Inputs, subject: Subject, model: Callable[[], MeasuredModel]
) -> list[Json]:
    """The answers to all prompts. Draws follow from seed and prompt, whatever else is asked."""
    if not inputs.asked:
        return []
    prompting = Prompting.read(subject.path)
    sampling = config.sampling(prompting.stop_ids)
    questions = [
        Question(tokens, sampling, sample_seed(config.seed, one.text))
        for one, tokens in zip(
            inputs.asked, prompt_tokens(subject, prompting, inputs.asked), strict=True
        )
    ]
    return [
        asdict(
            Answer(
                one.text,
                one.category,
                one.adversarial,
                said.text.strip(),
                tokens=len(said.tokens),
                finished=said.finish_reason == "stop",
            )
        )
        for one, said in zip(inputs.asked, model().answer(questions), strict=True)
    ]


def _read(
    config: EvaluateConfig,
    inputs: Inputs,
    prompting: Prompting,
    model: Callable[[], MeasuredModel],
) -> Json:
    found = {}
    for texts in inputs.texts:
        pieces = encoded(texts, prompting, config.most_texts)
        if pieces is not None:  # else rows prepared with another tokenizer, which is told
            measures = perplexity(model(), pieces)
            found[texts.name] = {name: asdict(value) for name, value in measures.items()}
    return found


def _converse(
    config: EvaluateConfig,
    inputs: Inputs,
    prompting: Prompting,
    model: Callable[[], MeasuredModel],
) -> Json:
    if not inputs.conversations:
        return {}
    found = adherence(model(), prompting, inputs.conversations, config.max_new_tokens)
    return {turn: asdict(value) for turn, value in found.items()}


def _examine(
    config: EvaluateConfig,
    inputs: Inputs,
    prompting: Prompting,
    model: Callable[[], MeasuredModel],
) -> Json:
    if inputs.tasks is None:
        return {"results": {}, "shortened": 0}
    results, shortened = academic.run_tasks(config, inputs.tasks, model(), prompting)
    plain = {
        task: {name: asdict(value) for name, value in measures.items()}
        for task, measures in results.items()
    }
    return {"results": plain, "shortened": shortened}


def _table(plain: Json) -> Table:
    return {
        row: {name: Measure(**value) for name, value in measures.items()}
        for row, measures in plain.items()
    }


def _scores(config: EvaluateConfig, reward: Path | str, replies: Sequence[Reply]) -> list[float]:
    print(f"Scoring {len(replies)} answers with {reward}", flush=True)
    if isinstance(reward, str):
        scorer = load_scorer(reward, Path.cwd(), config.scorer)
        found: list[float] = []
        for part in cut(replies, SCORED_AT_ONCE):
            prompts = [
                [{"role": m.role, "content": m.content} for m in reply.prompt] for reply in part
            ]
            found += called(reward, scorer, prompts, [reply.answer for reply in part])
        return found
    threads = config.generator.threads
    if config.where == "here":
        return TextRewards(reward, config.precision, threads).scores(replies)
    role: Any = ray.remote(TextRewards)
    options = config.generator.actor_options() | {"max_restarts": 3, "max_task_retries": 3}
    worker = role.options(**options).remote(reward.absolute(), config.precision, threads)
    try:
        scores: list[float] = ray.get(worker.scores.remote(replies), timeout=config.timeout)
    except ray.exceptions.GetTimeoutError as error:
        raise TimeoutError(
            f"{reward} did not score {len(replies)} answers within {config.timeout:g} s; give it "
            "more time with --timeout."
        ) from error
    finally:
        ray.kill(worker)
    return scores


def _rewards(
    helpfulness: Sequence[float] | None, safety: Sequence[float] | None, tags: Sequence[bool]
) -> Sequence[float] | None:
    """The paper's combination before whitening, or the score of the only reward model."""
    if helpfulness is None or safety is None:
        return safety if helpfulness is None else helpfulness
    tagged = torch.tensor(tags)
    probable = [torch.tensor(side, dtype=torch.float64).sigmoid() for side in (helpfulness, safety)]
    found: list[float] = logit(composite(probable[0], probable[1], tagged)).tolist()
    return found
