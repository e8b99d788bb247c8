"""A user's own reward in a reward model's place: a Python function, or a scorer asked over HTTP.

Both get prompts, each a list of messages ({"role": ..., "content": ...}), and answers as texts, and
give a score for each answer: the higher the better, in log-odds as a reward model's (0 is neutral,
sizes beyond `LARGEST_SCORE` are refused).

    def brief(prompts: list[list[dict[str, str]]], answers: list[str]) -> list[float]:
        return [1.0 - len(answer) / 200 for answer in answers]

Over HTTP, the request's body is {"prompts": [...], "answers": [...]} and the answer's
{"scores": [...]}, as JSON.
"""

import http.client
import importlib
import json
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import ray

from actors.records import Rollout, Scores
from actors.reward import Asked, scores_of
from llama2.rewards import LARGEST_SCORE

T = TypeVar("T")
Prompts = list[list[dict[str, str]]]
Scorer = Callable[[Prompts, list[str]], Sequence[float]]
LONGEST_PAUSE = 30.0
TRY_AGAIN = (408, 425, 429)  # and 500 to 599: the scorer may well answer later
EXCERPT = 200


@dataclass(frozen=True)
class ScorerLimits:
    """How long a user's own reward is waited for."""

    timeout: float = 60.0
    """Seconds that one call may take."""
    retries: int = 3
    """Further attempts to reach a scorer over HTTP, after 1, 2, 4, ... seconds."""

    def __post_init__(self) -> None:
        if not self.timeout > 0 or self.retries < 0:
            raise ValueError("A scorer's timeout must be above 0, and its retries not negative.")


@ray.remote(max_restarts=-1, max_task_retries=3)
class RewardFunction:
    """Scores as a `Reward` worker does, by a function named as `load_scorer` takes it."""

    def __init__(self, name: str, folder: Path, limits: ScorerLimits, asked: Asked) -> None:
        self._name, self._limits = name, limits
        self._scorer = load_scorer(name, folder, limits)
        self._transcripts = asked.transcripts()

    def score(self, rollout: Rollout) -> Scores:
        """One score for each answer. Raises `ValueError` for anything else, or none in time."""
        read = self._transcripts
        prompts = [
            [{"role": m.role, "content": m.content} for m in read.prompt(sample.prompt)]
            for sample in rollout.samples
        ]
        answers = [read.answer(sample.response) for sample in rollout.samples]
        found = called(self._name, self._scorer, prompts, answers)
        return scores_of(rollout, found, f"The reward {self._name}")


def load_scorer(name: str, folder: Path, limits: ScorerLimits) -> Scorer:
    """The scorer of that name: "module:function", the module being looked for in `folder` too, or
    an address that begins with http:// or https://.

    Raises `ValueError` where it is neither, or there is no such module or function.
    """
    if name.startswith(("http://", "https://")):
        if not urllib.parse.urlsplit(name).hostname:
            raise ValueError(f"The reward {name!r} names no host; give a whole address.")
        return lambda prompts, answers: _ask(name, limits, prompts, answers)
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute:
        raise ValueError(
            f"The reward {name!r} is neither module:function nor an address with http:// or "
            "https://; name one of them."
        )
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise ValueError(
            f"The module of the reward {name!r} cannot be imported ({_told(error)}); start the job "
            f"in its folder ({folder} was looked in), or install it."
        ) from error
    function = getattr(module, attribute, None)
    if not callable(function):
        raise ValueError(f"The module {module_name} has no function {attribute}; name another.")

    def scorer(prompts: Prompts, answers: list[str]) -> Sequence[float]:
        try:
            return _within(limits.timeout, lambda: function(prompts, answers))
        except _TooLate:
            raise ValueError(
                f"The reward {name} gave no scores of {len(answers)} answers within "
                f"{limits.timeout:g} s; make it faster, or raise --scorer.timeout."
            ) from None
        except Exception as error:
            raise ValueError(f"The reward {name} failed ({_told(error)}); correct it.") from error

    return scorer


def called(name: str, scorer: Scorer, prompts: Prompts, answers: list[str]) -> list[float]:
    """What a scorer says of these answers. Raises `ValueError` unless it is one number for each,
    finite and not beyond `LARGEST_SCORE`."""
    found: Any = scorer(prompts, answers)
    try:
        values = [float(value) for value in found]
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"The reward {name} gives {_shortened(repr(found))} where a list of numbers should be."
        ) from error
    if len(values) != len(answers):
        raise ValueError(
            f"The reward {name} gives {len(values)} scores for {len(answers)} answers; give one "
            "for each, in their order."
        )
    for number, value in enumerate(values):
        if not abs(value) <= LARGEST_SCORE:  # NaN too
            raise ValueError(
                f"The reward {name} scores answer {number} of {len(answers)} as {value:g}; scores "
                f"are log-odds, numbers from -{LARGEST_SCORE:.1f} to {LARGEST_SCORE:.1f}: scale "
                "them."
            )
    return values


class _TooLate(Exception):
    """A call took longer than it may."""


def _within(seconds: float, work: Callable[[], T]) -> T:
    """The result of `work`. What takes longer is left behind, since a thread cannot be stopped."""
    found: list[T] = []
    errors: list[Exception] = []

    def run() -> None:
        try:
            found.append(work())
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not found:
        raise _TooLate
    return found[0]


def _ask(url: str, limits: ScorerLimits, prompts: Prompts, answers: list[str]) -> Sequence[float]:
    body = json.dumps({"prompts": prompts, "answers": answers}).encode()
    problem = ""
    for attempt in range(limits.retries + 1):
        if attempt:
            time.sleep(min(2.0 ** (attempt - 1), LONGEST_PAUSE))
        try:
            # A whole attempt is limited: the socket's own limit is one for each read.
            return _scores(url, _within(limits.timeout, lambda: _post(url, body, limits.timeout)))
        except urllib.error.HTTPError as error:
            problem = f"it answered {error.code} {error.reason}"
            if error.code < 500 and error.code not in TRY_AGAIN:
                said = _shortened(error.read().decode("utf-8", "replace"))
                raise ValueError(f"The reward {url} refused: {problem} ({said}).") from error
        except (_TooLate, TimeoutError):
            problem = f"it did not answer within {limits.timeout:g} s"
        except (OSError, http.client.HTTPException) as error:
            problem = _told(error)
    raise ValueError(
        f"The reward {url} could not be had in {limits.retries + 1} attempts ({problem}); start "
        "the scorer, or raise --scorer.timeout or --scorer.retries."
    )


def _post(url: str, body: bytes, timeout: float) -> bytes:
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=timeout) as answer:
        content: bytes = answer.read()
    return content


def _scores(url: str, content: bytes) -> Sequence[float]:
    try:
        answer = json.loads(content)
    except ValueError as error:
        said = _shortened(content.decode("utf-8", "replace"))
        raise ValueError(f"The reward {url} answers no JSON ({said}); correct it.") from error
    if not isinstance(answer, dict) or not isinstance(answer.get("scores"), list):
        said = _shortened(json.dumps(answer))
        raise ValueError(
            f'The reward {url} answers {said} where {{"scores": [...]}} should be; correct it.'
        )
    scores: list[float] = answer["scores"]
    return scores


def _told(error: Exception) -> str:
    return _shortened(f"{type(error).__name__}: {error}")


def _shortened(text: str) -> str:
    """On one line, and not too long for one."""
    text = " ".join(text.split())
    return text if len(text) <= EXCERPT else text[:EXCERPT] + "..."
