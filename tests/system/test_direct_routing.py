"""vxlan with DirectRouting: a peer is routed to while it is on the link, and tunnelled to while it is not."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from flanneld.lab.hosts import Host, Lab, sysctl
from flanneld.lab.wait import Promised, wait_until
from tests.system.backend_cases import GATEWAYS, Running, running_case

SOON = Promised(5)
HOME = {4: ("172.30.0.12/24", GATEWAYS[4]), 6: ("fd30::c/64", GATEWAYS[6])}
AWAY = {4: ("172.31.0.12/24", "172.31.0.1"), 6: ("fd31::c/64", "fd31::1")}
"""The peer's address and its router's, on the network of the others and on another one behind the same switch."""


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    with running_case("vxlan direct") as running:
        for address, gateway in AWAY.values():
            running.lab.switch.run(f"ip addr add {gateway}/{address.split('/')[1]} dev br0 nodad")
        route_between_networks(running.lab)
        yield running


def route_between_networks(lab: Lab) -> None:
    """The switch is a router, too, and tells nobody that the other network is on the same wire."""
    quiet = {"net/ipv4/conf/all/send_redirects": "0", "net/ipv4/conf/br0/send_redirects": "0"}
    sysctl(lab.switch, {"net/ipv4/ip_forward": "1", "net/ipv6/conf/all/forwarding": "1", **quiet})


@pytest.mark.field_problem(6)
@pytest.mark.field_problem(22)
@pytest.mark.parametrize("families", [(4,), (6,), (4, 6)], ids=["IPv4", "IPv6", "both"])
def test_a_peer_moves_off_the_link_and_back(running: Running, families: tuple[int, ...]) -> None:
    host, peer = running.lab.hosts
    assert ways(host) == {4: "direct", 6: "direct"}
    for family in families:
        move(peer, family, HOME, AWAY)
    expected = {family: "tunnel" if family in families else "direct" for family in (4, 6)}
    for each in (host, peer):
        wait_until(lambda: ways(each) == expected, SOON, lambda: f"{each.name}: {ways(each)} to be {expected}")
    running.ping_all(SOON)

    for family in families:
        move(peer, family, AWAY, HOME)
    for each in (host, peer):
        wait_until(lambda: ways(each) == {4: "direct", 6: "direct"}, SOON, lambda: f"{each.name}: {ways(each)}")
        assert " dst " not in each.run("bridge fdb show dev flannel.1") + each.run("bridge fdb show dev flannel-v6.1")
    running.ping_all(SOON)


def move(peer: Host, family: int, there: dict[int, tuple[str, str]], here: dict[int, tuple[str, str]]) -> None:
    """As by DHCP: another address and another default route."""
    address, gateway = here[family]
    peer.run(f"ip addr del {there[family][0]} dev eth0")
    peer.run(f"ip addr add {address} dev eth0 nodad" if family == 6 else f"ip addr add {address} dev eth0")
    peer.run(f"ip route replace default via {gateway}")


def ways(host: Host) -> dict[int, str]:
    """How each family's packets go to the peer, if all of what that needs is there."""
    found = {}
    for family, dev in {4: "flannel.1", 6: "flannel-v6.1"}.items():
        direct = " via " in host.run(f"ip -{family} route show proto 241")
        tunnel = " via " in host.run(f"ip -{family} route show dev {dev}")
        entry = " dst " in host.run(f"bridge fdb show dev {dev}")
        found[family] = {(True, False, False): "direct", (False, True, True): "tunnel"}.get(
            (direct, tunnel, entry), f"{direct=} {tunnel=} {entry=}"
        )
    return found
