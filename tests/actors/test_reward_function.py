"""Users' own rewards: Python functions and scorers over HTTP, good ones and bad ones."""

import json
import re
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.records import Rollout, Sample
from actors.reward import Asked
from actors.reward_function import (
    Prompts,
    RewardFunction,
    ScorerLimits,
    called,
    load_scorer,
)
from cluster.weights import Version
from llama2.chat import Message, encode_prompt
from llama2.records import Prompt
from llama2.tokenizer import load_tokenizer
from tests.actors.small_tasks import tokenizer_folder

PROMPTS: Prompts = [[{"role": "user", "content": "Who?"}]] * 3
ANSWERS = ["the cat", "a", "in and in"]
QUICK = ScorerLimits(timeout=0.3, retries=1)
FUNCTIONS = """
import time

def length(prompts, answers):
    asked = [prompt[-1]["content"] for prompt in prompts]
    return [len(answer) + len(prompt) / 100 for prompt, answer in zip(asked, answers)]

def few(prompts, answers):
    return [1.0]

def nothing(prompts, answers):
    return None

def words(prompts, answers):
    return answers

def not_a_number(prompts, answers):
    return [1.0, float("nan"), 2.0]

def large(prompts, answers):
    return [0.0, 100.0, 0.0]

def wrong(prompts, answers):
    return answers[0]["text"]

def stuck(prompts, answers):
    time.sleep(5)

value = 3
"""


@pytest.fixture
def module(tmp_path: Path) -> Iterator[Path]:
    """A folder with the functions above as `my_rewards`."""
    (tmp_path / "my_rewards.py").write_text(FUNCTIONS)
    yield tmp_path
    sys.modules.pop("my_rewards", None)
    sys.path[:] = [entry for entry in sys.path if entry != str(tmp_path)]


def refusal(name: str, folder: Path) -> str:
    with pytest.raises(ValueError) as caught:
        called(name, load_scorer(name, folder, QUICK), PROMPTS, ANSWERS)
    message = str(caught.value)
    assert "\n" not in message and name in message
    return message


def test_a_function_is_found_and_called(module: Path) -> None:
    scorer = load_scorer("my_rewards:length", module, QUICK)
    assert called("it", scorer, PROMPTS, ANSWERS) == [7.04, 1.04, 9.04]
    assert called("it", lambda prompts, answers: np.arange(3), PROMPTS, ANSWERS) == [0, 1, 2]


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("few", "gives 1 scores for 3 answers"),
        ("nothing", "gives None where a list of numbers"),
        ("words", r"gives \['the cat', .* where a list of numbers"),
        ("not_a_number", "scores answer 1 of 3 as nan"),
        ("large", r"scores answer 1 of 3 as 100; scores are log-odds, .* to 13\.8: scale them"),
        ("wrong", r"failed \(TypeError: string indices"),
        ("stuck", r"no scores of 3 answers within 0\.3 s"),
    ],
)
def test_bad_functions(module: Path, function: str, said: str) -> None:
    assert re.search(said, refusal(f"my_rewards:{function}", module))


def test_names_that_are_no_scorer(module: Path) -> None:
    for name, said in (
        ("my_rewards", "neither module:function nor an address"),
        ("my_rewards:", "neither module:function nor an address"),
        ("http://", "names no host"),
        ("other_rewards:length", "cannot be imported (ModuleNotFoundError"),
        ("ftp://host/score", "cannot be imported"),
    ):
        assert said in refusal(name, module)
    for attribute in ("shape", "value"):
        with pytest.raises(ValueError, match=f"my_rewards has no function {attribute}"):
            load_scorer(f"my_rewards:{attribute}", module, QUICK)
    with pytest.raises(ValueError, match="timeout must be above 0"):
        ScorerLimits(timeout=0)


class Server:
    """A scorer whose next answers are what the test puts into `answers`: a status, a body, and
    seconds to wait first."""

    def __init__(self) -> None:
        self.answers: list[tuple[int, bytes, float]] = []
        self.asked: list[Any] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                outer.asked.append(json.loads(body))
                status, content, seconds = outer.answers.pop(0)
                time.sleep(seconds)
                self.send_response(status)
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/score"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    found = Server()
    yield found
    found.http.shutdown()
    found.http.server_close()


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long was waited between attempts."""
    from actors import reward_function

    waited: list[float] = []

    class Clock:
        sleep = staticmethod(waited.append)

    monkeypatch.setattr(reward_function, "time", Clock)
    return waited


GOOD = (200, b'{"scores": [1, -2.5, 0]}', 0.0)


def ask(server: Server, limits: ScorerLimits = QUICK) -> list[float]:
    scorer = load_scorer(server.url, Path(), limits)
    return called(server.url, scorer, PROMPTS, ANSWERS)


def test_a_scorer_over_http(server: Server) -> None:
    server.answers = [GOOD]
    assert ask(server) == [1.0, -2.5, 0.0]
    assert server.asked == [{"prompts": PROMPTS, "answers": ANSWERS}]


def test_what_may_pass_is_tried_again(server: Server, pauses: list[float]) -> None:
    server.answers = [(503, b"", 0), (429, b"", 0), (200, b"", 0.6), GOOD]
    assert ask(server, ScorerLimits(timeout=0.3, retries=3)) == [1.0, -2.5, 0.0]
    assert len(server.asked) == 4
    assert pauses == [1.0, 2.0, 4.0]


def test_a_scorer_that_never_answers(server: Server, pauses: list[float]) -> None:
    server.answers = [(200, b"", 20.0)] * 2
    started = time.monotonic()
    with pytest.raises(ValueError) as caught:
        ask(server)
    assert time.monotonic() - started < 10
    assert "could not be had in 2 attempts (it did not answer within 0.3 s)" in str(caught.value)
    server.http.shutdown()
    server.http.server_close()
    with pytest.raises(ValueError, match=r"in 2 attempts \(.*refused"):
        ask(server)


@pytest.mark.parametrize(
    ("status", "body", "said"),
    [
        (404, b"no such\nplace", "refused: it answered 404 Not Found (no such place)"),
        (200, b"<html>", "answers no JSON (<html>)"),
        (200, b"[1, 2, 3]", 'answers [1, 2, 3] where {"scores": [...]} should be'),
        (200, b'{"scores": [1, 2]}', "gives 2 scores for 3 answers"),
        (200, b'{"scores": [1, NaN, 2]}', "scores answer 1 of 3 as nan"),
        (200, b'{"scores": [1, null, 2]}', "gives [1, None, 2] where a list of numbers"),
    ],
)
def test_wrong_answers_are_not_asked_for_again(
    server: Server, status: int, body: bytes, said: str
) -> None:
    server.answers = [(status, body, 0.0)]
    with pytest.raises(ValueError) as caught:
        ask(server)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_worker_reads_samples_as_text(module: Path) -> None:
    folder = tokenizer_folder(module / "tokenizer")
    tokenizer = load_tokenizer(folder)
    prompts = [Prompt((Message("user", text),), False, text) for text in ("Who?", "the cat sees")]
    samples = []
    for number, (prompt, answer) in enumerate(zip(prompts, ("the dog", "in"), strict=True)):
        response = np.array([*tokenizer.encode(answer), tokenizer.eos_id])
        asked = np.array(encode_prompt(tokenizer, prompt.messages))
        samples.append(
            Sample(str(number), asked, response, np.zeros(3, np.float32), Version(1, ""), "stop")
        )
    kind = RewardFunction.__ray_metadata__.modified_class  # type: ignore[attr-defined]
    worker = kind("my_rewards:length", module, QUICK, Asked(folder, tuple(prompts)))
    scores = worker.score(Rollout(tuple(samples), 0.5))
    assert scores.scores == (7.04, 2.12)
    assert scores.ids == ("0", "1")
    assert scores.written == tuple(len(sample.response) for sample in samples)
    assert scores.lengths == tuple(len(sample.tokens) for sample in samples)
    assert scores.generation_seconds == 0.5
