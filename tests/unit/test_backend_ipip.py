"""ipip: the device, the routes through it and past it, and its limits."""

from __future__ import annotations

from dataclasses import replace

import pytest

from backends.backend import BackendError, PeerRefused, Published
from backends.ipip import Ipip
from backends.kernel_state import ROUTE_PROTOCOL, Address, Link, Route
from backends.kernel_state import Ipip as Settings
from tests.unit.backend_values import host, lease, underlay


def test_the_device_has_a_fixed_local_address() -> None:
    nat = host(under=underlay(public4="203.0.113.1"))
    assert tuple(Ipip({}).host_state(nat)) == (
        Link("flannel.ipip", Settings("192.168.64.2", "eth0"), mtu=1480),
        Address("flannel.ipip", "10.5.1.0/32"),
    )
    assert Ipip({}).published(nat) == Published("ipip")


def test_on_loopback_the_routing_table_says_by_which_interface_packets_leave() -> None:
    """Routed hosts have their address there; a device that is bound to loopback finds no route."""
    routed = host(under=replace(underlay(prefixes=()), name="lo", loopback=True))
    assert next(Ipip({}).host_state(routed)) == Link("flannel.ipip", Settings("192.168.64.2", ""), mtu=1480)


def test_a_peer_is_one_onlink_route() -> None:
    assert Ipip({}).peer_state(host(), lease(backend_type="ipip")) == (
        Route("10.5.2.0/24", "flannel.ipip", via="192.168.64.3", onlink=True),
    )


def test_direct_routing_goes_past_the_device_only_on_the_link() -> None:
    backend = Ipip({"directrouting": True})
    near, far = lease(backend_type="ipip"), lease(3, "ipip", public4="198.51.100.7")
    assert backend.peer_state(host(), near) == (
        Route("10.5.2.0/24", "eth0", via="192.168.64.3", protocol=ROUTE_PROTOCOL),
    )
    assert backend.peer_state(host(), far) == (Route("10.5.3.0/24", "flannel.ipip", via="198.51.100.7", onlink=True),)


def test_its_limits_are_named() -> None:
    with pytest.raises(BackendError, match="MTU 87 of eth0"):
        Ipip({}).mtu(underlay(mtu=87), (4,))
    with pytest.raises(BackendError, match="IPv4 only"):
        Ipip({}).published(host(v6=True))
    with pytest.raises(BackendError, match="eth0 has no IPv4 address"):
        Ipip({}).published(host(under=underlay(v4=None)))
    with pytest.raises(PeerRefused, match="no IPv4 subnet"):
        Ipip({}).peer_state(host(), lease(v4=False, v6=True))
    with pytest.raises(BackendError, match="DirectRouting 1"):
        Ipip({"DirectRouting": 1})
    assert Ipip({"MTU": 1}).unknown_options == ("MTU",)
    assert not Ipip({}).accepts(lease())
