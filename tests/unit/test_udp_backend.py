"""The udp backend: which records, what it publishes, whom it takes for a peer, and what it refuses."""

from __future__ import annotations

import pytest

from backends.backend import BackendError, PeerRefused, Published
from backends.kernel_state import Address, Link, Route, Tun, UdpPeer
from backends.udp import Udp
from tests.unit.backend_values import host, lease, underlay


def test_a_host_is_a_tun_device_its_address_and_a_route_to_the_whole_network() -> None:
    assert list(Udp({}).host_state(host())) == [
        Link("flannel0", Tun("192.168.64.2", 8285, "eth0", "10.5.0.0/16"), 1472),
        Address("flannel0", "10.5.1.0/32"),
        Route("10.5.0.0/16", "flannel0"),
    ]


def test_a_host_without_a_lease_makes_nothing() -> None:
    assert list(Udp({}).host_state(host(leased=False))) == []


def test_the_socket_is_bound_to_the_local_address_when_the_public_one_is_another() -> None:
    link = next(iter(Udp({}).host_state(host(under=underlay(public4="203.0.113.9")))))
    assert isinstance(link, Link) and isinstance(link.settings, Tun)
    assert link.settings.local == "192.168.64.2"


def test_a_peer_is_reached_at_its_public_address_and_our_own_port() -> None:
    assert Udp({"port": 7777}).peer_state(host(), lease(backend_type="")) == (
        UdpPeer("flannel0", "10.5.2.0/24", "192.168.64.3", 7777),
    )


def test_it_publishes_no_type_as_flannel_does() -> None:
    assert Udp({}).published(host()) == Published("")


@pytest.mark.parametrize(("theirs", "ours"), [("", True), ("udp", True), ("vxlan", False), ("host-gw", False)])
def test_leases_without_a_type_are_peers(theirs: str, ours: bool) -> None:
    assert Udp({}).accepts(lease(backend_type=theirs)) is ours


@pytest.mark.parametrize("mtu", [1500, 9000, 1280])
def test_the_mtu_leaves_room_for_an_outer_header(mtu: int) -> None:
    assert Udp({}).mtu(underlay(mtu=mtu), (4,)) == mtu - 28


@pytest.mark.parametrize("public", ["192.168.64.2", "127.0.0.1", "0.0.0.0", None])
def test_a_peer_with_an_impossible_address_is_refused(public: str | None) -> None:
    with pytest.raises(PeerRefused):
        Udp({}).peer_state(host(), lease(public4=public))


def test_a_peer_without_an_ipv4_subnet_is_refused() -> None:
    with pytest.raises(PeerRefused, match="IPv4 only"):
        Udp({}).peer_state(host(), lease(v4=False, v6=True))


@pytest.mark.parametrize("port", [0, 65536, "8285", -1])
def test_a_bad_port_is_named(port: object) -> None:
    with pytest.raises(BackendError, match="Port"):
        Udp({"Port": port})


def test_options_that_nothing_reads_are_told() -> None:
    assert Udp({"Port": 8285, "VNI": 3}).unknown_options == ("VNI",)


def test_dual_stack_is_refused_with_the_remedy() -> None:
    with pytest.raises(BackendError, match="EnableIPv6"):
        Udp({}).published(host(v6=True))


def test_no_ipv4_address_on_the_underlay_is_named() -> None:
    with pytest.raises(BackendError, match="eth0 has no IPv4 address"):
        list(Udp({}).host_state(host(under=underlay(v4=None))))
