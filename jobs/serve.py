"""A model as an HTTP endpoint that speaks OpenAI's API.

python jobs/serve.py --model runs/tiny-ppo/model
curl http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' \\
    -d '{"model": "tiny-ppo", "prompt": "The"}'
"""

import asyncio
import hashlib
import ipaddress
import os
import signal
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import uvicorn
from ray import serve
from ray.serve.schema import ReplicaState
from starlette.applications import Starlette

from actors.generator import check_backend, deploy
from actors.openai_api import Api
from actors.served_model import ServedModel
from cluster.placement import check_capacity
from cluster.session import session
from jobs import options
from jobs.serve_config import ServeConfig
from llama2.prompting import Prompting

KEY_VARIABLE = "LLAMA2_API_KEY"


def main(config: ServeConfig) -> None:
    """Serve a model over HTTP as OpenAI's API does, until it is interrupted (SIGINT, SIGTERM)."""
    prompting = Prompting.read(config.model)
    check_backend(config.generator)
    digest = key_digest(config)
    with listening(config, protected=digest is not None) as listener, session(config.cluster):
        check_capacity({"generator": replace(config.generator, count=config.generator.most)})
        name = f"serve-{uuid.uuid4().hex[:8]}"
        try:
            handle = deploy(name, config.model.absolute(), None, config.precision, config.generator)
            api = Api(
                name=config.name,
                prompting=prompting,
                generators=ServedModel(handle),
                healthy=partial(has_replicas, name),
                created=int(time.time()),
                key_digest=digest,
            )
            address, port = listener.getsockname()[:2]
            host = f"[{address}]" if ":" in address else address
            print(f"Serving {config.name} at http://{host}:{port}/v1", flush=True)
            answer_until_told(api.application(), listener, config.drain_seconds)
        finally:
            serve.delete(name)
    print("Ended.", flush=True)


def key_digest(config: ServeConfig) -> bytes | None:
    """SHA-256 of the key that callers must send, so that the key itself is kept nowhere; None for
    no key. Raises `ValueError` or `FileNotFoundError` for a file without one."""
    key = os.environ.get(KEY_VARIABLE, "")
    if config.api_key_file is not None:
        if not config.api_key_file.is_file():
            raise FileNotFoundError(
                f"There is no file {config.api_key_file}; --api-key-file names one with the key."
            )
        key = config.api_key_file.read_text()
        if not key.strip():
            raise ValueError(f"{config.api_key_file} is empty; write the key into it.")
    return hashlib.sha256(key.strip().encode()).digest() if key.strip() else None


@contextmanager
def listening(config: ServeConfig, protected: bool) -> Iterator[socket.socket]:
    """The port, taken before anything starts; connections are accepted once there is an answer.

    Raises `ValueError` where it cannot be had, or would be open to others without a key.
    """
    try:
        found = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        raise ValueError(
            f"The host {config.host} is unknown ({error.strerror}); give an address of this "
            "machine, such as 127.0.0.1."
        ) from error
    family, _, _, _, address = found[0]
    if not ipaddress.ip_address(address[0]).is_loopback and not (protected or config.without_key):
        raise ValueError(
            f"Listening on {config.host} lets others use the model; set a key with --api-key-file "
            f"or {KEY_VARIABLE}, or say --without-key if that is meant."
        )
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
        except OSError as error:
            raise ValueError(
                f"Cannot listen on {config.host} port {config.port} ({error.strerror}); choose "
                "another --port or --host."
            ) from error
        yield listener


async def has_replicas(name: str) -> bool:
    """Whether a replica of the application runs."""
    status = await asyncio.to_thread(serve.status)
    application = status.applications.get(name)
    return application is not None and any(
        found.replica_states.get(ReplicaState.RUNNING, 0)
        for found in application.deployments.values()
    )


def answer_until_told(application: Starlette, listener: socket.socket, drain: float) -> None:
    """Answer requests until SIGINT or SIGTERM; then no new ones, and those under way for at most
    `drain` seconds."""
    server = uvicorn.Server(
        uvicorn.Config(
            application,
            log_level="warning",
            access_log=False,
            lifespan="off",
            timeout_graceful_shutdown=max(1, round(drain)),
        )
    )
    # Once it has drained, uvicorn raises the signal again, which then has nothing left to end.
    before = {
        name: signal.signal(name, lambda *_: None) for name in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        server.run(sockets=[listener])
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)


if __name__ == "__main__":
    options.run(main, ServeConfig)
