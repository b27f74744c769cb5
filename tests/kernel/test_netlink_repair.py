"""Whatever is altered or removed behind our back is seen, by name; also what the kernel drops without a word."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from backends.kernel_state import Address, Key, Kind, Link, Neighbour, Record, Route
from flanneld.lab.wait import clock
from tests.kernel.netlink_host import DEV, DEV6, DIRECT, HOST, LINK, Host, open_host, peer, peer6

PEERS: list[Record] = [*peer(1), *peer(2), *peer6(1), *peer6(2), *DIRECT]
FDB, NEIGH, ROUTE = peer(1)
FDB6, NEIGH6, ROUTE6 = peer6(1)
ADDRESS, ADDRESS6 = HOST[2], HOST[4]
DIRECT4, DIRECT6, BLACKHOLE, BLACKHOLE6 = DIRECT
MAC1, MAC2 = "0a:58:00:01:00:01", "02:00:00:00:00:99"


@pytest.fixture
def host() -> Iterator[Host]:
    with open_host("repair") as host:
        host.establish(*PEERS)
        host.quiet()
        yield host


@pytest.mark.field_problem(1)
@pytest.mark.parametrize(
    ("record", "command"),
    [
        (ROUTE, "ip route del 10.5.1.0/24"),
        (ROUTE, "ip route replace 10.5.1.0/24 via 192.168.7.5"),
        (ROUTE, "ip route change 10.5.1.0/24 via 10.5.2.0 dev flannel.1 onlink"),
        (ROUTE, "ip route replace unreachable 10.5.1.0/24"),
        (ROUTE6, "ip -6 route del fd05:0:1::/64"),
        (ROUTE6, "ip -6 route replace fd05:0:1::/64 via fd00:7::5"),
        (ROUTE6, "ip -6 route replace fd05:0:1::/64 dev flannel-v6.1"),
        (DIRECT4, "ip route del 10.5.200.0/24"),
        (DIRECT4, "ip route replace 10.5.200.0/24 via 192.168.7.5 proto 241"),
        (DIRECT6, "ip -6 route del fd05:0:200::/64"),
        (BLACKHOLE, "ip route del blackhole 10.5.0.0/24 metric 4096"),
        (BLACKHOLE6, "ip -6 route del blackhole fd05::/64 metric 4096"),
        (NEIGH, f"ip neigh del 10.5.1.0 dev {DEV}"),
        (NEIGH, f"ip neigh replace 10.5.1.0 lladdr {MAC2} dev {DEV} nud permanent"),
        (NEIGH, f"ip neigh replace 10.5.1.0 lladdr {MAC1} dev {DEV} nud reachable"),
        (NEIGH6, f"ip -6 neigh del fd05:0:1:: dev {DEV6}"),
        (NEIGH6, f"ip -6 neigh replace fd05:0:1:: lladdr {MAC2} dev {DEV6} nud permanent"),
        (FDB, f"bridge fdb del {MAC1} dev {DEV}"),
        (FDB, f"bridge fdb replace {MAC1} dst 192.168.99.9 dev {DEV}"),
        (FDB, f"bridge fdb replace {MAC1} dst 192.168.8.1 port 4789 dev {DEV}"),
        (FDB, f"bridge fdb replace {MAC1} dst 192.168.8.1 dev {DEV} dynamic"),
        (FDB6, f"bridge fdb del 0a:58:00:06:00:01 dev {DEV6}"),
        (ADDRESS, f"ip addr del 10.5.0.0/32 dev {DEV}"),
        (ADDRESS6, f"ip addr del fd05::/128 dev {DEV6}"),
        (LINK, f"ip link set {DEV} mtu 1400"),
        (LINK, f"ip link set {DEV} address {MAC2}"),
        (LINK, f"ip link set {DEV} type vxlan id 1 learning"),
        (LINK, f"ip link set {DEV} down"),
        (LINK, f"ethtool -K {DEV} tx-checksum-ip-generic off"),
    ],
)
def test_one_record_altered(host: Host, record: Record, command: str) -> None:
    standing = dict(host.observe().state)
    before = standing[record.key]
    host.ns.run(command)
    begin = clock()
    host.dataplane.wait(5)
    assert clock() - begin < 4, "nothing woke the dataplane"
    seen = host.observe()
    assert seen.changed is not None and record.key in seen.changed
    assert seen.state.get(record.key) != before
    assert dict(seen.state) == host.fresh(), "the mirror and the kernel differ"
    # And it can be put back, with what went along with it.
    lost = [r for r in standing.values() if not (isinstance(r, Route) and r.protocol == 2)]
    assert host.put(*[r for r in sorted(lost, key=lambda r: r.key[0] or 0) if seen.state.get(r.key) != r]) == []
    assert host.fresh() == standing


@pytest.mark.field_problem(19)
@pytest.mark.parametrize(
    ("key", "command"),
    [
        ((Kind.ROUTE, "10.5.99.0/24", None), f"ip route add 10.5.99.0/24 via 10.5.1.0 dev {DEV} onlink"),
        ((Kind.ROUTE, "10.5.99.0/24", 7), "ip route add 10.5.99.0/24 via 192.168.7.5 proto 241 metric 7"),
        ((Kind.NEIGHBOUR, DEV, "10.5.99.0"), f"ip neigh add 10.5.99.0 lladdr {MAC2} dev {DEV} nud permanent"),
        ((Kind.NEIGHBOUR, DEV, "fd05:9::"), f"ip neigh add fd05:9:: lladdr {MAC2} dev {DEV} nud permanent"),
        ((Kind.FDB, DEV, MAC2), f"bridge fdb add {MAC2} dst 192.168.9.9 dev {DEV}"),
        ((Kind.ADDRESS, DEV, "10.5.99.0/32"), f"ip addr add 10.5.99.0/32 dev {DEV}"),
        ((Kind.LINK, "flannel.9"), "ip link add flannel.9 type vxlan id 9 dstport 8472"),
    ],
)
def test_one_record_too_many(host: Host, key: Key, command: str) -> None:
    host.ns.run(command)
    seen = host.observe()
    assert seen.changed is not None and key in seen.changed
    assert key in seen.state
    assert dict(seen.state) == host.fresh()


@pytest.mark.field_problem(1)
@pytest.mark.parametrize("device", [DEV, DEV6, "eth0"])
def test_routes_lost_with_an_interface_that_goes_down_and_up(host: Host, device: str) -> None:
    """IPv4 routes go without any message."""
    standing = dict(host.observe().state)
    host.ip(f"link set {device} down")
    host.ip(f"link set {device} up")
    host.dataplane.wait(5)
    seen = host.until(lambda seen: seen.changed is not None)
    assert dict(seen.state) == host.fresh()
    lost = [r for r in standing.values() if isinstance(r, Route) and r.dev == device and r.protocol != 2]
    assert lost and all(r.key not in seen.state for r in lost)


@pytest.mark.field_problem(1)
def test_a_whole_interface_restart_within_one_look(host: Host) -> None:
    standing = dict(host.observe().state)
    host.ns.run(
        ["sh", "-c", f"ip link set {DEV} down; ip link set {DEV} up; ip link set {DEV} down; ip link set {DEV} up"]
    )
    seen = host.observe()
    assert seen.changed is not None and ROUTE.key in seen.changed and NEIGH.key in seen.changed
    assert FDB.key in seen.state, "permanent forwarding entries survive"
    lost = [r for r in standing.values() if not isinstance(r, Route) or r.protocol != 2]
    assert host.put(*sorted(lost, key=lambda r: r.key[0] or 0)) == []
    host.quiet()
    assert host.fresh() == standing


@pytest.mark.field_problem(22)
def test_routes_lost_with_an_address(host: Host) -> None:
    sourced = Route("10.5.210.0/24", "eth0", "192.168.7.200", src="192.168.9.1")
    host.ip("addr add 192.168.9.1/16 dev eth0")
    assert host.put(sourced) == []
    host.ip("addr del 192.168.9.1/16 dev eth0")
    seen = host.observe()
    assert sourced.key not in seen.state and dict(seen.state) == host.fresh()
    host.ip("addr del 192.168.7.1/16 dev eth0")
    seen = host.observe()
    assert DIRECT4.key not in seen.state and dict(seen.state) == host.fresh()


@pytest.mark.field_problem(2)
@pytest.mark.parametrize("command", [f"ip link del {DEV}", "ip link del eth0", f"ip link set {DEV} name gone0"])
def test_a_device_that_is_gone_takes_everything_with_it(host: Host, command: str) -> None:
    host.ns.run(command)
    seen = host.observe()
    assert seen.changed is not None
    assert {LINK.key, ADDRESS.key, FDB.key, NEIGH.key, ROUTE.key} <= seen.changed
    assert not [r for r in seen.state.values() if getattr(r, "dev", None) == DEV]
    assert dict(seen.state) == host.fresh()


@pytest.mark.field_problem(2)
def test_a_device_that_another_hand_made_anew(host: Host) -> None:
    host.ip(f"link del {DEV}")
    host.ip(
        f"link add {DEV} mtu 1450 address {LINK.mac} type vxlan id 1 dev eth0 local 192.168.7.1 dstport 8472 nolearning"
    )
    host.ip(f"link set {DEV} up")
    seen = host.observe()
    link = seen.state[LINK.key]
    assert isinstance(link, Link) and link.settings == LINK.settings
    assert {ADDRESS.key, FDB.key, NEIGH.key, ROUTE.key} <= (seen.changed or frozenset())
    assert host.put(ADDRESS, FDB, NEIGH, ROUTE) == []
    assert host.fresh()[ROUTE.key] == ROUTE


def test_an_underlay_that_is_renamed_shows_in_the_settings(host: Host) -> None:
    host.ip("link set eth0 down")
    host.ip("link set eth0 name uplink0")
    link = host.observe().state[LINK.key]
    assert isinstance(link, Link) and getattr(link.settings, "underlay", "") == "uplink0"
    host.ip("link set uplink0 up")
    assert dict(host.observe().state) == host.fresh()


@pytest.mark.field_problem(18)
def test_lost_messages_lead_to_a_look_at_everything() -> None:
    with open_host("enobufs", monitor_buffer=4096) as host:
        host.establish(*PEERS)
        host.quiet()
        commands = [f"route add 10.5.{n}.0/24 via 10.5.1.0 dev {DEV} onlink" for n in range(10, 190)]
        host.ns.run("ip -batch -", stdin="\n".join([*commands, "route del 10.5.2.0/24"]))
        host.dataplane.wait(5)
        seen = host.observe()
        assert seen.changed is None
        assert (Kind.ROUTE, "10.5.2.0/24", None) not in seen.state
        assert all((Kind.ROUTE, f"10.5.{n}.0/24", None) in seen.state for n in range(10, 190))
        assert dict(seen.state) == host.fresh()


def test_what_does_not_concern_us_wakes_nobody(host: Host) -> None:
    host.ip("route add 172.31.0.0/16 via 192.168.7.5")
    host.ip(f"neigh add 192.168.7.50 lladdr {MAC2} dev eth0")
    host.ip(f"neigh add 10.5.77.7 lladdr {MAC2} dev {DEV} nud reachable")
    begin = time.monotonic()
    host.dataplane.wait(0.5)
    assert time.monotonic() - begin >= 0.5
    assert host.observe().changed == frozenset()


def test_waiting_ends_by_wake_from_another_thread_and_by_time(host: Host) -> None:
    begin = clock()
    host.dataplane.wait(0.05)
    assert clock() - begin >= 0.05
    timer = threading.Timer(0.1, host.dataplane.wake)
    timer.start()
    host.dataplane.wait(30)
    timer.join()
    assert clock() - begin < 10
    host.dataplane.wake()
    host.dataplane.wait(30)
    assert clock() - begin < 10
    assert Address(DEV, "10.5.0.0/32").key in host.observe().state
    assert Neighbour(DEV, "10.5.1.0", MAC1) == NEIGH
