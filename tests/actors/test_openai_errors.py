"""What OpenAI's API refuses, and how it tells failures: in OpenAI's form."""

import hashlib
import json
import re
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError

from actors.retrying import AnswerChanged
from tests.actors.endpoint import CHAT, CONTEXT, GREEDY, Endpoint, endpoint


def refused(server: Endpoint, path: str, body: Any, **headers: str) -> tuple[int, dict[str, Any]]:
    """Status and error of a raw request."""
    sent = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"content-type": "application/json"} | headers
    answer = httpx.post(server.url + path, content=sent, headers=headers)
    error = answer.json()["error"]
    assert answer.json().keys() == {"error"}
    assert error.keys() == {"message", "type", "param", "code"}
    assert re.fullmatch(r"[^\n]+\.", error["message"])
    return answer.status_code, error


BAD: list[tuple[dict[str, Any], str | None, str]] = [
    ({"model": "gpt-4"}, "model", "There is no model 'gpt-4' here, only 'tiny'."),
    ({"temperature": -1}, "temperature", "greater than or equal to 0"),
    ({"temperature": "hot"}, "temperature", "valid number"),
    ({"top_p": 0}, "top_p", "greater than 0"),
    ({"top_k": 1 << 63}, "top_k", "less than or equal to 2147483647"),
    ({"n": 0}, "n", "greater than or equal to 1"),
    ({"n": 1000}, "n", "less than or equal to 128"),
    ({"prompt": ["the"] * 65, "n": 2}, "n", "more than 128 answers"),
    ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
    ({"max_tokens": 500}, "max_tokens", "ask for at most"),
    ({"max_tokens": 1.5}, "max_tokens", "valid integer"),
    ({"stop": [""]}, "stop", "none of them empty"),
    ({"stop": 3}, "stop", "a string or a list of strings"),
    ({"prompt": ""}, "prompt", "The prompt is empty"),
    ({"prompt": []}, "prompt", "must be a text"),
    ({"prompt": ["a", 1]}, "prompt", "must be a text"),
    ({"prompt": "the \ud800"}, None, "not valid JSON"),
    ({"prompt": [310]}, "prompt", "outside the vocabulary of 310"),
    ({"prompt": [-1]}, "prompt", "outside the vocabulary"),
    ({"prompt": "the cat " * 60}, "prompt", f"context of {CONTEXT}"),
    ({"logprobs": 21}, "logprobs", "less than or equal to 20"),
    ({"echo": True}, "echo", "is not supported here but as false"),
    ({"best_of": 4}, "best_of", "is not supported here"),
    ({"logit_bias": {"5": 1}}, "logit_bias", "is not supported here"),
    ({"presence_penalty": 0.5}, "presence_penalty", "is not supported here but as 0"),
    ({"min_p": 0.1}, "min_p", "is not supported here"),
    ({"stream_options": {"include_usage": True}}, None, "set stream to true"),
    ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x", "not supported"),
]


@pytest.mark.parametrize(("changes", "param", "message"), BAD, ids=[str(b[0])[:40] for b in BAD])
def test_what_is_refused(
    server: Endpoint, changes: dict[str, Any], param: str | None, message: str
) -> None:
    before = len(server.backend.submitted)
    status, error = refused(server, "/v1/completions", {**GREEDY, "prompt": "the", **changes})
    assert status == (404 if changes.get("model") else 400)
    assert error["param"] == param
    assert message in error["message"]
    assert error["type"] == "invalid_request_error"
    assert len(server.backend.submitted) == before


@pytest.mark.parametrize(
    ("messages", "param", "message"),
    [
        ([], "messages", "at least 1 item"),
        ("the cat", "messages", "valid array"),
        ([{"role": "robot", "content": "a"}], "messages.0.role", "'system'"),
        ([{"role": "user"}], "messages.0.content", "is missing"),
        ([{"role": "assistant", "content": "a"}], "messages", "take turns"),
        ([*CHAT, {"role": "assistant", "content": "a"}], "messages", "end with a user message"),
        ([{"role": "user", "content": " "}], "messages", "is empty"),
        ([{"role": "user", "content": "[/INST]"}], "messages", "the tag [/INST]"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "messages.0.content", "type text"),
        ([{"role": "user", "content": "a", "name": "b"}], "messages.0.name", "not supported"),
        ([{"role": "user", "content": "the cat " * 60}], "messages", f"context of {CONTEXT}"),
    ],
)
def test_dialogues_that_are_refused(
    server: Endpoint, messages: Any, param: str, message: str
) -> None:
    status, error = refused(server, "/v1/chat/completions", {**GREEDY, "messages": messages})
    assert (status, error["param"]) == (400, param)
    assert message in error["message"]


def test_chat_parameters_that_are_refused(server: Endpoint) -> None:
    for changes, message in (
        ({"tools": [{"type": "function"}]}, "tools is not supported"),
        ({"top_logprobs": 3}, "set logprobs to true"),
        ({"top_logprobs": 21, "logprobs": True}, "less than or equal to 20"),
        ({"response_format": {"type": "json_object"}}, "response_format is not supported"),
        ({"max_completion_tokens": 3}, "differ; give one of them"),
    ):
        body = {**GREEDY, "messages": CHAT, **changes}
        status, error = refused(server, "/v1/chat/completions", body)
        assert status == 400
        assert message in error["message"]


def test_bodies_that_are_none(server: Endpoint) -> None:
    path = "/v1/completions"
    status, error = refused(server, path, b'{"model": ')
    assert (status, error["code"]) == (400, "invalid_json")
    assert refused(server, path, b"\xff\xfe")[0] == 400
    assert "must be a JSON object" in refused(server, path, b"[1]")[1]["message"]
    assert refused(server, path, {"model": "tiny"})[1]["param"] == "prompt"
    status, error = refused(server, path, {}, **{"content-type": "text/plain"})
    assert (status, "application/json" in error["message"]) == (400, True)
    status, error = refused(server, path, b'{"prompt": "' + b"a" * (9 << 20) + b'"}')
    assert (status, error["code"]) == (413, "request_too_large")


def test_routes_that_are_none(server: Endpoint) -> None:
    for path in ("/", "/v1", "/v1/embeddings", "/v1/completions/1"):
        status, error = refused(server, path, {})
        assert (status, error["code"]) == (404, "not_found")
        assert path in error["message"]
    answer = httpx.get(f"{server.url}/v1/completions")
    assert answer.status_code == 405
    assert "does not take GET" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("failure", "status", "kind"),
    [
        (BackPressureError(1, 1), 429, "rate_limit_error"),
        (RayActorError(), 503, "server_error"),
        (AnswerChanged(), 503, "server_error"),
        (ValueError("The prompt needs more memory than there is; shorten it."), 400, "invalid"),
        (RuntimeError("secret"), 500, "server_error"),
    ],
)
def test_failures_of_generators(
    server: Endpoint, client: OpenAI, failure: Exception, status: int, kind: str
) -> None:
    for stream in (False, True):
        server.failures.append(failure)
        body = {**GREEDY, "prompt": "the", "stream": stream}
        found, error = refused(server, "/v1/completions", body)
        assert found == status
        assert kind in error["type"]
        assert "secret" not in error["message"]


def test_a_failure_in_mid_stream_is_its_last_event(server: Endpoint, client: OpenAI) -> None:
    server.backend.pause = 0.02
    stream = client.completions.create(prompt="the", stream=True, **{**GREEDY, "max_tokens": 60})
    seen = [next(stream).choices[0].text]
    server.failures.append(RayActorError())
    with pytest.raises(openai.APIError, match="No generator can answer now"):
        seen += [chunk.choices[0].text for chunk in stream]
    server.backend.pause = 0.0
    assert seen
    assert client.completions.create(prompt="the", **GREEDY).choices[0].text


def test_an_api_key(server: Endpoint) -> None:
    digest = hashlib.sha256(b"right").digest()
    with endpoint(server.folder, digest) as guarded:
        with OpenAI(base_url=f"{guarded.url}/v1", api_key="right", max_retries=0) as found:
            assert found.completions.create(prompt="the", **GREEDY).choices
            assert [model.id for model in found.models.list()] == ["tiny"]
        with OpenAI(base_url=f"{guarded.url}/v1", api_key="wrong", max_retries=0) as found:
            with pytest.raises(openai.AuthenticationError) as caught:
                found.models.list()
            assert caught.value.code == "invalid_api_key"
            with pytest.raises(openai.AuthenticationError):
                found.chat.completions.create(messages=CHAT, **GREEDY)
        assert refused(guarded, "/v1/completions", {})[0] == 401
        basic = refused(guarded, "/v1/completions", {}, authorization="Basic right")
        assert basic[0] == 401
        assert httpx.get(f"{guarded.url}/health").status_code == 200
