"""Policy routing for a tunnel's own packets: made, seen, repaired and removed, and what it does to packets."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from dataclasses import replace
from socket import AF_INET
from typing import Literal

import pytest

from backends.kernel_state import ROUTE_PROTOCOL, Change, Route, Uplink
from flanneld.dataplane.netlink import Netlink, NetlinkError
from flanneld.dataplane.uplink import UplinkHandler
from flanneld.dataplane.wire import RTM_GETROUTE, RTM_NEWRULE
from flanneld.ownership import ownership
from tests.kernel.netlink_host import Host, open_host

pytestmark = pytest.mark.field_problem(34)

WG, WG6 = "flannel-wg", "flannel-wg-v6"


def way(dst: str, via: str | None, src: str) -> Route:
    scoped = via is None and ":" not in dst
    return Route(dst, "eth1", via, onlink=via is not None, src=src, link_scope=scoped, protocol=ROUTE_PROTOCOL)


V4 = Uplink(WG, 4, 51820, (way("0.0.0.0/0", "172.31.0.1", "172.31.0.11"), way("172.31.0.0/24", None, "172.31.0.11")))
V6 = Uplink(WG6, 6, 51821, (way("2001:db8:31::/64", None, "2001:db8:31::b"), way("::/0", "fe80::1", "2001:db8:31::b")))


@pytest.fixture
def host() -> Iterator[Host]:
    """eth0 has the default routes, eth1 another one behind it."""
    with open_host("upl", UplinkHandler) as host:
        host.ip("link add eth1 type veth peer name cable1")
        for dev in ("cable1", "eth1"):
            host.ip(f"link set {dev} up")
        host.ip("addr add 172.31.0.11/24 dev eth1")
        host.ip("addr add 2001:db8:31::b/64 dev eth1 nodad")
        host.ip("route add default via 192.168.7.254 dev eth0")
        host.ip("-6 route add default via fd00:7::fe dev eth0")
        host.quiet()
        yield host


def rules(host: Host) -> str:
    return "".join(re.findall(r".* proto 241.*\n", host.ip("rule") + host.ip("-6 rule")))


def all_text(host: Host) -> str:
    """Rules and routes, without those of link-local addresses, which come seconds after their interface."""
    text = "".join(host.ip(f"{family} {what}") for family in ("-4", "-6") for what in ("rule", "route show table all"))
    return re.sub(r"^((local|anycast|multicast) )?(fe80:\S*|ff00::/8) .*\n", "", text, flags=re.MULTILINE)


def test_what_ip_shows_and_what_packets_do_and_the_removal_leaves_nothing(host: Host) -> None:
    before = all_text(host)
    assert host.put(V4, V6) == []
    ours = "from all iif lo ipproto udp sport"
    assert rules(host).splitlines() == [
        f"2410:\t{ours} 51820 lookup 2410 suppress_prefixlength 0 proto 241",
        f"2411:\t{ours} 51820 lookup main suppress_prefixlength 0 proto 241",
        f"2412:\t{ours} 51820 lookup 2410 proto 241",
        f"2420:\t{ours} 51821 lookup 2420 suppress_prefixlength 0 proto 241",
        f"2421:\t{ours} 51821 lookup main suppress_prefixlength 0 proto 241",
        f"2422:\t{ours} 51821 lookup 2420 proto 241",
    ]
    udp = "ipproto udp sport 51820"
    assert "via 172.31.0.1 dev eth1 table 2410 src 172.31.0.11" in host.ip(f"route get 203.0.113.9 {udp}")
    assert "172.31.0.9 dev eth1 table 2410 src 172.31.0.11" in host.ip(f"route get 172.31.0.9 {udp}")
    assert "dev eth0" in host.ip("route get 203.0.113.9 ipproto udp sport 51822")
    host.ip("route add 198.51.100.0/24 via 192.168.7.253")
    assert "via 192.168.7.253 dev eth0" in host.ip(f"route get 198.51.100.9 {udp}"), "the operator says more"
    host.ip("route del 198.51.100.0/24")
    assert "dev eth0" in host.ip("route get 203.0.113.9 ipproto tcp sport 51820")
    assert "via fe80::1 dev eth1" in host.ip("route get 2001:db8:99::9 ipproto udp sport 51821")
    seen = host.observe().state
    assert (seen[V4.key], seen[V6.key]) == (V4, V6)
    assert host.dataplane.apply([Change("remove", V4, V4), Change("remove", V6, V6)]) == []
    assert V4.key not in host.observe().state and V6.key not in host.observe().state
    assert all_text(host) == before


def test_what_a_container_sends_from_that_port_is_not_ours(host: Host) -> None:
    host.put(V4)
    host.ip("link add cni0 type veth peer name c0")
    host.ip("link set cni0 up")
    host.ip("addr add 10.5.7.1/24 dev cni0")
    host.ns.run("sysctl -qw net.ipv4.ip_forward=1 net.ipv4.conf.all.rp_filter=0 net.ipv4.conf.cni0.rp_filter=0")
    got = host.ip("route get 203.0.113.9 from 10.5.7.2 iif cni0 ipproto udp sport 51820")
    assert "dev eth0" in got


@pytest.mark.parametrize(
    "command",
    [
        "rule del pref 2410",
        "rule del pref 2411",
        "rule add pref 2412 iif lo ipproto udp sport 51899 lookup 2410 proto 241",
        "rule add pref 2410 lookup main proto 241",
        "route del default table 2410",
        "route del 172.31.0.0/24 table 2410",
        "route flush table 2410",
        "route add 198.51.100.0/24 dev eth0 table 2410",
        "route replace default via 172.31.0.2 dev eth1 onlink table 2410",
        "addr del 172.31.0.11/24 dev eth1",
    ],
)
def test_whatever_is_altered_is_seen_and_repaired(host: Host, command: str) -> None:
    assert host.put(V4) == []
    host.quiet()
    standing = all_text(host)
    host.ip(command)
    seen = host.until(lambda seen: seen.changed is not None and V4.key in seen.changed)
    assert seen.state.get(V4.key) != V4
    if "addr del" in command:
        host.ip("addr add 172.31.0.11/24 dev eth1")
    assert host.put(V4) == []
    host.until(lambda seen: seen.state.get(V4.key) == V4)
    assert all_text(host) == standing


def test_another_interface_and_another_port_replace_the_old_ones(host: Host) -> None:
    host.put(V4)
    other = replace(V4, port=51900, routes=(replace(V4.routes[0], via="172.31.0.2"),))
    assert host.put(other) == []
    assert rules(host).count("\n") == rules(host).count("sport 51900") == 3
    assert host.ip("route show table 2410").count("\n") == 1
    assert host.observe().state[V4.key] == other


def test_an_interface_that_is_not_there_is_one_failure(host: Host) -> None:
    gone = replace(V4, routes=tuple(replace(route, dev="eth9") for route in V4.routes))
    (failure,) = host.put(gone)
    assert failure.cause == "ENODEV"
    assert failure.message.startswith("policy routing of IPv4 for flannel-wg: there is no interface eth9")
    host.ip("link set eth1 down")
    (failure,) = host.put(V4)
    assert failure.cause == "ENETDOWN" and "The interface is down" in failure.message


def test_a_lost_source_address_is_named_and_not_the_kernels_age(host: Host) -> None:
    host.ip("addr del 172.31.0.11/24 dev eth1")
    (failure,) = host.put(V4)
    assert failure.message == "policy routing of IPv4 for flannel-wg: Invalid prefsrc address (EINVAL)"


def test_a_kernel_without_policy_routing_is_told_of_and_gets_no_route(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has one table for both, so a route of ours would take the place of the operator's."""
    before, request = all_text(host), Netlink.request

    def refuse(netlink: Netlink, kind: int, flags: int, body: bytes) -> None:
        if kind == RTM_NEWRULE:
            raise NetlinkError(errno.EOPNOTSUPP)
        request(netlink, kind, flags, body)

    monkeypatch.setattr(Netlink, "request", refuse)
    for failure in host.put(V4, V6):
        assert "no policy routing (CONFIG_IP_MULTIPLE_TABLES)" in failure.message
    assert all_text(host) == before


def test_routes_of_ipv4_are_not_taken_for_those_of_an_ipv6_that_is_off(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With ipv6.disable=1 the kernel answers with every family that it has (rtnetlink.c, rtnl_dump_all)."""
    dump = Netlink.dump

    def all_families(netlink: Netlink, kind: int, body: bytes) -> list[bytes]:
        return dump(netlink, kind, bytes([AF_INET]) + body[1:] if kind == RTM_GETROUTE else body)

    host.put(V4)
    monkeypatch.setattr(Netlink, "dump", all_families)
    handler = UplinkHandler()
    assert dict(handler.observe(host.scope, {})) == {V4.key: V4}
    handler.close()


def test_an_interface_that_goes_down_takes_routes_with_it_and_that_is_seen(host: Host) -> None:
    host.put(V4)
    host.quiet()
    host.ip("rule add pref 2413 lookup 2410")  # another's, also if it uses our table
    assert host.fresh()[V4.key] == V4
    host.ip("link set eth1 down")
    host.until(lambda seen: seen.state.get(V4.key) == replace(V4, routes=()))
    host.ip("link set eth1 up")
    assert host.put(V4) == []
    assert host.observe().state[V4.key] == V4


@pytest.mark.parametrize(("tunnel", "there", "ours"), [(WG, False, True), (WG, True, False)])
def test_a_rule_is_ours_if_its_tunnel_is_or_is_gone(host: Host, tunnel: str, there: bool, ours: bool) -> None:
    if there:  # another daemon's: it carries an address of another network
        host.ip(f"link add {tunnel} type veth peer name x0")
        host.ip(f"addr add 10.6.0.0/32 dev {tunnel}")
    host.put(replace(V4, tunnel=tunnel))
    owned = ownership(host.observe().interfaces, (), frozenset())
    assert owned(V4) is ours


def test_nothing_is_listened_to_where_there_is_no_uplink(host: Host) -> None:
    handler = UplinkHandler()
    assert handler.observe(host.scope, {}) == {} and handler.fileno() is None
    family: Literal[4, 6]
    for family in (4, 6):
        assert handler._rules(family, 2410) == [] and handler._routes(family, 254) != []
    handler.close()
