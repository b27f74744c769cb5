"""What is applied is observed, by every road: acknowledgements, the kernel's messages, a fresh look."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from backends.kernel_state import (
    Address,
    Change,
    FdbEntry,
    Foreign,
    Kind,
    Link,
    Neighbour,
    Record,
    Route,
    RouteLookup,
    Scope,
)
from flanneld.dataplane.dataplane import Dataplane
from tests.kernel.netlink_host import DEV, DEV6, DIRECT, HOST, LINK, LINK6, Host, open_host, peer, peer6


@pytest.fixture
def host() -> Iterator[Host]:
    with open_host("observe") as host:
        yield host


EVERYTHING: list[Record] = [*peer(1), *peer(2), *peer6(1), *peer6(2), *DIRECT]


def asked(state: dict[Any, Record]) -> list[Record]:
    """The state without what the kernel adds by itself, and without what we did not ask about links."""
    kept = [r for r in state.values() if not (isinstance(r, Route) and r.protocol == 2)]
    return sorted((replace(r, tx_checksum=None) if isinstance(r, Link) else r for r in kept), key=str)


def test_a_fresh_look_shows_exactly_what_was_applied(host: Host) -> None:
    host.establish(*EVERYTHING)
    assert asked(dict(host.observe().state)) == sorted([*HOST, *EVERYTHING], key=str)
    assert asked(host.fresh()) == sorted([*HOST, *EVERYTHING], key=str)


@pytest.mark.field_problem(19)
def test_a_second_dataplane_with_no_memory_sees_the_same(host: Host) -> None:
    host.establish(*EVERYTHING)
    other = Dataplane()
    try:
        assert dict(other.observe(host.scope).state) == dict(host.observe().state)
    finally:
        other.close()


def test_own_writes_are_not_news_and_the_idle_dataplane_is_silent(host: Host) -> None:
    host.establish(*EVERYTHING)
    host.quiet()
    before = host.observe()
    assert host.put(*EVERYTHING) == []
    assert host.dataplane.apply([Change("remove", r, r) for r in peer(2)]) == []
    seen = host.observe()
    assert seen.changed == frozenset()
    assert seen.interfaces is before.interfaces
    assert all(r.key not in seen.state for r in peer(2))
    assert asked(dict(seen.state)) == asked(host.fresh())


def test_everything_can_be_removed_again(host: Host) -> None:
    host.establish(*EVERYTHING)
    links = [r for r in HOST if isinstance(r, Link)]
    others = [r for r in (*HOST, *EVERYTHING) if r.key[0] != Kind.SYSCTL and r not in links]
    assert host.dataplane.apply([Change("remove", r, r) for r in reversed(others)]) == []
    left = asked(host.fresh())
    assert [r for r in left if r.key[0] != Kind.SYSCTL] == links[::-1]
    assert host.dataplane.apply([Change("remove", r, r) for r in links]) == []
    assert asked(host.fresh()) == []


def test_removing_what_is_gone_is_success(host: Host) -> None:
    host.establish(*EVERYTHING)
    gone = [Change("remove", r, r) for r in (*EVERYTHING, Address(DEV, "10.5.0.0/32"))]
    assert host.dataplane.apply(gone) == []
    assert host.dataplane.apply(gone) == []
    assert host.dataplane.apply([Change("remove", LINK, LINK)]) == []
    assert host.dataplane.apply([Change("remove", LINK, LINK), *gone]) == []


def test_interfaces_have_their_addresses(host: Host) -> None:
    host.quiet()
    seen = host.observe()
    (eth0,) = [i for i in seen.interfaces if i.name == "eth0"]
    assert (eth0.mtu, eth0.up, eth0.kind, eth0.loopback) == (1500, True, "veth", False)
    texts = {a.address: a for a in eth0.addresses}
    assert texts["192.168.7.1/16"].permanent and texts["192.168.7.1/16"].scope == 0
    assert "fd00:7::1/64" in texts
    host.ip("addr add 192.168.7.9/16 dev eth0")
    host.ip("addr add 10.9.9.9/32 dev eth0 scope link")
    (eth0,) = [i for i in host.observe().interfaces if i.name == "eth0"]
    texts = {a.address: a for a in eth0.addresses}
    assert texts["192.168.7.9/16"].secondary and texts["10.9.9.9/32"].scope == 253
    host.ip("link set eth0 mtu 1400")
    (eth0,) = [i for i in host.observe().interfaces if i.name == "eth0"]
    assert eth0.mtu == 1400
    assert host.observe().interfaces == host.observe().interfaces


def test_devices_that_flannel_would_name_so_are_seen_even_if_not_wanted(host: Host) -> None:
    host.ip("link add flannel.7 type vxlan id 7 dev eth0 local 192.168.7.1 dstport 8472 nolearning")
    host.ip("link add flannel-wg type bridge")
    seen = host.observe().state
    mine = seen[(Kind.LINK, "flannel.7")]
    assert isinstance(mine, Link)
    assert mine.settings == replace(LINK.settings, vni=7)
    other = seen[(Kind.LINK, "flannel-wg")]
    assert isinstance(other, Link) and other.settings == Foreign("bridge")


def test_a_vxlan_device_that_learns_destinations_otherwise_is_not_taken_for_ours(host: Host) -> None:
    host.ip(f"link add {DEV} type vxlan id 1 dev eth0 local 192.168.7.1 dstport 8472 group 239.1.1.1")
    link = host.observe().state[(Kind.LINK, DEV)]
    assert isinstance(link, Link) and link.settings == Foreign("vxlan")


@pytest.mark.field_problem(19)
def test_foreign_state_is_left_out_and_left_alone(host: Host) -> None:
    host.establish(*peer(1))
    host.ip("neigh add 192.168.7.77 lladdr 02:00:00:00:00:77 dev eth0 nud permanent")
    host.ip("route add 172.30.0.0/16 via 192.168.7.5")
    host.ip("route add 10.5.9.0/24 via 192.168.7.5")
    host.ip("route add 10.5.10.0/24 via 192.168.7.5 table 99")
    host.ip("rule add from 10.5.0.0/16 lookup 99")
    host.ip(f"neigh add proxy 10.5.44.4 dev {DEV}")
    host.ip(f"neigh add 10.5.45.4 lladdr 02:00:00:00:00:45 dev {DEV} nud reachable")
    host.bridge(f"fdb append 00:00:00:00:00:00 dst 192.168.7.88 dev {DEV}")
    host.bridge(f"fdb add 02:00:00:00:00:46 dst 192.168.7.88 dev {DEV} dynamic")
    for state in (dict(host.observe().state), host.fresh()):
        assert {str(r.key[1:]) for r in state.values() if r.key[0] in (Kind.NEIGHBOUR, Kind.FDB)} == {
            str(r.key[1:]) for r in peer(1)[:2]
        }
        routes = {r.dst: r for r in state.values() if isinstance(r, Route)}
        # Inside our network, so it is visible; its protocol says that it is not ours.
        assert routes["10.5.9.0/24"] == Route("10.5.9.0/24", "eth0", "192.168.7.5")
        assert routes.keys() & {"172.30.0.0/16", "10.5.10.0/24", "192.168.0.0/16"} == set()
    before = (
        host.ip("route show table all"),
        host.ip("neigh show dev eth0 nud permanent"),
        host.bridge(f"fdb show dev {DEV}"),
    )
    assert host.put(*HOST, *peer(1)) == []
    assert before == (
        host.ip("route show table all"),
        host.ip("neigh show dev eth0 nud permanent"),
        host.bridge(f"fdb show dev {DEV}"),
    )


def test_odd_routes_are_seen_as_other_and_can_be_replaced(host: Host) -> None:
    host.establish(*peer(1), *peer6(1))
    route, route6 = peer(3)[2], peer6(3)[2]
    host.ip("route add 10.5.3.0/24 nexthop via 192.168.7.5 dev eth0 nexthop via 192.168.7.6 dev eth0")
    host.ip("route add fd05:0:3::/64 nexthop via fd00:7::5 dev eth0 nexthop via fd00:7::6 dev eth0")
    host.ip("route add unreachable 10.5.4.0/24")
    host.ip("route add 10.5.5.0/24 via 192.168.7.5 mtu 1000")
    for state in (dict(host.observe().state), host.fresh()):
        for dst in ("10.5.3.0/24", "fd05:0:3::/64", "10.5.4.0/24", "10.5.5.0/24"):
            found = state[(Kind.ROUTE, dst, None)]
            assert isinstance(found, Route) and found.type == "other"
    assert host.put(route, route6) == []
    state = host.fresh()
    assert state[route.key] == route
    assert state[route6.key] == route6


def test_two_routes_with_one_key_show_the_one_in_use(host: Host) -> None:
    host.establish(*peer(1))
    route = peer(1)[2]
    host.ip("route append 10.5.1.0/24 via 192.168.7.5")
    assert host.observe().state[route.key] == route == host.fresh()[route.key]
    host.ip("route del 10.5.1.0/24 via 192.168.7.5")
    assert host.observe().state[route.key] == route
    host.ip("route prepend 10.5.1.0/24 via 192.168.7.5")
    assert host.observe().state[route.key] == Route("10.5.1.0/24", "eth0", "192.168.7.5") == host.fresh()[route.key]
    assert host.dataplane.apply([Change("remove", Route("10.5.1.0/24", "eth0", "192.168.7.5"))]) == []
    assert host.observe().state[route.key] == route


def test_a_wider_scope_shows_more_and_says_that_all_may_have_changed(host: Host) -> None:
    host.ip("route add 10.77.1.0/24 via 192.168.7.5")
    assert host.observe().changed is None
    assert host.observe().changed == frozenset()
    assert (Kind.ROUTE, "10.77.1.0/24", None) not in host.observe().state
    host.scope = replace(host.scope, networks=("10.77.0.0/16",))
    seen = host.observe()
    assert seen.changed is None
    assert (Kind.ROUTE, "10.77.1.0/24", None) in seen.state
    host.scope = Scope()
    assert not host.observe().state


def test_route_lookups_and_default_routes(host: Host) -> None:
    dataplane = host.dataplane
    assert dataplane.default_routes(4) == dataplane.default_routes(6) == ()
    assert dataplane.lookup("8.8.8.8") is None
    host.ip("route add default via 192.168.7.254 metric 200")
    host.ip("route add default via 192.168.7.253 metric 100 src 192.168.7.1")
    host.ip("-6 route add default via fd00:7::fe")
    assert dataplane.default_routes(4) == (
        RouteLookup("eth0", "192.168.7.253", "192.168.7.1"),
        RouteLookup("eth0", "192.168.7.254", None),
    )
    assert dataplane.default_routes(6) == (RouteLookup("eth0", "fd00:7::fe", None),)
    found = dataplane.lookup("8.8.8.8")
    assert found is not None and (found.dev, found.via, found.src) == ("eth0", "192.168.7.253", "192.168.7.1")
    found = dataplane.lookup("192.168.7.5")
    assert found is not None and (found.dev, found.via, found.src) == ("eth0", None, "192.168.7.1")
    found = dataplane.lookup("fd00:7::5")
    assert found is not None and (found.dev, found.via, found.src) == ("eth0", None, "fd00:7::1")


def test_default_routes_are_followed(host: Host) -> None:
    host.observe()
    dataplane = host.dataplane
    assert dataplane.default_routes(4) == ()
    host.ip("route add default via 192.168.7.254")
    assert dataplane.default_routes(4) == (RouteLookup("eth0", "192.168.7.254", None),)
    host.ip("route replace default nexthop via 192.168.7.251 nexthop via 192.168.7.252")
    assert dataplane.default_routes(4) == (RouteLookup("eth0", "192.168.7.251", None),)
    host.ip("-6 route add default nexthop via fd00:7::a nexthop via fd00:7::b")
    assert dataplane.default_routes(6) == (RouteLookup("eth0", "fd00:7::a", None),)
    host.ip("link set eth0 down")  # without a word about IPv4
    assert dataplane.default_routes(4) == ()


@pytest.mark.parametrize(
    "record", [FdbEntry(DEV, "0a:58:00:01:00:01", "192.168.9.9"), Neighbour(DEV6, "fd05::9", "0a:58:00:00:00:09")]
)
def test_a_changed_record_is_put_over_the_old_one(host: Host, record: Record) -> None:
    host.establish(*peer(1), *peer6(1))
    assert host.put(record) == []
    assert host.fresh()[record.key] == record
    assert LINK6.key in host.observe().state
