"""Small models; jobs that stop where a cluster would start; roles that follow a script."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import ray

from jobs import context_distillation, ghost_attention, ppo, prepare, rejection_sampling, training
from jobs.sampling import Cast
from tests.jobs.policy_folder import policy_folder
from tests.jobs.refusals import Folders, SessionEntered, model_folders
from tests.jobs.scripted_roles import Script, number


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return model_folders(tmp_path_factory.mktemp("models"))


@pytest.fixture
def no_cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Where a job would join or start a cluster, it raises `SessionEntered`."""

    @contextmanager
    def entered(config: object) -> Iterator[None]:
        raise SessionEntered
        yield

    for job in (prepare, training, ppo):
        monkeypatch.setattr(job, "session", entered)
    yield
    assert not ray.is_initialized()


@pytest.fixture(scope="module")
def scripted_policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return policy_folder(tmp_path_factory.mktemp("policy"))


@pytest.fixture
def script(scripted_policy: Path, monkeypatch: pytest.MonkeyPatch) -> Script:
    """Roles that a test changes as it likes."""
    found = Script(
        scripted_policy, lambda prompt, t, seed: f"{seed % 7} dogs", number, lambda text: 3.0
    )
    cast = Cast(scripted_policy, None)
    for job in (rejection_sampling, ghost_attention, context_distillation):
        monkeypatch.setattr(job, "sampler", found.sampler)
        monkeypatch.setattr(job, "find_cast", lambda config, scored=True: cast)
    return found
