"""A tiny random model behind OpenAI's API on loopback, without Ray, for tests of its HTTP side."""

import asyncio
import socket
import threading
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import uvicorn

from actors.backend import OwnBackend
from actors.engine_loop import EngineLoop
from actors.generator_config import GeneratorConfig
from actors.openai_api import Api
from actors.records import Piece, Request, Sample
from cluster.weights import Version
from llama2 import checkpoint
from llama2.config import ModelConfig
from llama2.generation import Sampling, Token
from llama2.model import Transformer, initialize
from llama2.prompting import Prompting
from llama2.tokenizer import load_tokenizer
from tests.actors.small_tasks import tokenizer_folder

CONTEXT = 96
CHAT: Any = [{"role": "user", "content": "the cat"}]
GREEDY: Any = {"model": "tiny", "temperature": 0, "max_tokens": 12}


def model_folder(folder: Path) -> Path:
    """A model of 310 tokens whose distributions are uneven enough to be worth comparing."""
    tokenizer = load_tokenizer(tokenizer_folder(folder / "tokenizer"))
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=CONTEXT,
    )  # fmt: skip
    model = Transformer(config)
    initialize(model, config, seed=3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    checkpoint.save(model, folder / "model", tokenizer.files())
    return folder / "model"


class WatchedBackend(OwnBackend):
    """Remembers what was cancelled, and can be slowed down."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, GeneratorConfig(), "float32")
        self.cancelled: list[str] = []
        self.submitted: list[str] = []
        self.pause = 0.0

    def submit(self, id: str, prompt: Sequence[int], sampling: Sampling, seed: int) -> None:
        super().submit(id, prompt, sampling, seed)
        self.submitted.append(id)

    def step(self) -> list[Token]:
        time.sleep(self.pause)
        return super().step()

    def cancel(self, id: str) -> None:
        self.cancelled.append(id)
        super().cancel(id)


class Engine:
    """An engine of this process in the place of `ServedModel`, which fails when it is told to."""

    def __init__(self, loop: EngineLoop, failures: list[Exception]) -> None:
        self.loop, self.failures = loop, failures

    async def stream(self, request: Request, sampling: Sampling) -> AsyncGenerator[Piece, None]:
        self.fail()
        async with aclosing(self.loop.stream(request, sampling)) as pieces:
            async for piece in pieces:
                yield piece
                self.fail()

    async def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Sample]:
        self.fail()
        return await self.loop.answer(requests, sampling)

    def fail(self) -> None:
        if self.failures:
            raise self.failures.pop(0)


@dataclass
class Endpoint:
    """A server, and the switches of what is behind it."""

    url: str
    folder: Path
    prompting: Prompting
    backend: WatchedBackend
    failures: list[Exception] = field(default_factory=list)
    """Raised instead of the next answers; the first at once, others behind one token."""
    healthy: bool = True


@contextmanager
def endpoint(folder: Path, key_digest: bytes | None = None) -> Iterator[Endpoint]:
    """A server in a thread for the time of a `with` block."""
    listener = socket.create_server(("127.0.0.1", 0))
    found = Endpoint(
        f"http://127.0.0.1:{listener.getsockname()[1]}",
        folder,
        Prompting.read(folder),
        WatchedBackend(folder),
    )
    servers: list[uvicorn.Server] = []

    async def serve() -> None:
        engine = EngineLoop(found.backend, Version(-1, ""), stuck_after=60)

        async def healthy() -> bool:
            return found.healthy

        api = Api(
            "tiny", found.prompting, Engine(engine, found.failures), healthy, 1234, key_digest
        )
        config = uvicorn.Config(api.application(), log_level="critical", lifespan="off")
        servers.append(uvicorn.Server(config))
        await servers[0].serve(sockets=[listener])

    thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
    thread.start()
    while not (servers and servers[0].started):
        time.sleep(0.01)
    try:
        yield found
    finally:
        servers[0].should_exit = True
        thread.join(10)
