"""KubeStore against an API server: the fake one always, a real one too where KUBEBUILDER_ASSETS points to it."""

from __future__ import annotations

import json
import os
import random
import threading
from collections.abc import Callable, Iterator
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from pathlib import Path
from typing import Any

import httpx2
import pytest

from flanneld.lab.wait import wait_until
from subnet_lease.kube import KubeStore
from subnet_lease.lease import LeaseAttrs, LeaseSnapshot, NodeHints, NodeIdentity
from subnet_lease.store import (
    AccessDenied,
    AddressInUse,
    ConfigInvalid,
    ConfigMissing,
    LeaseLost,
    LeaseRequest,
    NodeMissing,
    PodCidrMissing,
    SetupError,
    StoreUnavailable,
    SubnetTaken,
)
from tests.testbed.fake_kube import FakeKube, peer_annotations
from tests.testbed.real_kube import RealKube, assets

PREFIX = "flannel.alpha.coreos.com/"
NET_CONF = {"Network": "10.244.0.0/16", "Backend": {"Type": "vxlan"}}
ATTRS = LeaseAttrs(
    public_ip=IPv4Address("192.0.2.1"),
    backend_type="vxlan",
    backend_data={"VNI": 1, "VtepMAC": "02:00:00:00:00:01"},
)
REQUEST = LeaseRequest(NodeIdentity("n1"), ATTRS)


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


class Watcher:
    """Runs a store's watch in a thread and keeps what it says."""

    def __init__(self, store: KubeStore) -> None:
        self.snapshots: list[LeaseSnapshot] = []
        self.store = store
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        for snapshot in self.store.watch():
            self.snapshots.append(snapshot)

    @property
    def keys(self) -> set[str]:
        return set(self.snapshots[-1].leases) if self.snapshots else set()

    def sees(self, *keys: str, timeout: float = 10) -> LeaseSnapshot:
        """Wait for a snapshot with exactly these leases."""
        wait_until(lambda: self.snapshots and self.keys == set(keys), timeout, lambda: f"{keys}, not {self.keys}")
        return self.snapshots[-1]


@pytest.mark.skipif(assets() is not None, reason="runs on the real one")
def test_the_same_on_a_real_api_server():
    pytest.skip("no real kube-apiserver: KUBEBUILDER_ASSETS names no directory with kube-apiserver and etcd")


# -- our own node ------------------------------------------------------------------------------------------------


def test_the_pod_cidr_is_the_subnet_and_the_annotations_are_flannels(kube, make_store):
    kube.add_node("n1", "10.244.1.0/24")
    store = make_store(kube)
    lease = store.acquire(store.read_config(), REQUEST)
    assert lease.subnet == IPv4Network("10.244.1.0/24")
    assert lease.attrs.backend_data == ATTRS.backend_data
    ours = {name: value for name, value in kube.annotations("n1").items() if name.startswith(PREFIX)}
    assert ours == peer_annotations("192.0.2.1", "02:00:00:00:00:01")


def test_an_equal_node_is_not_written(fake, make_store):
    fake.add_peer("n1", "10.244.1.0/24", "192.0.2.1", "02:00:00:00:00:01")
    store = make_store(fake)
    store.acquire(store.read_config(), REQUEST)
    assert fake.count("patch", "nodes/status") == 0


def test_dual_stack_publishes_both_families(kube, make_store, net_conf):
    net_conf.write_text(json.dumps(NET_CONF | {"EnableIPv6": True, "IPv6Network": "fd00:10::/48"}))
    kube.add_node("n1", "10.244.1.0/24", "fd00:10:0:1::/64")
    store = make_store(kube)
    attrs = LeaseAttrs(ATTRS.public_ip, IPv6Address("2001:db8::1"), "vxlan", ATTRS.backend_data, ATTRS.backend_data)
    lease = store.acquire(store.read_config(), LeaseRequest(NodeIdentity("n1"), attrs))
    assert (lease.subnet, lease.ipv6_subnet) == (IPv4Network("10.244.1.0/24"), IPv6Network("fd00:10:0:1::/64"))
    assert kube.annotations("n1")[PREFIX + "backend-v6-data"] == '{"VNI":1,"VtepMAC":"02:00:00:00:00:01"}'
    assert kube.annotations("n1")[PREFIX + "public-ipv6"] == "2001:db8::1"


def test_what_the_node_carries_already_is_given_back_with_its_mac(kube, make_store):
    kube.add_peer("n1", "10.244.1.0/24", "192.0.2.99", "02:00:00:00:00:99")
    found = make_store(kube).find_own(REQUEST)
    assert found is not None
    assert found.attrs.backend_data["VtepMAC"] == "02:00:00:00:00:99"


def test_a_fresh_node_has_nothing_to_give_back(kube, make_store):
    kube.add_node("n1", "10.244.1.0/24")
    assert make_store(kube).find_own(REQUEST) is None


@pytest.mark.field_problem(9)
def test_a_missing_pod_cidr_names_its_three_remedies_and_the_next_try_succeeds(kube, make_store):
    kube.add_node("n1")
    store = make_store(kube)
    with pytest.raises(PodCidrMissing) as caught:
        store.acquire(store.read_config(), REQUEST)
    for words in ('node "n1" pod cidr not assigned', "--pod-network-cidr=10.244.0.0/16", "--allocate-node-cidrs=true"):
        assert words in str(caught.value)
    assert "kubectl patch node n1" in str(caught.value)
    wait_until(lambda: kube.events("PodCIDRMissing"), message="an Event about it")
    kube.patch_node("n1", {"spec": {"podCIDR": "10.244.1.0/24", "podCIDRs": ["10.244.1.0/24"]}})
    assert store.acquire(store.read_config(), REQUEST).key == "10.244.1.0-24"


def test_a_pod_cidr_outside_the_network_is_refused_in_flannels_words(kube, make_store):
    kube.add_node("n1", "10.99.1.0/24")
    store = make_store(kube)
    sentence = (
        'subnet "10.244.0.0/16" specified in the flannel net config doesn\'t contain "10.99.1.0/24" PodCIDR of the'
        ' "n1" node'
    )
    with pytest.raises(ConfigInvalid) as caught:
        store.acquire(store.read_config(), REQUEST)
    assert sentence in str(caught.value)


def test_an_unknown_node_says_how_to_name_the_right_one(kube, make_store):
    store = make_store(kube)
    with pytest.raises(NodeMissing, match="NODE_NAME"):
        store.acquire(store.read_config(), REQUEST)


def test_the_node_is_found_through_the_pod(kube, make_store):
    kube.add_node("n1", "10.244.1.0/24")
    kube.add_pod("default", "kube-flannel-ds-x", "n1", {})
    store = make_store(kube, node_name="", pod_name="kube-flannel-ds-x", pod_namespace="default")
    assert store.acquire(store.read_config(), REQUEST).key == "10.244.1.0-24"
    assert store.node_name == "n1"


def test_without_any_name_it_says_which_variables_to_set():
    with pytest.raises(SetupError, match=r"NODE_NAME.*POD_NAME"):
        KubeStore(api_url="http://127.0.0.1:1")


def test_the_operators_addresses_are_hints(kube, make_store):
    kube.add_node("n1", annotations={PREFIX + "node-public-ip": "198.51.100.1"})
    assert make_store(kube).hints().public_ip == IPv4Address("198.51.100.1")
    kube.annotate("n1", {PREFIX + "node-public-ip": "eth0"})
    with pytest.raises(ConfigInvalid, match="node-public-ip"):
        make_store(kube).hints()


@pytest.mark.field_problem(10)
def test_a_live_older_nodes_address_is_refused_until_that_node_falls_silent(fake, make_store):
    fake.add_node("a-first", "10.244.9.0/24", annotations=peer_annotations("192.0.2.1", "02:00:00:00:00:09"))
    fake.add_node("n1", "10.244.1.0/24")
    store = make_store(fake)
    Watcher(store).sees("10.244.9.0-24")
    with pytest.raises(AddressInUse, match=r"192\.0\.2\.1 of node n1 .* node a-first, .*node-public-ip"):
        store.acquire(store.read_config(), REQUEST)
    assert PREFIX + "public-ip" not in fake.annotations("n1"), "nothing is published"
    fake.condition("a-first", "Ready", "Unknown")
    lease = store.acquire(store.read_config(), REQUEST)
    assert store.renew(lease) > 0
    fake.condition("a-first", "Ready", "True")
    with pytest.raises(AddressInUse):
        store.renew(lease)


@pytest.mark.field_problem(10)
def test_the_older_of_two_nodes_with_one_address_stays(fake, make_store):
    fake.add_node("n1", "10.244.1.0/24")
    fake.add_node("z-later", "10.244.9.0/24", annotations=peer_annotations("192.0.2.1", "02:00:00:00:00:09"))
    store = make_store(fake)
    Watcher(store).sees("10.244.9.0-24")
    assert store.renew(store.acquire(store.read_config(), REQUEST)) > 0


def test_changed_hints_come_with_the_next_snapshot(kube, make_store):
    kube.add_node("n1", "10.244.1.0/24")
    store = make_store(kube)
    lease = store.acquire(store.read_config(), REQUEST)
    watcher = Watcher(store)
    assert watcher.sees(lease.key).hints == NodeHints()
    kube.annotate("n1", {PREFIX + "node-public-ip": "198.51.100.1"})
    wait_until(lambda: watcher.snapshots[-1].hints == NodeHints(IPv4Address("198.51.100.1")))
    kube.annotate("n1", {PREFIX + "node-public-ip": "eth0"})
    kube.annotate("n1", {PREFIX + "node-public-ip": None})
    wait_until(lambda: watcher.snapshots[-1].hints == NodeHints())


def test_an_overwrite_annotation_is_published_and_later_changes_of_it_are_followed(kube, make_store):
    kube.add_node("n1", "10.244.1.0/24", annotations={PREFIX + "public-ip-overwrite": "198.51.100.1"})
    store = make_store(kube)
    lease = store.acquire(store.read_config(), REQUEST)
    assert kube.annotations("n1")[PREFIX + "public-ip"] == "198.51.100.1"
    seen = Watcher(store).sees(lease.key).leases[lease.key]
    assert seen.attrs == lease.attrs, "our own lease is shown as we asked for it, not as a difference to be mended"
    kube.annotate("n1", {PREFIX + "public-ip-overwrite": None})
    wait_until(lambda: kube.annotations("n1")[PREFIX + "public-ip"] == "192.0.2.1", 15)


def test_another_annotation_prefix_is_used_throughout(kube, make_store):
    kube.add_node("n1", "10.244.1.0/24")
    store = make_store(kube, annotation_prefix="example.org/one")
    lease = store.acquire(store.read_config(), REQUEST)
    assert kube.annotations("n1")["example.org/one-public-ip"] == "192.0.2.1"
    found = store.find_own(REQUEST)
    assert found is not None
    assert found.attrs == lease.attrs


def test_annotations_that_somebody_alters_are_written_again(kube, make_store):
    kube.add_node("n1", "10.244.1.0/24")
    store = make_store(kube)
    store.acquire(store.read_config(), REQUEST)
    Watcher(store).sees("10.244.1.0-24")
    kube.annotate("n1", {PREFIX + "kube-subnet-manager": None, PREFIX + "backend-data": "{}"})
    wait_until(lambda: kube.annotations("n1").get(PREFIX + "kube-subnet-manager") == "true", 15)
    assert kube.annotations("n1")[PREFIX + "backend-data"] == '{"VNI":1,"VtepMAC":"02:00:00:00:00:01"}'
    wait_until(lambda: kube.events("FlannelAnnotationsRestored"), message="an Event about it")


def test_new_attributes_are_published(kube, make_store):
    kube.add_node("n1", "10.244.1.0/24")
    store = make_store(kube)
    lease = store.acquire(store.read_config(), REQUEST)
    moved = LeaseAttrs(IPv4Address("192.0.2.77"), None, "vxlan", ATTRS.backend_data)
    assert store.publish(lease, moved).attrs.public_ip == IPv4Address("192.0.2.77")
    assert kube.annotations("n1")[PREFIX + "public-ip"] == "192.0.2.77"


def test_release_takes_our_annotations_away_and_nothing_else(kube, make_store):
    kube.add_node(
        "n1", "10.244.1.0/24", annotations={"example.org/kept": "yes", PREFIX + "node-public-ip": "192.0.2.1"}
    )
    store = make_store(kube)
    watcher = Watcher(store)
    lease = store.acquire(store.read_config(), REQUEST)
    watcher.sees(lease.key)
    store.release(lease)
    watcher.sees()
    assert set(kube.annotations("n1")) == {"example.org/kept", PREFIX + "node-public-ip"}


def test_renewing_asks_nobody_and_notices_a_node_that_is_gone_or_moved(kube, make_store):
    kube.add_node("n1", "10.244.1.0/24")
    store = make_store(kube)
    lease = store.acquire(store.read_config(), REQUEST)
    watcher = Watcher(store)
    watcher.sees(lease.key)
    assert store.renew(lease) > 1
    kube.delete_node("n1")
    watcher.sees()
    with pytest.raises(LeaseLost, match="n1 is gone"):
        store.renew(lease)
    kube.add_node("n1", "10.244.9.0/24")

    def moved() -> bool:
        try:
            store.renew(lease)
        except LeaseLost as error:
            return "10.244.9.0/24" in str(error)
        return False

    wait_until(moved)
    kept = LeaseRequest(NodeIdentity("n1"), ATTRS, (lease.subnet, None), keep=True)
    with pytest.raises(SubnetTaken, match="drain the node"):
        store.acquire(store.read_config(), kept)


# -- peers -------------------------------------------------------------------------------------------------------


def test_snapshots_follow_nodes(kube, make_store):
    kube.add_peer("n2", "10.244.2.0/24", "192.0.2.2", "02:00:00:00:00:02")
    kube.add_node("plain", "10.244.3.0/24")
    watcher = Watcher(make_store(kube))
    snapshot = watcher.sees("10.244.2.0-24")
    assert snapshot.config.network == IPv4Network("10.244.0.0/16")
    kube.add_peer("n4", "10.244.4.0/24", "192.0.2.4", "02:00:00:00:00:04")
    watcher.sees("10.244.2.0-24", "10.244.4.0-24")
    kube.delete_node("n2")
    watcher.sees("10.244.4.0-24")


@pytest.mark.field_problem(6)
def test_a_change_in_one_family_alone_is_seen(kube, make_store, net_conf):
    net_conf.write_text(json.dumps(NET_CONF | {"EnableIPv6": True, "IPv6Network": "fd00:10::/48"}))
    both = peer_annotations("192.0.2.2", "02:00:00:00:00:02") | {
        PREFIX + "public-ipv6": "2001:db8::2",
        PREFIX + "backend-v6-data": '{"VNI":1,"VtepMAC":"02:00:00:00:06:02"}',
    }
    kube.add_node("n2", "10.244.2.0/24", "fd00:10:0:2::/64", annotations=both)
    watcher = Watcher(make_store(kube))
    key = "10.244.2.0-24&fd00:10:0:2::-64"
    watcher.sees(key)
    kube.annotate("n2", {PREFIX + "backend-v6-data": '{"VNI":1,"VtepMAC":"02:00:00:00:06:ff"}'})
    wait_until(
        lambda: watcher.snapshots[-1].leases[key].attrs.backend_v6_data["VtepMAC"] == "02:00:00:00:06:ff",
        5,
        "the new IPv6 MAC",
    )


def test_heartbeats_make_no_snapshots(kube, make_store):
    kube.add_peer("n2", "10.244.2.0/24", "192.0.2.2", "02:00:00:00:00:02")
    watcher = Watcher(make_store(kube))
    watcher.sees("10.244.2.0-24")
    for _ in range(5):
        kube.heartbeat("n2")
    kube.add_peer("n3", "10.244.3.0/24", "192.0.2.3", "02:00:00:00:00:03")
    watcher.sees("10.244.2.0-24", "10.244.3.0-24")
    assert len(watcher.snapshots) == 2


@pytest.mark.field_problem(5)
def test_a_bad_annotation_withdraws_nobody_and_is_counted(kube, make_store):
    for number in (2, 3):
        kube.add_peer(f"n{number}", f"10.244.{number}.0/24", f"192.0.2.{number}", f"02:00:00:00:00:0{number}")
    store = make_store(kube)
    watcher = Watcher(store)
    watcher.sees("10.244.2.0-24", "10.244.3.0-24")
    kube.annotate("n2", {PREFIX + "public-ip": "garbage"})
    wait_until(lambda: store.status.errors.get("bad_key") == 1)
    kube.add_peer("n4", "10.244.4.0/24", "192.0.2.4", "02:00:00:00:00:04")
    watcher.sees("10.244.2.0-24", "10.244.3.0-24", "10.244.4.0-24")


def test_lists_are_paged(fake, make_store, monkeypatch):
    monkeypatch.setattr("subnet_lease.kube_api.PAGE", 10)
    for number in range(35):
        fake.add_peer(f"p{number}", f"10.244.{number}.0/24", f"192.0.2.{number}", f"02:00:00:00:00:{number:02x}")
    Watcher(make_store(fake)).sees(*(f"10.244.{number}.0-24" for number in range(35)))
    lists = [request for request in fake.requests if request.verb == "list"]
    assert [request.query["limit"] for request in lists] == ["10"] * 4


# -- failures ----------------------------------------------------------------------------------------------------


@pytest.mark.field_problem(8)
def test_an_unreachable_server_is_waited_for(fake, make_store):
    fake.add_peer("n2", "10.244.2.0/24", "192.0.2.2", "02:00:00:00:00:02")
    fake.stop()
    store = make_store(fake)
    with pytest.raises(StoreUnavailable) as caught:
        store.acquire(store.read_config(), REQUEST)
    assert fake.url in str(caught.value)
    watcher = Watcher(store)
    wait_until(lambda: store.status.failure is not None)
    fake.start()
    watcher.sees("10.244.2.0-24")
    wait_until(lambda: store.status.failure is None)


@pytest.mark.field_problem(8)
def test_a_server_that_goes_away_takes_nothing_with_it(fake, make_store):
    fake.add_peer("n2", "10.244.2.0/24", "192.0.2.2", "02:00:00:00:00:02")
    store = make_store(fake)
    watcher = Watcher(store)
    watcher.sees("10.244.2.0-24")
    fake.stop()
    wait_until(lambda: store.status.failure is not None)
    fake.add_peer("n3", "10.244.3.0/24", "192.0.2.3", "02:00:00:00:00:03")
    lists = fake.count("list", "nodes")
    fake.start()
    watcher.sees("10.244.2.0-24", "10.244.3.0-24")
    assert fake.count("list", "nodes") == lists, "the watch resumes where it was, without a new list"
    assert all("10.244.2.0-24" in snapshot.leases for snapshot in watcher.snapshots)


@pytest.mark.field_problem(4)
def test_after_compaction_a_new_list_finds_everything_that_changed(fake, make_store):
    for number in (2, 3):
        fake.add_peer(f"n{number}", f"10.244.{number}.0/24", f"192.0.2.{number}", f"02:00:00:00:00:0{number}")
    watcher = Watcher(make_store(fake))
    watcher.sees("10.244.2.0-24", "10.244.3.0-24")
    unchanged = watcher.snapshots[-1].leases["10.244.3.0-24"]
    fake.stop()
    fake.annotate("n2", peer_annotations("192.0.2.22", "02:00:00:00:00:22"))
    fake.add_peer("n4", "10.244.4.0/24", "192.0.2.4", "02:00:00:00:00:04")
    fake.store.compact()
    fake.start()
    snapshot = watcher.sees("10.244.2.0-24", "10.244.3.0-24", "10.244.4.0-24")
    assert snapshot.leases["10.244.2.0-24"].attrs.backend_data["VtepMAC"] == "02:00:00:00:00:22"
    assert snapshot.leases["10.244.3.0-24"] is unchanged


@pytest.mark.field_problem(14)
def test_a_cluster_restored_from_a_backup_is_listed_again(fake, make_store):
    for number in (2, 3):
        fake.add_peer(f"n{number}", f"10.244.{number}.0/24", f"192.0.2.{number}", f"02:00:00:00:00:0{number}")
    watcher = Watcher(make_store(fake))
    watcher.sees("10.244.2.0-24", "10.244.3.0-24")
    fake.stop()
    fake.delete_node("n3")
    fake.store.restore(500)
    fake.start()
    watcher.sees("10.244.2.0-24", timeout=20)


def test_silence_is_no_failure_but_a_reason_to_ask_again(fake, make_store, monkeypatch):
    monkeypatch.setattr("subnet_lease.kube_api.SILENCE", 0.5)
    fake.bookmark_every = 60
    fake.add_peer("n2", "10.244.2.0/24", "192.0.2.2", "02:00:00:00:00:02")
    store = make_store(fake)
    watcher = Watcher(store)
    watcher.sees("10.244.2.0-24")
    wait_until(lambda: fake.count("watch", "nodes") >= 4, 20)
    fake.add_peer("n3", "10.244.3.0/24", "192.0.2.3", "02:00:00:00:00:03")
    watcher.sees("10.244.2.0-24", "10.244.3.0-24")
    assert fake.count("list", "nodes") == 1
    assert store.status.errors == {}


def test_a_server_that_answers_no_more_is_noticed_and_the_watch_goes_on_afterwards(fake, make_store, monkeypatch):
    monkeypatch.setattr("subnet_lease.kube_api.SILENCE", 0.5)
    monkeypatch.setattr("subnet_lease.kube_api._CALL_TIMEOUT", httpx2.Timeout(1.0))
    fake.add_peer("n2", "10.244.2.0/24", "192.0.2.2", "02:00:00:00:00:02")
    watcher = Watcher(make_store(fake))
    watcher.sees("10.244.2.0-24")
    fake.silent.set()
    fake.add_peer("n3", "10.244.3.0/24", "192.0.2.3", "02:00:00:00:00:03")
    wait_until(lambda: watcher.store.status.failure is not None, 20)
    assert watcher.keys == {"10.244.2.0-24"}
    fake.silent.clear()
    watcher.sees("10.244.2.0-24", "10.244.3.0-24", timeout=20)


def test_errors_of_the_server_are_retried(fake, make_store):
    fake.add_peer("n2", "10.244.2.0/24", "192.0.2.2", "02:00:00:00:00:02")
    fake.failing = 3
    store = make_store(fake)
    Watcher(store).sees("10.244.2.0-24")
    assert store.status.errors["unavailable"] == 3


@pytest.mark.parametrize(
    ("verb", "resource", "act"),
    [
        ("get", "nodes", lambda store: store.acquire(store.read_config(), REQUEST)),
        ("patch", "nodes/status", lambda store: store.acquire(store.read_config(), REQUEST)),
        ("patch", "nodes/status", lambda store: store.report(True, ())),
    ],
)
def test_a_forbidden_call_names_the_rule_that_is_missing(fake, make_store, verb, resource, act):
    fake.add_node("n1", "10.244.1.0/24")
    fake.forbidden.add((verb, resource))
    with pytest.raises(AccessDenied) as caught:
        act(make_store(fake))
    assert f'resources ["{resource}"], verbs ["{verb}"]' in str(caught.value)


def test_a_forbidden_watch_shows_in_the_status_and_heals(fake, make_store):
    fake.add_peer("n2", "10.244.2.0/24", "192.0.2.2", "02:00:00:00:00:02")
    fake.forbidden.add(("list", "nodes"))
    store = make_store(fake)
    watcher = Watcher(store)
    wait_until(lambda: 'verbs ["list"]' in str(store.status.failure))
    assert store.status.errors["access_denied"] >= 1
    fake.forbidden.clear()
    watcher.sees("10.244.2.0-24")


def test_a_wrong_token_is_access_denied_and_a_mended_kubeconfig_is_used(make_store, tmp_path):
    kubeconfig = tmp_path / "kubeconfig"

    def write(token: str) -> None:
        kubeconfig.write_text(
            f"apiVersion: v1\nkind: Config\ncurrent-context: it\n"
            f"contexts: [{{name: it, context: {{cluster: it, user: it}}}}]\n"
            f"clusters: [{{name: it, cluster: {{server: '{server.url}'}}}}]\n"
            f"users: [{{name: it, user: {{token: '{token}'}}}}]\n"
        )

    with FakeKube(token="right") as server:
        server.add_node("n1", "10.244.1.0/24")
        write("wrong")
        store = make_store(server, api_url="", kubeconfig=str(kubeconfig))
        with pytest.raises(AccessDenied, match="401"):
            store.hints()
        write("right")
        os.utime(kubeconfig, ns=(1, 1))
        assert store.hints().public_ip is None


@pytest.mark.parametrize(
    ("text", "words"),
    [(None, "not found"), ("{", "kubeconfig"), ("clusters: []\ncontexts: []\n", "current"), ("[]", "kubeconfig")],
)
def test_an_unusable_kubeconfig_is_a_setup_error_that_names_it(tmp_path, text, words):
    path = tmp_path / "kubeconfig"
    if text is not None:
        path.write_text(text)
    with pytest.raises(SetupError, match=words) as caught:
        KubeStore(node_name="n1", kubeconfig=str(path))
    assert str(path) in str(caught.value)


def test_something_that_is_no_api_server_is_named(make_store, tmp_path):
    import http.server

    class Web(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<html>hello</html>")

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Web) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        store = KubeStore(node_name="n1", api_url=f"http://127.0.0.1:{server.server_address[1]}")
        with pytest.raises(StoreUnavailable, match="--kube-api-url"):
            store.hints()
        store.close()
        server.shutdown()


def test_closing_ends_the_watch_at_once(fake, make_store):
    fake.bookmark_every = 60
    store = make_store(fake)
    watcher = Watcher(store)
    watcher.sees()
    store.close()
    watcher.thread.join(5)
    assert not watcher.thread.is_alive()


@pytest.mark.field_problem(18)
def test_a_storm_of_changes_with_cuts_and_compactions_ends_exact(fake, make_store):
    chance = random.Random(18)
    watcher = Watcher(make_store(fake))
    watcher.sees()
    known: dict[str, str] = {}
    for step in range(2000):
        name, number = f"p{chance.randrange(200)}", chance.randrange(250)
        if name not in known:
            known[name] = f"192.0.2.{number}"
            fake.add_peer(name, f"10.244.{name[1:]}.0/24", known[name], "02:00:00:00:00:02")
        elif chance.random() < 0.4:
            del known[name]
            fake.delete_node(name)
        else:
            known[name] = f"192.0.2.{number}"
            fake.annotate(name, {PREFIX + "public-ip": known[name]})
        if step % 400 == 200:
            fake.drop()
        if step % 400 == 399:
            fake.store.compact()
    wanted = {f"10.244.{name[1:]}.0-24": address for name, address in known.items()}

    def seen() -> dict[str, str]:
        return {key: str(lease.attrs.public_ip) for key, lease in watcher.snapshots[-1].leases.items()}

    wait_until(lambda: seen() == wanted, 20, lambda: f"{set(seen().items()) ^ set(wanted.items())}")


# -- the network configuration -----------------------------------------------------------------------------------


def test_a_missing_configuration_says_where_it_was_expected(fake, make_store, tmp_path):
    with pytest.raises(ConfigMissing, match=r"nowhere.*--net-config-path"):
        make_store(fake, net_config_path=tmp_path / "nowhere").read_config()


def test_a_swapped_config_map_takes_effect_and_a_bad_one_does_not(fake, make_store, tmp_path):
    """kubelet writes a new directory and swaps the link ..data, as here."""

    def mount(number: int, text: str) -> None:
        (tmp_path / f"..{number}").mkdir()
        (tmp_path / f"..{number}" / "net-conf.json").write_text(text)
        (tmp_path / "..tmp").symlink_to(f"..{number}")
        (tmp_path / "..tmp").rename(tmp_path / "..data")

    mount(1, json.dumps(NET_CONF))
    path = tmp_path / "mounted.json"
    path.symlink_to("..data/net-conf.json")
    fake.add_node("n1", "10.244.1.0/24")
    store = make_store(fake, net_config_path=path)
    watcher = Watcher(store)
    watcher.sees()
    mount(2, "{")
    wait_until(lambda: store.status.config_error)
    assert store.status.errors["config_invalid"] == 1
    mount(3, json.dumps(NET_CONF | {"EnableNFTables": True}))
    wait_until(lambda: watcher.snapshots[-1].config.enable_nftables)
    assert len(watcher.snapshots) == 2
    assert store.status.config_error is None
    wait_until(lambda: fake.events("FlannelConfigInvalid"), message="an Event about the bad one")


def test_new_connections_miss_nothing_and_are_no_failure(fake, make_store):
    fake.add_node("n2", "10.244.2.0/24", annotations=peer_annotations("192.0.2.2", "02:00:00:00:00:02"))
    store = make_store(fake)
    watcher = Watcher(store)
    watcher.sees("10.244.2.0-24")
    store.reconnect()
    fake.add_node("n3", "10.244.3.0/24", annotations=peer_annotations("192.0.2.3", "02:00:00:00:00:03"))
    watcher.sees("10.244.2.0-24", "10.244.3.0-24")
    assert not store.status.errors and store.status.failure is None


def test_turning_a_family_on_reads_every_node_again(fake, make_store, net_conf):
    both = peer_annotations("192.0.2.2", "02:00:00:00:00:02") | {PREFIX + "public-ipv6": "2001:db8::2"}
    fake.add_node("n2", "10.244.2.0/24", "fd00:10:0:2::/64", annotations=both)
    watcher = Watcher(make_store(fake))
    watcher.sees("10.244.2.0-24")
    net_conf.write_text(json.dumps(NET_CONF | {"EnableIPv6": True, "IPv6Network": "fd00:10::/48"}))
    snapshot = watcher.sees("10.244.2.0-24&fd00:10:0:2::-64")
    assert snapshot.config.enable_ipv6


# -- what we tell Kubernetes -------------------------------------------------------------------------------------


def network_unavailable(kube: Any, name: str = "n1") -> dict[str, str] | None:
    conditions = kube.node(name)["status"].get("conditions") or []
    return next((c for c in conditions if c["type"] == "NetworkUnavailable"), None)


def test_a_ready_node_is_reported_as_flannel_does_and_once(kube, make_store):
    kube.add_node("n1", "10.244.1.0/24")
    store = make_store(kube)
    store.report(True, ())
    store.report(True, ())
    found = network_unavailable(kube)
    assert found is not None
    assert (found["status"], found["reason"], found["message"]) == (
        "False",
        "FlannelIsUp",
        "Flannel is running on this node",
    )
    if isinstance(kube, FakeKube):
        assert kube.count("patch", "nodes/status") == 1
        assert any(c["type"] == "Ready" for c in kube.node("n1")["status"]["conditions"])


def test_a_report_that_failed_is_made_again_by_the_next_call(fake, make_store):
    fake.add_node("n1", "10.244.1.0/24")
    store = make_store(fake)
    fake.failing = 1
    with pytest.raises(StoreUnavailable):
        store.report(True, ())
    store.report(True, ())
    found = network_unavailable(fake)
    assert found is not None
    assert found["status"] == "False"


def test_a_broken_data_path_is_reported_after_a_while_and_taken_back_at_once(kube, make_store, monkeypatch):
    monkeypatch.setattr("subnet_lease.kube_report.BROKEN_AFTER", 0.5)
    kube.add_node("n1", "10.244.1.0/24")
    store = make_store(kube)
    store.report(True, ())
    store.report(False, ("device flannel.1 is missing",))
    found = network_unavailable(kube)
    assert found is not None
    assert found["status"] == "False"

    Watcher(store)  # which looks after it from now on

    def broken() -> bool:
        now = network_unavailable(kube)
        return now is not None and now["status"] == "True" and "flannel.1 is missing" in now["message"]

    wait_until(broken)
    store.report(True, ())
    found = network_unavailable(kube)
    assert found is not None
    assert found["status"] == "False"
    wait_until(lambda: kube.events("FlannelIsNotReady") and kube.events("FlannelIsUp"), message="both Events")


def test_a_condition_that_somebody_else_altered_is_written_again(fake, make_store):
    fake.add_node("n1", "10.244.1.0/24")
    store = make_store(fake)
    Watcher(store)
    store.report(True, ())
    fake.patch_node("n1", {"status": {"conditions": [{"type": "NetworkUnavailable", "status": "True", "reason": "X"}]}})

    def mended() -> bool:
        found = network_unavailable(fake)
        return found is not None and found["reason"] == "FlannelIsUp"

    wait_until(mended)


def test_conditions_are_left_alone_when_that_is_switched_off(fake, make_store):
    fake.add_node("n1", "10.244.1.0/24")
    make_store(fake, set_network_unavailable=False).report(True, ())
    assert network_unavailable(fake) is None


def test_events_that_may_not_be_created_stop_nothing(fake, make_store):
    fake.add_node("n1")
    fake.forbidden.add(("create", "events"))
    store = make_store(fake)
    with pytest.raises(PodCidrMissing):
        store.acquire(store.read_config(), REQUEST)


@pytest.mark.field_problem(43)
def test_a_policy_that_selects_a_pod_here_is_announced_once_and_others_are_not(kube, make_store):
    kube.add_node("n1", "10.244.1.0/24")
    kube.add_node("n2", "10.244.2.0/24")
    kube.add_pod("default", "web", "n1", {"app": "web"})
    kube.add_pod("default", "db", "n2", {"app": "db"})
    kube.add_policy("default", "elsewhere", {"matchLabels": {"app": "db"}})
    store = make_store(kube, policy_notice=True)
    Watcher(store)
    kube.add_policy("default", "deny-web", {"matchExpressions": [{"key": "app", "operator": "In", "values": ["web"]}]})
    wait_until(lambda: kube.events("NotEnforced"), 15)
    again = make_store(kube, policy_notice=True)
    Watcher(again)
    kube.add_policy("default", "deny-all", {})
    wait_until(lambda: len(kube.events("NotEnforced")) == 2, 15)
    names = sorted(event["involvedObject"]["name"] for event in kube.events("NotEnforced"))
    assert names == ["deny-all", "deny-web"]
