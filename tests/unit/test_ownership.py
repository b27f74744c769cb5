"""What is ours, without memory; nothing foreign ever."""

from __future__ import annotations

from ipaddress import IPv4Network

import pytest

from backends.kernel_state import (
    ROUTE_PROTOCOL,
    Address,
    FdbEntry,
    Interface,
    InterfaceAddress,
    Link,
    Neighbour,
    Route,
    Vxlan,
)
from flanneld.ownership import ownership, with_marked_routes

NETWORK = IPv4Network("10.5.0.0/16")


def interface(name, address, kind="vxlan"):
    return Interface(name, 1, 1450, True, None, kind, False, (InterfaceAddress(address),))


def link(name):
    return Link(name, Vxlan(1, "192.0.2.1", "eth0"), 1450)


INTERFACES = (
    interface("flannel.1", "10.5.1.0/32"),
    interface("flannel.7", "10.99.1.0/32"),
    interface("eth0", "192.0.2.1/24", None),
    interface("cni0", "10.5.1.1/24", "bridge"),
    interface("flannel-wg", "10.5.1.0/32", "wireguard"),
)
owned = ownership(INTERFACES, [NETWORK], frozenset({"flannel.1"}))


@pytest.mark.parametrize(
    "record",
    [
        link("flannel.1"),
        link("flannel-wg"),
        Address("flannel.1", "10.9.9.9/32"),
        Neighbour("flannel.1", "10.5.2.0", "02:00:00:00:00:02"),
        FdbEntry("flannel.1", "02:00:00:00:00:02", "192.0.2.2"),
        Route("10.5.2.0/24", "flannel.1", via="10.5.2.0", onlink=True),
        Route("10.5.2.0/24", "eth0", via="192.0.2.2", protocol=ROUTE_PROTOCOL),
        Route("10.5.1.0/24", None, type="blackhole", protocol=ROUTE_PROTOCOL, metric=4096),
    ],
)
def test_ours(record):
    assert owned(record)


def test_without_a_known_network_the_protocol_number_tells_our_routes() -> None:
    ours = with_marked_routes(ownership(INTERFACES, [], frozenset()), [IPv4Network("10.99.0.0/16")])
    assert ours(Route("10.5.2.0/24", "eth0", via="192.0.2.2", protocol=ROUTE_PROTOCOL))
    assert ours(Route("10.5.1.0/24", None, type="blackhole", protocol=ROUTE_PROTOCOL, metric=4096))
    assert not ours(Route("10.99.2.0/24", "eth0", via="192.0.2.2", protocol=ROUTE_PROTOCOL))  # a second daemon's
    assert not ours(Route("10.5.2.0/24", "eth0", via="192.0.2.2", protocol=3))
    assert not ours(link("flannel.7"))


@pytest.mark.parametrize(
    "record",
    [
        link("flannel.7"),
        link("cni0"),
        link("flannel"),
        Address("cni0", "10.5.1.1/24"),
        Neighbour("eth0", "192.0.2.9", "02:00:00:00:00:02"),
        FdbEntry("flannel.7", "02:00:00:00:00:02", "192.0.2.2"),
        Route("10.5.1.0/24", "cni0", protocol=2),
        Route("10.5.1.0/32", "flannel.1", protocol=2),
        Route("10.5.2.0/24", "eth0", via="192.0.2.2", protocol=4),
        Route("10.99.2.0/24", "eth0", via="192.0.2.2", protocol=ROUTE_PROTOCOL),
    ],
)
def test_foreign(record):
    assert not owned(record)
