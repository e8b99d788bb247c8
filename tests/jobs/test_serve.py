"""The endpoint as a job: what it refuses to start with, and the whole of it on Ray Serve."""

import json
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import ray
from openai import OpenAI

from cluster.session import ClusterConfig, session
from jobs import generate, options, serve
from jobs.generate_config import GenerateConfig
from jobs.serve_config import ServeConfig
from tests.actors.endpoint import model_folder

KEY = "a-key-of-the-test"
SHAPE: Any = {"model": "tiny", "max_tokens": 20}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("model"))


def error(
    arguments: list[Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> str:
    """The only line of a job that ends before it starts anything."""
    monkeypatch.setattr(sys, "argv", ["jobs/serve.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        options.run(serve.main, ServeConfig)
    assert stop.value.code == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert re.fullmatch(r"error: [^\n]+\n", said.err)
    assert not ray.is_initialized()
    return said.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--host", "0.0.0.0"], "set a key with --api-key-file or LLAMA2_API_KEY, or say --wit"),
        (["--host", "::"], "lets others use the model"),
        (["--host", "no.such.host.invalid"], "The host no.such.host.invalid is unknown"),
        (["--host", "192.0.2.7", "--without-key"], "Cannot listen on 192.0.2.7 port 8000"),
        (["--port", "70000"], "port must be between 0 and 65535"),
        (["--api-key-file", "gone"], "There is no file gone"),
        (["--api-key-file", "EMPTY"], "is empty; write the key into it"),
        (["--model", "gone"], "gone"),
        (["--generator.backend", "vllm"], "not installed here"),
        (["--drain-seconds", "-1"], "drain_seconds must not be negative"),
        (["--colour", "red"], "--colour"),
    ],
)
def test_what_it_does_not_start_with(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch, arguments: list[str], said: str,
) -> None:  # fmt: skip
    (tmp_path / "empty").write_text("\n")
    given = [tmp_path / "empty" if a == "EMPTY" else a for a in arguments]
    assert said in error(["--model", model, *given], capsys, monkeypatch)


def test_a_taken_port(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        found = error(["--model", model, "--port", port], capsys, monkeypatch)
    assert f"Cannot listen on 127.0.0.1 port {port} (Address already in use)" in found


def test_a_key_opens_the_network_and_is_kept_nowhere(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "key").write_text(f"{KEY}\n")
    config = ServeConfig(model, host="0.0.0.0", port=0, api_key_file=tmp_path / "key")
    digest = serve.key_digest(config)
    with serve.listening(config, protected=digest is not None) as listener:
        assert listener.getsockname()[0] == "0.0.0.0"
    monkeypatch.setenv(serve.KEY_VARIABLE, KEY)
    assert serve.key_digest(ServeConfig(model)) == digest
    assert KEY not in repr(config)
    assert digest is not None
    assert KEY.encode() not in digest


def test_names(tmp_path: Path) -> None:
    assert ServeConfig(tmp_path / "runs" / "my-sft" / "model").name == "my-sft"
    assert ServeConfig(tmp_path / "Llama-2-7b").name == "Llama-2-7b"
    assert ServeConfig(tmp_path / "model", model_name="chat").name == "chat"


@pytest.fixture(scope="module")
def local_cluster() -> Iterator[None]:
    with session(ClusterConfig(local_cpus=2)):
        yield


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


class Caller(threading.Thread):
    """What happens while the job, which wants the main thread for its signals, serves."""

    def __init__(self, url: str) -> None:
        super().__init__(daemon=True)
        self.url = url
        self.found: dict[str, Any] = {}
        self.failure: BaseException | None = None

    def run(self) -> None:
        try:
            self._ask()
        except BaseException as failure:
            self.failure = failure
            os.kill(os.getpid(), signal.SIGTERM)

    def _ask(self) -> None:
        for _ in range(600):
            try:
                self.found["health"] = httpx.get(f"{self.url}/health").json()
                break
            except httpx.ConnectError:
                time.sleep(0.1)
        with OpenAI(base_url=f"{self.url}/v1", api_key=KEY, max_retries=0) as client:
            try:
                client.with_options(api_key="wrong").models.list()
            except openai.AuthenticationError as error:
                self.found["refused"] = error.code
            self.found["greedy"] = client.completions.create(
                prompt="the cat", temperature=0, **SHAPE
            )
            self.found["drawn"] = client.completions.create(prompt="the", n=3, seed=7, **SHAPE)
            whole = client.chat.completions.create(
                messages=[{"role": "user", "content": "who"}], seed=2, **SHAPE
            )
            parts = client.chat.completions.create(
                messages=[{"role": "user", "content": "who"}], seed=2, stream=True, **SHAPE
            )
            self.found["chat"] = whole.choices[0].message.content
            self.found["parts"] = "".join(p.choices[0].delta.content or "" for p in parts)
            # Told to end in mid-answer, the job lets the answer come to its end.
            last = client.completions.create(
                prompt="the cat", temperature=0, stream=True,
                **{**SHAPE, "max_tokens": 80},
            )  # fmt: skip
            seen = [next(last)]
            os.kill(os.getpid(), signal.SIGTERM)
            seen += list(last)
            self.found["last"] = "".join(part.choices[0].text for part in seen)
            self.found["reason"] = seen[-1].choices[0].finish_reason


def test_the_whole_job_on_ray_serve(
    model: Path, tmp_path: Path, local_cluster: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """Asked by OpenAI's client, and told to end by a signal; and the same model, the same answers,
    from a file by `jobs/generate.py`, in this process and over replicas."""
    (tmp_path / "key").write_text(KEY)
    port = free_port()
    caller = Caller(f"http://127.0.0.1:{port}")
    caller.start()
    serve.main(
        options.parse(
            ["--model", str(model), "--port", str(port), "--model-name", "tiny", "--precision",
             "float32", "--api-key-file", str(tmp_path / "key"), "--generator.threads", "1"],
            ServeConfig,
            "",
        )
    )  # fmt: skip
    caller.join(30)
    assert caller.failure is None
    found = caller.found
    assert found["health"] == {"status": "ok"}
    assert found["refused"] == "invalid_api_key"
    assert len({choice.text for choice in found["drawn"].choices}) == 3
    assert found["chat"] == found["parts"]
    assert found["reason"] in ("stop", "length")
    assert found["last"].startswith(found["greedy"].choices[0].text)
    said = capsys.readouterr()
    assert f"Serving tiny at {caller.url}/v1" in said.out
    assert KEY not in said.out + said.err
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{caller.url}/health")

    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps({"prompt": f"the cat {i}"}) + "\n" for i in range(20)))
    answers = []
    for where in ("here", "cluster"):
        output = tmp_path / f"{where}.jsonl"
        generate.main(
            options.parse(
                ["--model", str(model), "--input", str(source), "--output", str(output),
                 "--num-samples", "2", "--where", where, "--max-new-tokens", "20", "--precision",
                 "float32", "--generator.count", "2", "--generator.threads", "1"],
                GenerateConfig,
                "",
            )
        )  # fmt: skip
        answers.append([json.loads(line) for line in output.read_text().splitlines()])
    here, cluster = answers
    assert [line["id"] for line in here] == [f"{i}/{s}" for i in range(20) for s in range(2)]
    assert [line | {"logprob": 0} for line in cluster] == [line | {"logprob": 0} for line in here]
    assert [line["logprob"] for line in cluster] == pytest.approx(
        [line["logprob"] for line in here], abs=1e-3
    )
