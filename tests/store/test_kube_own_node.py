"""KubeStore and its own node, on an API server: the fake one always, a real one too where KUBEBUILDER_ASSETS points to it."""

from __future__ import annotations

import json
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

import pytest

from flanneld.lab.wait import wait_until
from subnet_lease.kube import KubeStore
from subnet_lease.lease import LeaseAttrs, NodeHints, NodeIdentity
from subnet_lease.store import (
    AddressInUse,
    ConfigInvalid,
    LeaseLost,
    LeaseRequest,
    NodeMissing,
    PodCidrMissing,
    SetupError,
    SubnetTaken,
)
from tests.store.kube_values import ATTRS, NET_CONF, PREFIX, REQUEST, Watcher
from tests.testbed.fake_kube import peer_annotations
from tests.testbed.real_kube import assets


@pytest.mark.skipif(assets() is not None, reason="runs on the real one")
def test_the_same_on_a_real_api_server():
    pytest.skip("no real kube-apiserver: KUBEBUILDER_ASSETS names no directory with kube-apiserver and etcd")


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
