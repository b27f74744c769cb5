"""What the stores are tested on: one etcd for all, a prefix of its own for each test; and API servers with their nodes."""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Callable, Iterator
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import pytest

from flanneld.lab import wait
from flanneld.lab.etcd import Etcd
from flanneld.lab.wait import wait_until
from subnet_lease import etcd_connection
from subnet_lease.etcd import EtcdStore
from subnet_lease.etcd_connection import CALL_TIMEOUT, EtcdConnection
from subnet_lease.kube import KubeStore
from subnet_lease.lease import Lease, LeaseAttrs, LeaseSnapshot, NodeIdentity
from subnet_lease.store import LeaseRequest
from tests.store.kube_values import NET_CONF
from tests.testbed.fake_kube import FakeKube
from tests.testbed.real_kube import RealKube, assets

_numbers = itertools.count(1)


@pytest.fixture(scope="session")
def shared_etcd() -> Iterator[Etcd]:
    """A server that nobody stops, wipes or compacts."""
    with Etcd() as etcd:
        yield etcd


@pytest.fixture
def own_etcd() -> Iterator[Etcd]:
    """A server that the test may stop, wipe or compact."""
    with Etcd() as etcd:
        yield etcd


@pytest.fixture
def prefix() -> str:
    return f"/test{next(_numbers)}/network"


@pytest.fixture(autouse=True)
def patient_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most tests call a store once, where a daemon would try again: an answer that is late shall not fail them."""
    defaults = EtcdConnection.__init__.__kwdefaults__
    assert defaults is not None
    monkeypatch.setitem(defaults, "timeout", CALL_TIMEOUT * wait.patience)
    monkeypatch.setitem(defaults, "connect_timeout", CALL_TIMEOUT * wait.patience)
    monkeypatch.setattr(etcd_connection, "CALL_TIMEOUT", CALL_TIMEOUT * wait.patience)


def request_of(name: str, ip: str, **changes: Any) -> LeaseRequest:
    """What the node ``name`` asks for; ``mac`` and ``machine_id`` follow from the name unless given."""
    identity = NodeIdentity(name, changes.pop("machine_id", f"machine-{name}"), changes.pop("mac", f"02:00:{name}"))
    attrs = LeaseAttrs(
        public_ip=IPv4Address(ip),
        backend_type="vxlan",
        backend_data={"VNI": 1, "VtepMAC": changes.pop("vtep", "02:00:00:00:00:01")},
    )
    return LeaseRequest(identity, attrs, **changes)


class Network:
    """A network in etcd, and the stores that tests open on it; every one is closed at the end."""

    def __init__(self, etcd: Etcd, prefix: str) -> None:
        self.etcd, self.prefix = etcd, prefix
        self._stores: list[EtcdStore] = []
        self._followers: list[Follower] = []

    def configure(self, text: str = '{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan"}}') -> None:
        self.etcd.ctl("put", f"{self.prefix}/config", text)

    def store(self, machine: str | None = None, **options: Any) -> EtcdStore:
        """A node's connection; ``machine`` tells one kernel from another."""
        store = EtcdStore(options.pop("endpoints", [self.etcd.endpoint]), self.prefix, instance=machine, **options)
        self._stores.append(store)
        return store

    def leave(self, store: EtcdStore, lease: Lease) -> None:
        """Close a node's connection; it takes its sign of life back, or if etcd is too busy, the sign expires."""
        store.close()
        sign = f"{self.prefix}/up/{lease.key}"
        wait_until(lambda: not self.etcd.ctl("get", "--keys-only", sign).strip(), 15, "no sign of life")

    def follow(self, store: EtcdStore) -> Follower:
        follower = Follower(store)
        self._followers.append(follower)
        return follower

    def key(self, name: str) -> str:
        return f"{self.prefix}/subnets/{name}"

    def get(self, name: str) -> str:
        return self.etcd.ctl("get", "--print-value-only", self.key(name)).rstrip("\n")

    def keys(self) -> list[str]:
        text = self.etcd.ctl("get", "--prefix", "--keys-only", f"{self.prefix}/subnets/")
        return sorted(line.rpartition("/")[2] for line in text.splitlines() if line)

    def close(self) -> None:
        for store in self._stores:
            store.close()
        for follower in self._followers:
            follower.join()


class Follower:
    """Collects a store's snapshots in a thread."""

    def __init__(self, store: EtcdStore) -> None:
        self.snapshots: list[LeaseSnapshot] = []
        self.error: BaseException | None = None
        self._watch = store.watch()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            for snapshot in self._watch:
                self.snapshots.append(snapshot)
        except BaseException as error:  # noqa: BLE001 - watch promises never to raise; join() tells
            self.error = error

    @property
    def keys(self) -> set[str]:
        return set(self.snapshots[-1].leases) if self.snapshots else set()

    def join(self) -> None:
        self._thread.join(timeout=10 * wait.patience)
        assert not self._thread.is_alive(), "watch did not end with close()"
        assert self.error is None, f"watch raised {self.error!r}"


@pytest.fixture
def network(shared_etcd: Etcd, prefix: str) -> Iterator[Network]:
    network = Network(shared_etcd, prefix)
    network.configure()
    yield network
    network.close()


@pytest.fixture
def own_network(own_etcd: Etcd, prefix: str) -> Iterator[Network]:
    network = Network(own_etcd, prefix)
    network.configure()
    yield network
    network.close()


MakeNetwork = Callable[[Etcd], Network]


@pytest.fixture
def on(prefix: str) -> Iterator[MakeNetwork]:
    """Make a network on a given etcd, closed at the end."""
    made: list[Network] = []

    def make(etcd: Etcd) -> Network:
        network = Network(etcd, prefix)
        made.append(network)
        return network

    yield make
    for network in made:
        network.close()


@pytest.fixture
def fake() -> Iterator[FakeKube]:
    with FakeKube(bookmark_every=0.2) as server:
        yield server


@pytest.fixture(scope="session")
def real_server() -> Iterator[RealKube]:
    server = RealKube()
    yield server
    server.close()


@pytest.fixture(params=["fake", "real"] if assets() else ["fake"])
def kube(request: pytest.FixtureRequest) -> Any:
    """An API server without nodes."""
    if request.param == "fake":
        return request.getfixturevalue("fake")
    server: RealKube = request.getfixturevalue("real_server")
    server.clear()
    return server


@pytest.fixture
def net_conf(tmp_path: Path) -> Path:
    path = tmp_path / "net-conf.json"
    path.write_text(json.dumps(NET_CONF))
    return path


@pytest.fixture
def make_store(net_conf: Path) -> Iterator[Callable[..., KubeStore]]:
    """A factory of stores for node n1; all are closed afterwards."""
    made: list[KubeStore] = []

    def make(server: Any, **options: Any) -> KubeStore:
        store = KubeStore(**{"node_name": "n1", "net_config_path": net_conf, **server.access, **options})
        made.append(store)
        return store

    yield make
    for store in made:
        store.close()
