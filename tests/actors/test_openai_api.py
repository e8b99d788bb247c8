"""OpenAI's API, asked by OpenAI's own client."""

import time
from typing import Any

import httpx
import openai
import pytest
import torch
from openai import OpenAI

from llama2 import checkpoint
from llama2.chat import Message
from llama2.generation import Engine, Sampling
from llama2.prompting import sample_seed
from tests.actors.endpoint import CHAT, GREEDY, Endpoint

DRAWN: Any = {"model": "tiny", "temperature": 1, "seed": 5, "max_tokens": 12}


def greedy_tokens(server: Endpoint, prompt: list[int], count: int) -> tuple[list[int], list[float]]:
    """The likeliest tokens by whole forward passes, and their log-probabilities."""
    model = checkpoint.load(server.folder)
    tokens, logprobs = list(prompt), []
    with torch.no_grad():
        for _ in range(count):
            log_probs_V = model(torch.tensor([tokens]))[0, -1].log_softmax(-1)
            tokens.append(int(log_probs_V.argmax()))
            logprobs.append(float(log_probs_V.max()))
            if tokens[-1] in server.prompting.stop_ids:
                break
    return tokens[len(prompt) :], logprobs


def test_completion_is_the_likeliest_text(server: Endpoint, client: OpenAI) -> None:
    prompt = server.prompting.encode_text("the cat")
    tokens, logprobs = greedy_tokens(server, prompt, 12)
    found = client.completions.create(prompt="the cat", logprobs=0, **GREEDY)
    (choice,) = found.choices
    whole = server.prompting.tokenizer.decode([*prompt, *tokens])
    assert "the cat" + choice.text == whole
    assert choice.finish_reason == "length"
    assert (found.object, found.model) == ("text_completion", "tiny")
    assert found.usage is not None
    assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (len(prompt), 12)
    assert found.usage.total_tokens == len(prompt) + 12
    assert choice.logprobs is not None
    assert choice.logprobs.token_logprobs == pytest.approx(logprobs, abs=1e-4)
    assert choice.logprobs.tokens is not None
    assert choice.logprobs.text_offset is not None
    lengths = [len(token) for token in choice.logprobs.tokens]
    assert choice.logprobs.text_offset == [sum(lengths[:i]) for i in range(12)]


def test_token_ids_are_a_prompt_too(server: Endpoint, client: OpenAI) -> None:
    ids = server.prompting.encode_text("the cat")
    texts = [
        client.completions.create(prompt=prompt, **DRAWN).choices[0].text
        for prompt in ("the cat", ids, [ids], ["the cat"])
    ]
    assert len(set(texts)) == 1


def test_chat_is_asked_in_the_chat_format(server: Endpoint, client: OpenAI) -> None:
    turns = [
        {"role": "system", "content": "in"}, {"role": "user", "content": "the cat"},
        {"role": "assistant", "content": "sees"}, {"role": "user", "content": "and"},
    ]  # fmt: skip
    prompt = server.prompting.encode_chat([Message(**turn) for turn in turns])  # type: ignore[arg-type]
    tokens, logprobs = greedy_tokens(server, prompt, 12)
    found = client.chat.completions.create(messages=turns, logprobs=True, **GREEDY)  # type: ignore[call-overload]
    (choice,) = found.choices
    assert choice.message.content == server.prompting.tokenizer.decode(tokens).strip()
    assert choice.message.role == "assistant"
    assert [t.logprob for t in choice.logprobs.content] == pytest.approx(logprobs, abs=1e-4)
    assert found.usage.prompt_tokens == len(prompt)
    for token in choice.logprobs.content:
        assert "\ufffd" in token.token or bytes(token.bytes).decode() == token.token


def test_logprobs_of_drawn_tokens_are_those_of_the_forward_pass(
    server: Endpoint, client: OpenAI
) -> None:
    """At another temperature and truncated too, what is told is the model's own log-probability."""
    prompt = server.prompting.encode_text("who is")
    sent: Any = {**DRAWN, "temperature": 2, "top_p": 0.9, "extra_body": {"top_k": 200}}
    found = client.completions.create(prompt="who is", logprobs=0, **sent).choices[0]
    model = checkpoint.load(server.folder)
    sampling = Sampling(2, 0.9, 200, 12, server.prompting.stop_ids)
    (drawn,) = Engine(model).generate([prompt], sampling, [sample_seed(5, 0)])
    text = server.prompting.tokenizer.decode([*prompt, *drawn.tokens])
    assert "who is" + found.text == text
    with torch.no_grad():
        log_probs_TV = model(torch.tensor([prompt + drawn.tokens]))[0].log_softmax(-1)
    expected = [float(log_probs_TV[len(prompt) - 1 + i, t]) for i, t in enumerate(drawn.tokens)]
    assert found.logprobs is not None
    assert found.logprobs.token_logprobs == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("stop", [None, ["e", " is"], ["\ufffd"]])
@pytest.mark.parametrize("n", [1, 3])
def test_streams_are_the_whole_answers_in_parts(
    client: OpenAI, stop: list[str] | None, n: int
) -> None:
    options: Any = {**DRAWN, "n": n, "max_tokens": 30, "stop": stop}
    whole = client.chat.completions.create(messages=CHAT, logprobs=True, **options)
    chunks = list(
        client.chat.completions.create(
            messages=CHAT, logprobs=True, stream=True, stream_options={"include_usage": True},
            **options,
        )
    )  # fmt: skip
    assert {chunk.id for chunk in chunks} == {chunks[0].id}
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert [chunk.choices[0].delta.role for chunk in chunks[:n]] == ["assistant"] * n
    for choice in whole.choices:
        parts = [c.choices[0] for c in chunks[:-1] if c.choices[0].index == choice.index]
        assert "".join(part.delta.content or "" for part in parts) == choice.message.content
        reasons = [part.finish_reason for part in parts]
        assert reasons == [None] * (len(parts) - 1) + [choice.finish_reason]
        found = [t for part in parts if part.logprobs for t in part.logprobs.content or []]
        assert choice.logprobs is not None
        assert choice.logprobs.content is not None
        assert [t.token for t in found] == [t.token for t in choice.logprobs.content]
        expected = [t.logprob for t in choice.logprobs.content]
        assert [t.logprob for t in found] == pytest.approx(expected, abs=1e-5)
    if stop is None:
        assert len(chunks) > 2 * n + 1


@pytest.mark.parametrize("stop", [None, ["no such text"]])  # whole samples, and pieces
def test_alternatives_are_the_likeliest_by_the_forward_pass(
    server: Endpoint, client: OpenAI, stop: list[str] | None
) -> None:
    decode = server.prompting.tokenizer.decode
    prompt = server.prompting.encode_text("who is")
    sent: Any = {**DRAWN, "prompt": [prompt], "temperature": 2, "logprobs": 3, "stop": stop}
    found = client.completions.create(**sent).choices[0].logprobs
    model = checkpoint.load(server.folder)
    sampling = Sampling(2, max_new_tokens=12, stop_ids=server.prompting.stop_ids)
    (drawn,) = Engine(model).generate([prompt], sampling, [sample_seed(5, 0)])
    with torch.no_grad():
        log_probs_TV = model(torch.tensor([prompt + drawn.tokens]))[0].log_softmax(-1)
    assert found is not None
    assert found.top_logprobs is not None
    assert found.tokens is not None
    assert found.token_logprobs is not None
    for place, (token, told) in enumerate(zip(drawn.tokens, found.top_logprobs, strict=True)):
        best = log_probs_TV[len(prompt) - 1 + place].topk(3)
        before = decode(prompt + drawn.tokens[:place])
        for id, value in zip(best.indices.tolist(), best.values.tolist(), strict=True):
            text = decode([*prompt, *drawn.tokens[:place], id])[len(before) :]
            if id not in server.prompting.stop_ids and "\ufffd" not in before + text:
                assert told[text] >= value - 1e-4  # of two that read alike the likelier is told
        drawn_value = float(log_probs_TV[len(prompt) - 1 + place, token])
        assert told[found.tokens[place]] >= drawn_value - 1e-4
        assert max(told.values()) == pytest.approx(float(best.values[0]), abs=1e-4)
        assert found.token_logprobs[place] == pytest.approx(drawn_value, abs=1e-4)


def test_a_chat_tells_alternatives_best_first(client: OpenAI) -> None:
    sent: Any = {**GREEDY, "messages": CHAT, "logprobs": True, "top_logprobs": 4}
    whole = client.chat.completions.create(**sent).choices[0].logprobs
    chunks = client.chat.completions.create(stream=True, **sent)
    assert whole is not None
    assert whole.content
    for token in whole.content:
        assert len(token.top_logprobs) == 4
        values = [x.logprob for x in token.top_logprobs]
        assert values == sorted(values, reverse=True)
        assert (token.token, token.bytes) == (
            token.top_logprobs[0].token, token.top_logprobs[0].bytes,
        )  # fmt: skip
        assert token.logprob == pytest.approx(values[0], abs=1e-4)
    streamed = [x for c in chunks for ch in c.choices if ch.logprobs for x in ch.logprobs.content]
    assert [[x.token for x in t.top_logprobs] for t in streamed] == [
        [x.token for x in t.top_logprobs] for t in whole.content
    ]


def test_completions_stream_too(client: OpenAI) -> None:
    options: Any = {**DRAWN, "prompt": ["the", "who is"], "n": 2, "logprobs": 1}
    whole = client.completions.create(**options)
    assert [choice.index for choice in whole.choices] == [0, 1, 2, 3]
    chunks = list(client.completions.create(stream=True, **options))
    for choice in whole.choices:
        parts = [c.choices[0] for c in chunks if c.choices[0].index == choice.index]
        assert "".join(part.text for part in parts) == choice.text
        found = [x for p in parts if p.logprobs for x in p.logprobs.token_logprobs or []]
        assert choice.logprobs is not None
        assert found == pytest.approx(choice.logprobs.token_logprobs, abs=1e-5)
        offsets = [x for p in parts if p.logprobs for x in p.logprobs.text_offset or []]
        assert offsets == choice.logprobs.text_offset


def test_samples_differ_and_seeds_repeat_them(client: OpenAI) -> None:
    def texts(**changes: Any) -> list[str]:
        found = client.completions.create(prompt="the", **{**DRAWN, "n": 4, **changes})
        return [choice.text for choice in found.choices]

    assert len(set(texts())) == 4
    assert texts() == texts()
    assert texts(n=2) == texts()[:2]
    assert not set(texts(seed=6)) & set(texts())
    assert texts(seed=None) != texts(seed=None)


def test_a_stop_string_ends_the_answer_and_the_computing(server: Endpoint, client: OpenAI) -> None:
    options: Any = {**GREEDY, "max_tokens": 60, "prompt": "the cat"}
    whole = client.completions.create(**options).choices[0].text
    stop = whole[len(whole) // 2 : len(whole) // 2 + 3]
    server.backend.cancelled.clear()
    found = client.completions.create(**options, stop=stop)
    assert found.choices[0].text == whole[: whole.index(stop)]
    assert found.choices[0].finish_reason == "stop"
    assert found.usage is not None
    assert found.usage.completion_tokens < 60
    assert wait_for(lambda: len(server.backend.cancelled) == 1)


def test_an_answer_ends_at_the_models_own_token(server: Endpoint, client: OpenAI) -> None:
    """Found by drawing until one ends by itself: its last token reads as nothing."""
    for seed in range(40):
        found = client.completions.create(
            prompt="the", logprobs=0, **{**DRAWN, "seed": seed, "temperature": 3, "max_tokens": 80}
        )
        if found.choices[0].finish_reason == "stop":
            break
    (choice,) = found.choices
    assert choice.finish_reason == "stop"
    assert choice.logprobs is not None
    assert choice.logprobs.tokens is not None
    assert choice.logprobs.tokens[-1] == ""
    assert found.usage is not None
    assert len(choice.logprobs.tokens) == found.usage.completion_tokens < 80
    assert "</s>" not in choice.text


def test_models_and_health(server: Endpoint, client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").created == 1234
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt/4")
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}
    server.healthy = False
    assert httpx.get(f"{server.url}/health").status_code == 503
    server.healthy = True


def test_what_asks_for_nothing_is_taken(client: OpenAI) -> None:
    plain = client.chat.completions.create(messages=CHAT, **GREEDY)
    parts: Any = [{"role": "user", "content": [{"type": "text", "text": "the cat"}]}]
    same = client.chat.completions.create(
        messages=parts, model="tiny", temperature=0, max_completion_tokens=12, user="me", n=None,
        frequency_penalty=0, tools=[], response_format={"type": "text"}, stop=None, metadata={},
        top_logprobs=0,
    )  # fmt: skip
    assert same.choices[0].message == plain.choices[0].message
    again = client.chat.completions.create(
        messages=[*CHAT, plain.choices[0].message, {"role": "user", "content": "and"}], **GREEDY
    )
    assert again.usage is not None
    assert plain.usage is not None
    assert again.usage.prompt_tokens > plain.usage.total_tokens


def wait_for(condition: Any, seconds: float = 10) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return bool(condition())


@pytest.mark.parametrize("stream", [True, False])
def test_a_caller_who_goes_away_is_computed_for_no_longer(
    server: Endpoint, client: OpenAI, stream: bool
) -> None:
    server.backend.cancelled.clear()
    server.backend.submitted.clear()
    server.backend.pause = 0.05
    options: Any = {**DRAWN, "prompt": "the", "n": 2, "max_tokens": 80}
    other = {**GREEDY, "prompt": "the cat"}
    try:
        if stream:
            chunks = client.completions.create(stream=True, **options)
            next(chunks)
            chunks.close()
        else:
            with pytest.raises(openai.APITimeoutError):
                client.with_options(timeout=0.5).completions.create(**options)
        alongside = client.completions.create(**other)
        assert wait_for(lambda: len(server.backend.cancelled) == 2)
        assert set(server.backend.cancelled) == set(server.backend.submitted[:2])
        assert wait_for(lambda: not server.backend.busy)
    finally:
        server.backend.pause = 0.0
    assert alongside.choices == client.completions.create(**other).choices
