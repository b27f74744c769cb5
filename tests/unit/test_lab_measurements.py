"""Reading what ping(8) and ip(8) print."""

from __future__ import annotations

import pytest

from flanneld.lab.healing import healed_after, parse_events
from flanneld.lab.ping import parse_ping

PING = """PING 10.5.2.2 (10.5.2.2) 56(84) bytes of data.
[1700000000.000000] 64 bytes from 10.5.2.2: icmp_seq=1 ttl=62 time=0.400 ms
[1700000000.010000] 64 bytes from 10.5.2.2: icmp_seq=2 ttl=62 time=0.200 ms
[1700000000.250000] 64 bytes from 10.5.2.2: icmp_seq=5 ttl=62 time=0.300 ms

--- 10.5.2.2 ping statistics ---
5 packets transmitted, 3 received, 40% packet loss, time 250ms
rtt min/avg/max/mdev = 0.200/0.300/0.400/0.080 ms
"""
MONITOR = """[2026-11-22T13:53:05.000000] Deleted 10.5.2.0/24 via 10.5.2.0 dev flannel.1 onlink
[2026-11-22T13:53:05.001000] Deleted 3: flannel.1: <BROADCAST,MULTICAST> mtu 1450 qdisc noop state DOWN
    link/ether fe:d8:71:a6:ea:1b brd ff:ff:ff:ff:ff:ff
[2026-11-22T13:53:05.002500] [ROUTE]10.5.2.0/24 via 10.5.2.0 dev flannel.1 onlink
[2026-11-22T13:53:05.011000] 4: flannel.1: <BROADCAST,MULTICAST,UP,LOWER_UP> mtu 1450
"""


def test_ping_is_read_to_the_last_reply() -> None:
    result = parse_ping(PING)
    assert (result.sent, result.received, result.lost, result.ok) == (5, 3, 2, False)
    assert (result.rtt_min, result.rtt_avg, result.rtt_max) == (0.2, 0.3, 0.4)
    assert [number for _, number in result.arrivals] == [1, 2, 5]
    assert result.longest_gap == pytest.approx(0.24)


def test_a_ping_that_never_began_sent_nothing() -> None:
    result = parse_ping("ping: connect: Network is unreachable\n")
    assert (result.sent, result.ok, result.rtt_avg, result.longest_gap) == (0, False, None, 0.0)


def test_the_time_to_heal_is_from_deleted_to_the_last_thing_back() -> None:
    events = parse_events(MONITOR)
    route, device = r"10\.5\.2\.0/24 via", r"\d+: flannel\.1:"
    assert healed_after(events, "10.5.9.0/24", [route]) is None
    assert healed_after(events, route, [route]) == pytest.approx(0.0025, abs=1e-5)
    assert healed_after(events, device, [device, route]) == pytest.approx(0.010, abs=1e-5)
    assert healed_after(events, device, [device, "10.5.3.0/24"]) is None


def test_what_came_back_too_early_does_not_count() -> None:
    events = parse_events(
        """[2026-11-22T13:53:05.000000] Deleted 172.30.0.12 dev flannel.1 lladdr 02:00:00:00:00:02 PERMANENT
[2026-11-22T13:53:05.004000] 172.30.0.12 dev flannel.1 lladdr 02:00:00:00:00:02 PERMANENT
[2026-11-22T13:53:05.010000] 3: flannel.1: <BROADCAST,MULTICAST> mtu 1450 qdisc noqueue state DOWN
[2026-11-22T13:53:05.011000] Deleted 3: flannel.1: <BROADCAST,MULTICAST> mtu 1450 qdisc noop state DOWN
[2026-11-22T13:53:05.020000] 4: flannel.1: <BROADCAST,MULTICAST,UP,LOWER_UP> mtu 1450
"""
    )
    device, entry = r"\d+: flannel\.1:", r"172\.30\.0\.12 dev flannel\.1"
    assert healed_after(events, f"({device}|{entry})", [device]) == pytest.approx(0.020, abs=1e-5)
    assert healed_after(events, f"({device}|{entry})", [device, entry]) is None
