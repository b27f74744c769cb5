"""Nodes folded into leases: complete, stable, and deaf to noise."""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import IPv4Network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from subnet_lease.kube_annotations import keys_for
from subnet_lease.kube_objects import Change, Metadata, Node, NodeSpec
from subnet_lease.kube_watch import NodeFold
from subnet_lease.network_config import NetworkConfig
from subnet_lease.store import StoreUnavailable
from tests.testbed.fake_kube import peer_annotations

KEYS = keys_for("flannel.alpha.coreos.com")
CONFIG = NetworkConfig(network=IPv4Network("10.244.0.0/16"))


def node(number: int, *, version: int = 1, cidr: str | None = None, public_ip: str | None = None, **more: str) -> Node:
    annotations = peer_annotations(public_ip or f"192.0.2.{number}", f"02:00:00:00:00:{number:02x}")
    annotations |= {KEYS.name(suffix.replace("_", "-")): value for suffix, value in more.items()}
    return Node(
        Metadata(name=f"n{number}", resource_version=str(version), annotations=annotations),
        NodeSpec(cidr or f"10.244.{number}.0/24"),
    )


def fold() -> NodeFold:
    """Our own node is n1."""
    return NodeFold(KEYS, "n1", CONFIG, lambda _cause: None)


def test_nothing_is_known_before_the_first_list():
    assert not fold().listed


def test_a_heartbeat_changes_nothing_not_even_the_objects():
    known = fold()
    known.relisted([node(1), node(2)])
    leases = known.leases
    known.changed([Change("MODIFIED", node(2, version=9))])
    assert known.leases is leases


@pytest.mark.field_problem(18)
def test_only_the_changed_lease_is_a_new_object():
    known = fold()
    known.relisted(node(i) for i in range(1, 100))
    before = known.leases
    known.changed([Change("MODIFIED", node(7, public_ip="198.51.100.7"))])
    assert [key for key in before if known.leases[key] is not before[key]] == ["10.244.7.0-24"]


@pytest.mark.field_problem(4)
def test_a_new_list_finds_what_changed_and_who_left_and_keeps_the_rest():
    known = fold()
    known.relisted([node(1), node(2), node(3)])
    before = known.leases
    known.relisted([node(1), node(2, backend_data='{"VNI":1,"VtepMAC":"02:aa:00:00:00:02"}')])
    assert set(known.leases) == {"10.244.1.0-24", "10.244.2.0-24"}
    assert known.leases["10.244.1.0-24"] is before["10.244.1.0-24"]
    assert known.leases["10.244.2.0-24"].attrs.backend_data["VtepMAC"] == "02:aa:00:00:00:02"


def test_a_list_that_breaks_off_changes_nothing():
    known = fold()
    known.relisted([node(1), node(2)])
    before = known.leases

    def broken() -> Iterator[Node]:
        yield node(3)
        raise StoreUnavailable("the API server went away")

    with pytest.raises(StoreUnavailable):
        known.relisted(broken())
    assert known.leases is before


def test_a_changed_pod_cidr_alone_moves_the_lease():
    known = fold()
    known.relisted([node(1), node(2)])
    known.changed([Change("MODIFIED", node(2, cidr="10.244.99.0/24"))])
    assert set(known.leases) == {"10.244.1.0-24", "10.244.99.0-24"}


@pytest.mark.field_problem(5)
def test_a_bad_annotation_keeps_the_last_good_lease_and_is_counted_once():
    counted: list[str] = []
    known = NodeFold(KEYS, "n1", CONFIG, counted.append)
    known.relisted([node(1), node(2)])
    before = known.leases
    for version in range(2, 6):
        known.changed([Change("MODIFIED", node(2, version=version, public_ip="garbage"))])
    assert known.leases is before
    assert counted == ["bad_key"]
    known.relisted([node(1), node(2, public_ip="garbage")])
    assert dict(known.leases) == dict(before)


@pytest.mark.field_problem(5)
def test_a_node_that_was_never_good_is_skipped_alone():
    known = fold()
    known.relisted([node(1), node(2, public_ip="garbage"), node(3)])
    assert set(known.leases) == {"10.244.1.0-24", "10.244.3.0-24"}
    known.changed([Change("MODIFIED", node(2))])
    assert "10.244.2.0-24" in known.leases


def test_a_node_that_flannel_no_longer_manages_is_gone():
    known = fold()
    known.relisted([node(1), node(2)])
    known.changed([Change("MODIFIED", node(2, kube_subnet_manager="false"))])
    assert set(known.leases) == {"10.244.1.0-24"}


def test_of_two_nodes_with_one_pod_cidr_the_first_keeps_it_until_it_leaves():
    known = fold()
    known.relisted([node(1), node(2)])
    known.changed([Change("ADDED", node(3, cidr="10.244.2.0/24"))])
    assert known.leases["10.244.2.0-24"].attrs.node.name == "n2"
    known.changed([Change("DELETED", node(2))])
    assert known.leases["10.244.2.0-24"].attrs.node.name == "n3"


def test_nobody_takes_our_own_pod_cidr():
    known = fold()
    known.relisted([node(2, cidr="10.244.1.0/24"), node(1)])
    assert known.leases["10.244.1.0-24"].attrs.node.name == "n1"


STEP = st.tuples(
    st.sampled_from(["ADDED", "MODIFIED", "DELETED"]),
    st.integers(1, 6),
    st.integers(1, 6),
    st.sampled_from(["192.0.2.1", "198.51.100.1", "garbage"]),
)


@given(st.lists(STEP, max_size=25))
def test_any_sequence_of_changes_ends_like_a_list_of_the_same_nodes(steps):
    known = fold()
    known.relisted([])
    nodes: dict[str, Node] = {}
    for kind, number, cidr, public_ip in steps:
        this = node(number, cidr=f"10.244.{cidr}.0/24", public_ip=public_ip)
        known.changed([Change(kind, this)])
        if kind == "DELETED":
            nodes.pop(this.metadata.name, None)
        else:
            nodes[this.metadata.name] = this
    from_changes = dict(known.leases)
    known.relisted(nodes.values())
    assert dict(known.leases) == from_changes
    assert {lease.attrs.node.name for lease in from_changes.values()} <= set(nodes)
