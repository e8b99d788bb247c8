"""Publishing on a cluster of two nodes: who has which weights, and what happens when one dies."""

import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from ray._private import internal_api
from ray.cluster_utils import Cluster
from ray.exceptions import GetTimeoutError, RayActorError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from torch import nn

from cluster import loading, publishing, weights
from cluster.loading import Loader
from cluster.publishing import PublishError
from cluster.session import WORKER_ENVIRONMENT
from cluster.shared_memory import Lease, Segment
from cluster.weights import Fenced, Receipt, Shelf, Version, WeightStore

MEGABYTES = 24
"""Of the weights; a node's object store holds 100, so that none may be left over for long."""


def net(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(*(nn.Linear(1000, 1000) for _ in range(MEGABYTES // 4)))


@ray.remote(num_cpus=0, max_concurrency=2)
class Publisher:
    """In the place of a learner's first worker, whose loop runs beside its actor's calls."""

    def __init__(self, store: Any) -> None:
        self._store, self._attempt = store, publishing.enter(store, 20)

    def publish(self, number: int, seed: int, pause: Path | None = None) -> Version:
        """Publish; between two buckets wait until there is no file `pause`."""

        def buckets() -> Iterator[list[tuple[str, torch.Tensor]]]:
            named = list(net(seed).state_dict().items())
            for start in range(0, len(named), 2):
                yield named[start : start + 2]
                while pause is not None and pause.exists():
                    time.sleep(0.01)

        return publishing.put(buckets(), number, self._attempt, self._store, 20)

    def pid(self) -> int:
        return os.getpid()


@ray.remote(num_cpus=0)
class Replica:
    """In the place of a generator."""

    def __init__(self, store: Any, name: str) -> None:
        self._store, self._name, self._net = store, name, net(99)
        self._loader = Loader(self._net)
        self._version = Version(-1, "")
        self.refresh()

    def refresh(self, mood: str = "") -> Receipt:
        if mood == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        if mood == "hangs":
            time.sleep(3)
        if mood == "breaks":
            raise RuntimeError("out of order")
        found = loading.fetch(self._store, timeout=20)
        if found is not None:
            self._version = self._loader.load(found)
            if mood == "forgets":
                self._version = Version(0, "")
        return Receipt(self._name, self._version)

    def checksum(self) -> str:
        return weights.checksum(self._net.state_dict().items())

    def shelf(self) -> Shelf:
        node = ray.get_runtime_context().get_node_id()
        return ray.get(self._store.latest.remote("", node))


class Two:
    """Two nodes: the store on the first, where the tests themselves run, and a replica on each."""

    def __init__(self, cluster: Cluster) -> None:
        head = ray.get_runtime_context().get_node_id()
        ids = sorted((node.node_id for node in cluster.list_all_nodes()), key=lambda x: x != head)
        self._nodes = [NodeAffinitySchedulingStrategy(node, soft=False) for node in ids]
        self.store = self.start(WeightStore, 0)
        self.replicas = {f"replica-{node}": self.replica(node) for node in (0, 1)}

    def start(self, actor: Any, node: int, *arguments: Any, **options: Any) -> Any:
        return actor.options(scheduling_strategy=self._nodes[node], **options).remote(*arguments)

    def publisher(self, node: int) -> Any:
        return self.start(Publisher, node, self.store)

    def replica(self, node: int) -> Any:
        name = f"replica-{node}"
        return self.start(Replica, node, self.store, name, name=name, get_if_exists=True)

    def refresh(self, **moods: str) -> Callable[[float], Sequence[Receipt | Exception]]:
        """Asks both replicas; the moods are for the first time."""

        def ask(seconds: float) -> list[Receipt | Exception]:
            calls = [
                replica.refresh.remote(moods.pop(name.replace("-", "_"), ""))
                for name, replica in self.replicas.items()
            ]
            deadline, found = time.monotonic() + seconds, []
            for call in calls:
                try:
                    found.append(ray.get(call, timeout=max(0.0, deadline - time.monotonic())))
                except (RayActorError, GetTimeoutError, RuntimeError) as error:
                    found.append(error)
            return found

        return ask

    def confirm(self, version: Version, timeout: float = 20, **moods: str) -> list[Receipt]:
        return publishing.confirm(version, self.refresh(**moods), self.store, 2, timeout)

    def held(self) -> list[str]:
        """Checksums of what the replicas hold."""
        return ray.get([replica.checksum.remote() for replica in self.replicas.values()])


@pytest.fixture(scope="module")
def two() -> Iterator[Two]:
    room = {"num_cpus": 1, "object_store_memory": 100 << 20}
    head = room | {
        "include_dashboard": False,
        "_system_config": {"free_objects_period_milliseconds": 50},
    }
    cluster = Cluster(initialize_head=True, head_node_args=head)
    cluster.add_node(**room)
    path = {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    ray.init(address=cluster.address, runtime_env={"env_vars": WORKER_ENVIRONMENT | path})
    yield Two(cluster)
    ray.shutdown()
    cluster.shutdown()


def expected(number: int, seed: int) -> Version:
    return Version(number, weights.checksum(net(seed).state_dict().items()))


def test_replicas_on_both_nodes_get_what_a_worker_of_either_publishes(two: Two) -> None:
    here, there = (replica for replica in two.replicas.values())
    for node in (0, 1):
        publisher = two.publisher(node)
        for number in (5, 6):
            version = ray.get(publisher.publish.remote(number, seed=number))
            assert version == expected(number, number)
            receipts = two.confirm(version)
            assert sorted(receipt.replica for receipt in receipts) == sorted(two.replicas)
            assert two.held() == [version.checksum] * 2
        shelves = ray.get([here.shelf.remote(), there.shelf.remote()])
        assert [bool(shelf.buckets) for shelf in shelves] == [node == 1, True]
        assert [shelf.segment is not None for shelf in shelves] == [node == 0, False]


def test_weights_outlive_their_worker_and_make_room_for_the_next(two: Two) -> None:
    publisher = two.publisher(1)
    for number in range(10):  # 240 MB pass through an object store of 100
        version = ray.get(publisher.publish.remote(number, seed=number % 3))
        two.confirm(version)
    assert "Spilled" not in memory_summary()
    os.kill(ray.get(publisher.pid.remote()), signal.SIGKILL)
    with pytest.raises(RayActorError):
        ray.get(publisher.pid.remote())
    late = two.start(Replica, 0, two.store, "late")
    assert ray.get(late.refresh.remote()) == Receipt("late", version)
    assert ray.get(late.checksum.remote()) == expected(9, 0).checksum


def test_a_replica_that_missed_weights_keeps_its_own(two: Two) -> None:
    """Although it computes with the memory that the learner's first worker writes."""
    publisher, late = two.publisher(0), two.start(Replica, 0, two.store, "late-again")
    two.confirm(ray.get(publisher.publish.remote(1, seed=1)))
    assert ray.get(late.refresh.remote()).version == expected(1, 1)
    for number in range(2, 6):
        version = ray.get(publisher.publish.remote(number, seed=number))
        two.confirm(version)
        assert two.held() == [version.checksum] * 2
    assert ray.get(late.checksum.remote()) == expected(1, 1).checksum
    assert ray.get(late.refresh.remote()).version == version


def test_weights_that_are_gone_by_the_time_they_are_read_are_asked_for_again(
    two: Two, monkeypatch: pytest.MonkeyPatch
) -> None:
    publisher = two.publisher(0)
    ray.get(publisher.publish.remote(1, seed=1))
    newer = []

    def late(segment: Segment) -> Lease:
        if not newer:
            newer.append(ray.get(publisher.publish.remote(2, seed=2)))
        return Lease(segment)

    monkeypatch.setattr(loading, "Lease", late)
    found = loading.fetch(two.store)
    assert found is not None and found.version == newer[0] == expected(2, 2)
    assert weights.checksum(found.tensors()) == found.version.checksum
    assert loading.fetch(two.store, unless=found.version) is None
    assert two.confirm(found.version)


def memory_summary() -> str:
    return internal_api.memory_summary(ray.get_runtime_context().gcs_address, stats_only=True)


def test_a_worker_of_an_earlier_attempt_changes_nothing(two: Two, tmp_path: Path) -> None:
    pause = tmp_path / "pause"
    pause.touch()
    asleep = two.publisher(0)
    call = asleep.publish.remote(7, seed=1, pause=pause)
    wait_until(lambda: ray.get(two.store.latest.remote("", "")).underway == 7)
    awake = two.publisher(0)
    version = ray.get(awake.publish.remote(3, seed=2))  # its checkpoint was older
    assert two.confirm(version)
    pause.unlink()
    with pytest.raises(Fenced, match=r"Attempt \d+ of the learner cannot publish, since attempt"):
        ray.get(call)
    assert two.confirm(version)
    assert two.held() == [expected(3, 2).checksum] * 2
    with pytest.raises(AssertionError, match="weights 3 come after 3"):
        ray.get(awake.publish.remote(3, seed=1))


def test_a_worker_that_dies_in_the_middle_keeps_replicas_waiting_for_the_next(
    two: Two, tmp_path: Path
) -> None:
    pause = tmp_path / "pause"
    pause.touch()
    dying = two.publisher(1)
    dying.publish.remote(4, seed=1, pause=pause)
    wait_until(lambda: ray.get(two.store.latest.remote("", "")).underway == 4)
    waiting = [replica.refresh.remote() for replica in two.replicas.values()]
    os.kill(ray.get(dying.pid.remote()), signal.SIGKILL)
    sentence = r"Weights 4 are still being published after 0.2 s; look for a worker"
    with pytest.raises(TimeoutError, match=sentence):
        loading.fetch(two.store, timeout=0.2)
    version = ray.get(two.publisher(1).publish.remote(4, seed=2))
    assert {receipt.version for receipt in ray.get(waiting)} == {version} == {expected(4, 2)}


def test_who_does_not_take_the_weights_is_named(two: Two) -> None:
    version = ray.get(two.publisher(0).publish.remote(1, seed=4))
    sentence = (
        r"Only 1 of 2 generators took weights 1 within 1 s \(replica-0\); no answer came from"
    )
    with pytest.raises(PublishError, match=f"{sentence} .*replica-1") as caught:
        two.confirm(version, timeout=1, replica_1="hangs")
    assert "replica-0" not in str(caught.value).split("came from")[1]
    with pytest.raises(PublishError, match=r"Generator replica-1 serves Version\(number=0"):
        two.confirm(version, replica_1="forgets")
    with pytest.raises(PublishError, match="cannot load weights 1") as cause:
        two.confirm(version, replica_0="breaks")
    assert "out of order" in str(cause.value.__cause__)


def test_a_replica_that_dies_is_asked_again_where_it_starts_again(two: Two) -> None:
    version = ray.get(two.publisher(0).publish.remote(1, seed=5))
    ask = two.refresh(replica_1="dies")

    def refresh(seconds: float) -> Sequence[Receipt | Exception]:
        found = ask(seconds)
        if any(isinstance(error, RayActorError) for error in found):
            two.replicas["replica-1"] = two.replica(1)
        return found

    publishing.confirm(version, refresh, two.store, 2, timeout=30)
    assert two.held() == [version.checksum] * 2


def wait_until(found: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not found():
        assert time.monotonic() < deadline
        time.sleep(0.02)
