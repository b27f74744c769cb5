"""host-gw: which routes, and which peers and hosts it refuses."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.backend import BackendError, PeerRefused, Published
from backends.host_gw import HostGw
from backends.kernel_state import ROUTE_PROTOCOL, Route
from tests.unit.backend_values import host, lease, underlay


def test_a_peer_is_one_tagged_route_on_the_underlay() -> None:
    assert HostGw({}).peer_state(host(), lease()) == (
        Route("10.5.2.0/24", "eth0", via="192.168.64.3", protocol=ROUTE_PROTOCOL),
    )


def test_dual_stack_is_one_route_a_family() -> None:
    assert HostGw({}).peer_state(host(v6=True), lease(v6=True)) == (
        Route("10.5.2.0/24", "eth0", via="192.168.64.3", protocol=ROUTE_PROTOCOL),
        Route("fc00:0:0:2::/64", "eth0", via="2001:db8:64::3", protocol=ROUTE_PROTOCOL),
    )


def test_ipv6_only() -> None:
    assert HostGw({}).peer_state(host(v4=False, v6=True), lease(v4=False, v6=True)) == (
        Route("fc00:0:0:2::/64", "eth0", via="2001:db8:64::3", protocol=ROUTE_PROTOCOL),
    )


def test_a_family_that_we_do_not_run_is_left_out() -> None:
    (route,) = HostGw({}).peer_state(host(), lease(v6=True))
    assert route.dst == "10.5.2.0/24"


def test_a_peer_behind_a_router_is_refused_with_the_reason() -> None:
    with pytest.raises(PeerRefused) as refusal:
        HostGw({}).peer_state(host(), lease(public4="203.0.113.9"))
    for word in ("10.5.2.0/24", "203.0.113.9", "eth0", "192.168.64.0/24", "vxlan"):
        assert word in str(refusal.value)


def test_a_peer_with_our_own_address_is_refused() -> None:
    with pytest.raises(PeerRefused, match="own address"):
        HostGw({}).peer_state(host(), lease(public4="192.168.64.2"))


@pytest.mark.field_problem(6)
def test_a_peer_off_link_in_one_family_keeps_the_other() -> None:
    with pytest.raises(PeerRefused, match="2001:db8:ffff::3") as refusal:
        HostGw({}).peer_state(host(v6=True), lease(v6=True, public6="2001:db8:ffff::3"))
    assert refusal.value.records == (Route("10.5.2.0/24", "eth0", via="192.168.64.3", protocol=ROUTE_PROTOCOL),)


@pytest.mark.parametrize("question", ["published", "host_state"])
def test_a_host_behind_nat_is_refused_with_the_remedy(question: str) -> None:
    behind = host(under=underlay(public4="203.0.113.1"))
    with pytest.raises(BackendError, match=r"203\.0\.113\.1 is not the address 192\.168\.64\.2 of eth0.*--public-ip"):
        getattr(HostGw({}), question)(behind)


def test_nothing_but_the_type_is_published_and_the_mtu_is_the_interface_s() -> None:
    backend = HostGw({"Port": 1})
    assert backend.published(host(leased=False)) == Published("host-gw")
    assert backend.mtu(underlay(mtu=9000), (4, 6)) == 9000
    assert tuple(backend.host_state(host())) == ()
    assert backend.unknown_options == ("Port",)


def test_leases_of_other_backends_are_no_peers() -> None:
    assert HostGw({}).accepts(lease())
    assert not HostGw({}).accepts(lease(backend_type="vxlan"))
    assert not HostGw({}).accepts(lease(backend_type=""))


@given(number=st.integers(2, 255), address=st.integers(0, 2**32 - 1))
def test_every_peer_gets_exactly_its_route_or_a_refusal_that_names_it(number: int, address: int) -> None:
    gateway = IPv4Address(address)
    peer = lease(number, public4=str(gateway))
    try:
        (route,) = HostGw({}).peer_state(host(), peer)
    except PeerRefused as refusal:
        assert peer.cidr in str(refusal)
        assert str(gateway) in str(refusal)
    else:
        assert gateway in IPv4Network("192.168.64.0/24")
        assert (route.dst, route.via) == (f"10.5.{number}.0/24", str(gateway))
