"""An HTTP application that answers as OpenAI's API does, over generators of any kind."""

import asyncio
import hashlib
import hmac
import json
import logging
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from actors.openai_answers import Answer, Format, Part, Written
from actors.openai_errors import ApiError, from_failure
from actors.openai_requests import Asked, ChatBody, CompletionBody, parse
from actors.records import Piece, Request, Sample
from llama2.generation import Sampling
from llama2.prompting import Prompting, sample_seed

logger = logging.getLogger(__name__)

Handler = Callable[[HttpRequest], Awaitable[Response]]
T = TypeVar("T")
LARGEST_BODY = 8 << 20


class Generators(Protocol):
    """What computes the answers: `ServedModel`, or anything like it."""

    def stream(self, request: Request, sampling: Sampling) -> AsyncGenerator[Piece, None]:
        """One answer in pieces; closing the stream cancels the request."""

    async def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Sample]:
        """Whole answers; cancelling the call cancels the requests."""


@dataclass(frozen=True)
class Api:
    """One model behind OpenAI's endpoints.

    key_digest: SHA-256 of the key that callers must give; None asks for no key. healthy: whether
    generators are there to answer.
    """

    name: str
    prompting: Prompting
    generators: Generators
    healthy: Callable[[], Awaitable[bool]]
    created: int
    key_digest: bytes | None = None

    def application(self) -> Starlette:
        """The routes, as an ASGI application."""
        return Starlette(
            routes=[
                Route("/health", self._health),
                Route("/v1/models", self._guarded(self._models)),
                Route("/v1/models/{name:path}", self._guarded(self._model)),
                Route("/v1/completions", self._guarded(self._completions), methods=["POST"]),
                Route("/v1/chat/completions", self._guarded(self._chat), methods=["POST"]),
            ],
            exception_handlers={
                ApiError: _refuse,
                HTTPException: _refuse_http,
                Exception: _fail,
            },
        )

    def _guarded(self, handler: Handler) -> Handler:
        async def guarded(request: HttpRequest) -> Response:
            self._check_key(request)
            return await handler(request)

        return guarded

    def _check_key(self, request: HttpRequest) -> None:
        if self.key_digest is None:
            return
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        digest = hashlib.sha256(key.strip().encode()).digest()
        # Digests are compared in constant time, so that an answer's delay tells nothing of the key.
        if scheme.lower() != "bearer" or not hmac.compare_digest(digest, self.key_digest):
            raise ApiError(
                401,
                "The API key is missing or wrong; send it as 'Authorization: Bearer KEY'.",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    async def _health(self, request: HttpRequest) -> Response:
        if await self.healthy():
            return JSONResponse({"status": "ok"})
        raise ApiError(503, "No generator is ready to answer.", code="service_unavailable")

    async def _models(self, request: HttpRequest) -> Response:
        return JSONResponse({"object": "list", "data": [self._card]})

    async def _model(self, request: HttpRequest) -> Response:
        self._check_name(request.path_params["name"])
        return JSONResponse(self._card)

    @property
    def _card(self) -> dict[str, Any]:
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "local",
            "max_model_len": self.prompting.context,
        }

    def _check_name(self, name: str) -> None:
        if name != self.name:
            raise ApiError(
                404,
                f"There is no model {name!r} here, only {self.name!r}.",
                "model",
                "model_not_found",
            )

    async def _completions(self, request: HttpRequest) -> Response:
        return await self._respond(request, CompletionBody)

    async def _chat(self, request: HttpRequest) -> Response:
        return await self._respond(request, ChatBody)

    async def _respond(
        self, request: HttpRequest, kind: type[CompletionBody] | type[ChatBody]
    ) -> Response:
        body = parse(await _body(request), kind)
        self._check_name(body.model)
        asked = body.read(self.prompting)
        form = Format(asked, self.name)
        if not asked.stream:
            answers = await _while_connected(request, self._collect(asked))
            return JSONResponse(form.whole(answers))
        parts = self._parts(asked)
        # A refusal comes before the first part, and still has a status of its own then.
        first = await _while_connected(request, anext(parts))
        return StreamingResponse(
            _events(form, first, parts),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
        )

    async def _collect(self, asked: Asked) -> list[Written]:
        requests = _requests(asked)
        answers = [Written() for _ in requests]
        if not asked.stop:  # each comes as one message, which costs far less than its tokens do
            samples = await self.generators.generate(requests, asked.sampling)
            for choice, sample in enumerate(samples):
                answer = Answer(choice, asked, self.prompting)
                answers[choice].add(answer.add(_whole(sample)))
            return answers
        async with aclosing(self._parts(asked)) as parts:
            async for part in parts:
                answers[part.choice].add(part)
        return answers

    async def _parts(self, asked: Asked) -> AsyncGenerator[Part, None]:
        """Parts of all answers as they come. Closing cancels those that are not finished."""
        found: asyncio.Queue[Part | Exception] = asyncio.Queue()

        async def write(choice: int, request: Request) -> None:
            answer = Answer(choice, asked, self.prompting)
            try:
                pieces = self.generators.stream(request, asked.sampling)
                async with aclosing(pieces):
                    async for piece in pieces:
                        part = answer.add(piece)
                        await found.put(part)
                        if part.finish_reason is not None:
                            return
                raise AssertionError(f"Answer {request.id} ended without a reason.")
            except Exception as error:
                await found.put(error)

        tasks = [asyncio.create_task(write(i, r)) for i, r in enumerate(_requests(asked))]
        try:
            unfinished = len(tasks)
            while unfinished:
                part = await found.get()
                if isinstance(part, Exception):
                    raise part
                unfinished -= part.finish_reason is not None
                yield part
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


def _requests(asked: Asked) -> list[Request]:
    """One for each answer, in the order of their choices."""
    name = uuid.uuid4().hex
    prompts = [np.array(prompt, dtype=np.int64) for prompt in asked.prompts for _ in range(asked.n)]
    return [
        Request(f"{name}-{choice}", prompt, sample_seed(asked.seed, choice))
        for choice, prompt in enumerate(prompts)
    ]


def _whole(sample: Sample) -> Piece:
    return Piece(
        tuple(sample.response.tolist()),
        tuple(sample.logprobs.tolist()),
        sample.finish_reason,
        sample.version,
        sample.alternatives,
    )


async def _events(
    form: Format, first: Part, parts: AsyncGenerator[Part, None]
) -> AsyncIterator[str]:
    """Server-sent events of a stream. What fails after it began is its last event."""
    drawn = len(first.tokens)
    async with aclosing(parts):
        try:
            for chunk in [*form.opening(), *form.parts(first)]:
                yield _event(chunk)
            async for part in parts:
                drawn += len(part.tokens)
                for chunk in form.parts(part):
                    yield _event(chunk)
        except Exception as error:
            yield _event(_as_refusal(error).body)
            return
    for chunk in form.closing(drawn):
        yield _event(chunk)
    yield "data: [DONE]\n\n"


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}\n\n"


async def _body(request: HttpRequest) -> bytes:
    """The whole body. Raises `ApiError` where it is too large or does not claim to be JSON."""
    # A page in a browser may send other types to a local server without asking.
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        raise ApiError(
            400, "The body must be JSON; send the header 'Content-Type: application/json'."
        )
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > LARGEST_BODY:
            raise ApiError(
                413,
                f"The body is larger than {LARGEST_BODY >> 20} MiB; send less at a time.",
                code="request_too_large",
                headers={"Connection": "close"},
            )
    return bytes(body)


async def _while_connected(request: HttpRequest, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the caller goes away."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, watching = asyncio.create_task(work), asyncio.create_task(gone())
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            # Nobody reads this; it ends the request.
            raise ApiError(499, "The caller went away.")
        return working.result()
    except Exception as error:
        raise _as_refusal(error) from error
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


def _as_refusal(error: Exception) -> ApiError:
    found = from_failure(error)
    if found is None:
        logger.error("A request failed.", exc_info=error)
        return ApiError(500, "The server failed; its log says why.", code="internal_error")
    return found


async def _refuse(request: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return JSONResponse(error.body, error.status, error.headers)


async def _refuse_http(request: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    told = {
        404: f"There is no {request.url.path} here; see /v1/models.",
        405: f"{request.url.path} does not take {request.method}.",
    }
    message = told.get(error.status_code, f"{error.detail}.")
    code = "not_found" if error.status_code == 404 else None
    body = ApiError(error.status_code, message, code=code).body
    return JSONResponse(body, error.status_code, error.headers)


async def _fail(request: HttpRequest, error: Exception) -> Response:
    """The exception itself goes to the server's log."""
    return JSONResponse(
        ApiError(500, "The server failed; its log says why.", code="internal_error").body, 500
    )
