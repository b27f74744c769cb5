"""What our neighbours hear when an address is at another MAC, read by tcpdump and scapy."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from backends.kernel_state import Scope
from flanneld.dataplane.dataplane import Dataplane
from flanneld.lab.capture import capture
from flanneld.lab.hosts import sysctl
from flanneld.lab.netns import Namespace, veth
from flanneld.lab.wait import wait_until

MAC = "02:00:00:00:64:02"


@pytest.fixture
def pair() -> Iterator[tuple[Namespace, Namespace]]:
    with Namespace("here") as here, Namespace("there") as there:
        veth(here, "eth0", there, "eth0")
        here.run(f"ip link set eth0 address {MAC}")
        here.run("ip addr add 192.0.2.2/24 dev eth0")
        here.run("ip addr add 2001:db8::2/64 dev eth0 nodad")
        wait_until(lambda: "fe80:" in there.run("ip -6 addr show dev eth0"), 5, "IPv6 on the neighbour's side")
        yield here, there


def look(here: Namespace) -> None:
    """The first look of a dataplane that is told these addresses."""
    with here.inside():
        dataplane = Dataplane()
        try:
            index = str(next(i.index for i in dataplane.observe(Scope()).interfaces if i.name == "eth0"))
            dataplane.observe(Scope(sources=(f"192.0.2.2%{index}", f"2001:db8::2%{index}", f"192.0.2.9%{index}")))
        finally:
            dataplane.close()


@pytest.mark.field_problem(22)
def test_ipv4_asks_for_its_own_address(pair: tuple[Namespace, Namespace]) -> None:
    here, there = pair
    heard = capture(there, "eth0", f"arp and ether src {MAC}", lambda: look(here))[0]
    assert heard.dst == "ff:ff:ff:ff:ff:ff"
    arp = heard["ARP"]
    assert (arp.op, arp.hwsrc, arp.psrc, arp.pdst) == (1, MAC, "192.0.2.2", "192.0.2.2")


@pytest.mark.field_problem(22)
@pytest.mark.parametrize("forwards", [0, 1])
def test_ipv6_advertises_it_to_all_nodes(pair: tuple[Namespace, Namespace], forwards: int) -> None:
    here, there = pair
    sysctl(here, {"net/ipv6/conf/all/forwarding": str(forwards)})
    heard = capture(there, "eth0", "icmp6 and ip6[40] == 136 and src 2001:db8::2", lambda: look(here))[0]
    assert (heard["IPv6"].dst, heard["IPv6"].hlim) == ("ff02::1", 255)
    told = heard["ICMPv6ND_NA"]
    assert (told.tgt, told.R, told.S, told.O) == ("2001:db8::2", forwards, 0, 1)
    assert heard["ICMPv6NDOptDstLLAddr"].lladdr == MAC
    checksum = told.cksum
    del told.cksum
    assert type(heard)(bytes(heard))["ICMPv6ND_NA"].cksum == checksum


@pytest.mark.field_problem(22)
def test_a_neighbour_that_knew_another_mac_knows_this_one(pair: tuple[Namespace, Namespace]) -> None:
    here, there = pair
    for address in ("192.0.2.2", "2001:db8::2"):
        there.run(f"ip neigh replace {address} lladdr 02:00:00:00:64:99 dev eth0 nud reachable")
    look(here)
    for address in ("192.0.2.2", "2001:db8::2"):
        known = f"ip neigh show {address} dev eth0"
        wait_until(lambda known=known: f"lladdr {MAC}" in there.run(known), 2, lambda known=known: there.run(known))
