"""flannel's annotations, read and rendered."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from subnet_lease.kube_annotations import (
    BadNode,
    BadPrefix,
    compact_json,
    difference,
    keys_for,
    overwritten,
    parse_lease,
    pod_cidrs,
    public_address_hint,
    removed,
    rendered,
)
from subnet_lease.lease import LeaseAttrs, NodeIdentity
from subnet_lease.network_config import NetworkConfig

KEYS = keys_for("flannel.alpha.coreos.com")
V4 = NetworkConfig(network=IPv4Network("10.244.0.0/16"))
DUAL = NetworkConfig(enable_ipv6=True, network=V4.network, ipv6_network=IPv6Network("fd00:10::/48"))
VXLAN = LeaseAttrs(
    public_ip=IPv4Address("192.0.2.7"),
    backend_type="vxlan",
    backend_data={"VNI": 1, "VtepMAC": "c6:d2:32:6f:8f:44"},
)
ON_THE_NODE = {
    "flannel.alpha.coreos.com/backend-data": '{"VNI":1,"VtepMAC":"c6:d2:32:6f:8f:44"}',
    "flannel.alpha.coreos.com/backend-type": "vxlan",
    "flannel.alpha.coreos.com/kube-subnet-manager": "true",
    "flannel.alpha.coreos.com/public-ip": "192.0.2.7",
}


@pytest.mark.parametrize(
    ("prefix", "name"),
    [
        ("flannel.alpha.coreos.com", "flannel.alpha.coreos.com/public-ip"),
        ("flannel.alpha.coreos.com/", "flannel.alpha.coreos.com/public-ip"),
        ("example.org/one", "example.org/one-public-ip"),
        ("example.org/one-", "example.org/one-public-ip"),
    ],
)
def test_a_prefix_is_completed_as_flannel_completes_it(prefix, name):
    assert keys_for(prefix).name("public-ip") == name


@pytest.mark.parametrize("prefix", ["", "a/b/c", "nodots", "Example.org", "example.org/One", "example.org/a b"])
def test_an_impossible_prefix_is_refused_by_name(prefix):
    with pytest.raises(BadPrefix, match="--kube-annotation-prefix"):
        keys_for(prefix)


def test_annotations_are_flannels_byte_for_byte():
    wanted = {name: value for name, value in rendered(KEYS, VXLAN).items() if value is not None}
    assert wanted == ON_THE_NODE


def test_a_backend_without_data_publishes_null_in_each_family_that_it_runs():
    attrs = LeaseAttrs(IPv4Address("192.0.2.7"), IPv6Address("2001:db8::7"), "host-gw")
    wanted = rendered(KEYS, attrs)
    assert wanted[KEYS.name("backend-data")] == "null"
    assert wanted[KEYS.name("backend-v6-data")] == "null"
    assert wanted[KEYS.name("public-ipv6")] == "2001:db8::7"


def test_a_family_that_is_not_run_leaves_nothing_behind():
    stale = ON_THE_NODE | {KEYS.name("public-ipv6"): "2001:db8::7", KEYS.name("backend-v6-data"): "null"}
    assert difference(rendered(KEYS, VXLAN), stale) == {
        KEYS.name("public-ipv6"): None,
        KEYS.name("backend-v6-data"): None,
    }


def test_nothing_is_written_where_nothing_differs():
    assert difference(rendered(KEYS, VXLAN), ON_THE_NODE) == {}


def test_everything_written_is_removed_on_release():
    assert set(removed(KEYS)) == set(rendered(KEYS, VXLAN))


def test_a_node_reads_back_as_what_it_published():
    lease = parse_lease(KEYS, V4, "n7", ON_THE_NODE, ["10.244.7.0/24"])
    assert lease is not None
    assert lease.key == "10.244.7.0-24"
    assert lease.attrs == LeaseAttrs(VXLAN.public_ip, None, "vxlan", VXLAN.backend_data, None, node=NodeIdentity("n7"))


@pytest.mark.field_problem(6)
def test_both_families_are_read():
    v6 = {
        KEYS.name("public-ipv6"): "2001:db8::7",
        KEYS.name("backend-v6-data"): '{"VNI":1,"VtepMAC":"02:00:00:00:00:06"}',
    }
    lease = parse_lease(KEYS, DUAL, "n7", ON_THE_NODE | v6, ["10.244.7.0/24", "fd00:10:0:7::/64"])
    assert lease is not None
    assert lease.ipv6_subnet == IPv6Network("fd00:10:0:7::/64")
    assert lease.attrs.backend_v6_data == {"VNI": 1, "VtepMAC": "02:00:00:00:00:06"}
    assert lease.attrs.public_ipv6 == IPv6Address("2001:db8::7")


def test_a_family_that_the_configuration_turns_off_is_not_read():
    v6 = {KEYS.name("public-ipv6"): "2001:db8::7"}
    lease = parse_lease(KEYS, V4, "n7", ON_THE_NODE | v6, ["10.244.7.0/24", "fd00:10:0:7::/64"])
    assert lease is not None
    assert lease.ipv6_subnet is None
    assert lease.attrs.public_ipv6 is None


def test_in_a_dual_stack_cluster_a_node_with_one_family_still_counts_in_that_one():
    lease = parse_lease(KEYS, DUAL, "n7", ON_THE_NODE, ["10.244.7.0/24"])
    assert lease is not None
    assert (lease.subnet, lease.ipv6_subnet) == (IPv4Network("10.244.7.0/24"), None)


@pytest.mark.parametrize("value", [None, "", "false", "True"])
def test_a_node_that_no_flannel_manages_is_ignored(value):
    annotations = {k: v for k, v in ON_THE_NODE.items() if "kube-subnet-manager" not in k}
    if value is not None:
        annotations[KEYS.name("kube-subnet-manager")] = value
    assert parse_lease(KEYS, V4, "n7", annotations, ["10.244.7.0/24"]) is None


@pytest.mark.field_problem(5)
@pytest.mark.parametrize(
    ("change", "cidrs", "names"),
    [
        ({"public-ip": "not-an-ip"}, ["10.244.7.0/24"], "public-ip"),
        ({"public-ip": "2001:db8::1"}, ["10.244.7.0/24"], "public-ip"),
        ({"backend-data": '{"VNI":'}, ["10.244.7.0/24"], "backend-data"),
        ({"backend-data": "[" * 100_000}, ["10.244.7.0/24"], "backend-data"),
        ({}, [], "podCIDR"),
        ({}, ["10.244.7.0/99"], "podCIDR"),
        ({}, ["10.244.7.0/24", "10.244.8.0/24"], "two IPv4 podCIDRs"),
        ({"public-ip": ""}, ["10.244.7.0/24"], "public address"),
    ],
)
def test_what_cannot_be_read_is_named(change, cidrs, names):
    annotations = ON_THE_NODE | {KEYS.name(suffix): value for suffix, value in change.items()}
    with pytest.raises(BadNode, match=names):
        parse_lease(KEYS, V4, "n7", annotations, cidrs)


def test_an_overwrite_annotation_wins_over_our_own_address():
    found = overwritten(KEYS, VXLAN, {KEYS.name("public-ip-overwrite"): "198.51.100.1"})
    assert found.public_ip == IPv4Address("198.51.100.1")
    assert found.backend_data == VXLAN.backend_data
    assert found.behind_nat == (4,), "nobody has that address on its link, whatever it looks like"
    assert rendered(KEYS, found)[KEYS.name("behind-nat")] == "true"


@pytest.mark.parametrize(("families", "family"), [((4,), "4"), ((6,), "6"), ((4, 6), None)])
def test_behind_nat_is_said_once_for_all_families_or_with_the_one(families, family):
    attrs = replace(VXLAN, public_ipv6=IPv6Address("2001:db8::7"), node=NodeIdentity("n7"), behind_nat=families)
    written = rendered(KEYS, attrs)
    assert (written[KEYS.name("behind-nat")], written[KEYS.name("behind-nat-family")]) == ("true", family)
    annotations = {name: value for name, value in written.items() if value is not None}
    lease = parse_lease(KEYS, DUAL, "n7", annotations, ["10.244.7.0/24", "fd00:10:0:7::/64"])
    assert lease is not None and lease.attrs == attrs


def test_an_overwrite_of_a_family_that_is_not_run_has_no_effect():
    found = overwritten(KEYS, VXLAN, {KEYS.name("public-ipv6-overwrite"): "2001:db8::1"})
    assert found.public_ipv6 is None


def test_hints_are_the_operators_addresses():
    annotations = {KEYS.name("node-public-ip"): "198.51.100.1", KEYS.name("node-public-ipv6"): "2001:db8::1"}
    assert public_address_hint(KEYS, annotations) == (IPv4Address("198.51.100.1"), IPv6Address("2001:db8::1"))
    with pytest.raises(BadNode, match="node-public-ip"):
        public_address_hint(KEYS, {KEYS.name("node-public-ip"): "eth0"})


def test_host_bits_in_a_pod_cidr_are_masked():
    assert pod_cidrs(["10.244.7.1/24"]) == (IPv4Network("10.244.7.0/24"), None)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(JSON)
def test_json_is_compact_and_reads_back(value):
    text = compact_json(value)
    assert json.loads(text) == value
    assert not set("<>&") & set(text)


@given(st.dictionaries(st.sampled_from(sorted(rendered(KEYS, VXLAN))), st.text()), st.lists(st.text(), max_size=3))
def test_no_annotation_makes_the_parser_fail_in_another_way(annotations, cidrs):
    annotations[KEYS.name("kube-subnet-manager")] = "true"
    with contextlib.suppress(BadNode):
        parse_lease(KEYS, DUAL, "n7", annotations, cidrs)
