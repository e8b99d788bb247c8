"""OpenAI's API over a small model, for the tests of what it answers and of what it refuses."""

from collections.abc import Iterator

import pytest
from openai import OpenAI

from tests.actors.endpoint import Endpoint, endpoint, model_folder


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    with endpoint(model_folder(tmp_path_factory.mktemp("endpoint"))) as found:
        yield found


@pytest.fixture(scope="module")
def client(server: Endpoint) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as found:
        yield found
