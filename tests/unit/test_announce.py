"""What is said to the neighbours of our addresses, and when."""

from __future__ import annotations

from dataclasses import replace

import pytest

from backends.kernel_state import InterfaceAddress
from flanneld.dataplane.announce import APART_SECONDS, TIMES, Announcer
from flanneld.dataplane.links import IFF_LOOPBACK, IFF_UP, RawLink
from flanneld.dataplane.mirror import Interfaces

OLD, NEW = "02:00:00:00:00:01", "02:00:00:00:00:02"
ETH0 = RawLink(2, "eth0", IFF_UP, 1500, OLD, "", b"")
SOURCES = ("192.0.2.7%2", "2001:db8::7%2")


class Bench:
    """An announcer, its clock and its interfaces, and what it said since the last question."""

    def __init__(self) -> None:
        self.said: list[tuple[str, str]] = []
        self.now = 100.0
        self.announcer = Announcer(lambda address, _, mac: self.said.append((address, mac)), lambda: self.now)
        self.interfaces = Interfaces()
        self.plug(ETH0)

    def plug(self, link: RawLink, *addresses: str) -> None:
        self.interfaces.set_link(link)
        for address in addresses or ("192.0.2.7/24", "2001:db8::7/64"):
            self.interfaces.set_address(link.index, InterfaceAddress(address))

    def look(self, *sources: str, seconds: float = 0.0) -> list[tuple[str, str]]:
        self.now += seconds
        self.announcer.follow(sources or SOURCES, self.interfaces)
        said, self.said = self.said, []
        return said

    def exhaust(self) -> None:
        for _ in range(TIMES + 1):
            self.look(seconds=5)


@pytest.fixture
def bench() -> Bench:
    return Bench()


BOTH = [("192.0.2.7", OLD), ("2001:db8::7", OLD)]


def test_each_address_is_told_three_times_and_no_faster_than_allowed(bench: Bench) -> None:
    assert bench.look() == BOTH
    assert bench.look() == bench.look(seconds=APART_SECONDS / 2) == []
    assert [bench.look(seconds=APART_SECONDS) for _ in range(4)] == [BOTH, BOTH, [], []]


def test_another_mac_and_another_interface_of_the_name_are_told_at_once(bench: Bench) -> None:
    bench.exhaust()
    bench.plug(replace(ETH0, mac=NEW))
    assert bench.look() == [("192.0.2.7", NEW), ("2001:db8::7", NEW)]
    bench.interfaces.remove_link(2)
    assert bench.look(seconds=5) == []
    bench.plug(replace(ETH0, index=9))
    assert bench.look("192.0.2.7%9", "2001:db8::7%9") == BOTH
    assert bench.look("192.0.2.7%9", "2001:db8::7%9", "192.0.2.8%9") == [], "another one, which eth0 does not have"


def test_nothing_is_told_of_an_address_that_has_left_until_it_is_back(bench: Bench) -> None:
    bench.look()
    bench.interfaces.remove_address(2, "192.0.2.7/24")
    assert bench.look(seconds=5) == BOTH[1:]
    bench.exhaust()
    bench.plug(ETH0)
    assert bench.look() == BOTH[:1]


def test_a_link_that_comes_up_tells_again(bench: Bench) -> None:
    bench.exhaust()
    bench.plug(replace(ETH0, flags=0))
    assert bench.look(seconds=5) == []
    bench.plug(ETH0)
    assert bench.look() == BOTH


@pytest.mark.parametrize("link", [replace(ETH0, mac=None), replace(ETH0, flags=IFF_UP | IFF_LOOPBACK)])
def test_who_has_no_neighbours_tells_nobody(link: RawLink) -> None:
    bench = Bench()
    bench.plug(link)
    assert bench.look() == []


def test_who_only_looks_tells_nobody(bench: Bench) -> None:
    bench.announcer.follow((), bench.interfaces)
    assert bench.said == []
