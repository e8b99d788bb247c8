"""What tests of several folders share."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed


@contextmanager
def group(folder: Path) -> Iterator[None]:
    """This process as the only rank of a gloo group, as training loops want one.

    It computes with one thread meanwhile, as workers do that share a machine.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    os.environ |= {"LOCAL_RANK": "0", "DS_ACCELERATOR": "cpu"}
    address = f"file://{folder}/store"
    torch.distributed.init_process_group("gloo", init_method=address, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def group_of_one(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A group to the end of the session, since DeepSpeed holds on to the one that it saw first."""
    with group(tmp_path_factory.mktemp("group")):
        yield


@pytest.fixture
def threads() -> Iterator[None]:
    """Gives this process back its number of torch's threads, which a test may change."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
