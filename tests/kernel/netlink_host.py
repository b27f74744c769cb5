"""A namespace with an underlay (a veth pair of its own) and a dataplane in it, and the records of a small overlay."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from backends.kernel_state import (
    ROUTE_PROTOCOL,
    Address,
    Change,
    Failure,
    FdbEntry,
    Key,
    Link,
    Neighbour,
    Observation,
    Record,
    Route,
    Scope,
    Sysctl,
    Vxlan,
)
from flanneld.dataplane.dataplane import Dataplane
from flanneld.dataplane.handler import Handler
from flanneld.lab import wait
from flanneld.lab.netns import Namespace

DEV, DEV6 = "flannel.1", "flannel-v6.1"
MAC, MAC6 = "0a:58:00:00:00:01", "0a:58:00:00:06:01"
NETWORKS = ("10.5.0.0/16", "fd05::/32")
LINK = Link(DEV, Vxlan(1, "192.168.7.1", "eth0"), 1450, MAC)
LINK6 = Link(DEV6, Vxlan(2, "fd00:7::1", "eth0"), 1430, MAC6)
SCOPE = Scope(frozenset({DEV, DEV6}), NETWORKS, sysctls=(f"net/ipv6/conf/{DEV}/accept_ra",))


def peer(number: int) -> list[Record]:
    """What reaches one peer by vxlan."""
    mac = f"0a:58:00:01:{number >> 8:02x}:{number & 255:02x}"
    base = f"10.5.{number}.0" if number < 256 else f"10.{5 + (number >> 8)}.{number & 255}.0"
    return [
        FdbEntry(DEV, mac, f"192.168.{8 + (number >> 8)}.{number & 255}"),
        Neighbour(DEV, base, mac),
        Route(f"{base}/24", DEV, base, onlink=True),
    ]


def peer6(number: int) -> list[Record]:
    mac = f"0a:58:00:06:{number >> 8:02x}:{number & 255:02x}"
    base = f"fd05:0:{number:x}::"
    return [
        FdbEntry(DEV6, mac, f"fd00:7::{number + 1:x}"),
        Neighbour(DEV6, base, mac),
        Route(f"{base}/64", DEV6, base, onlink=True),
    ]


HOST: list[Record] = [
    LINK,
    Sysctl(f"net/ipv6/conf/{DEV}/accept_ra", "0"),
    Address(DEV, "10.5.0.0/32"),
    LINK6,
    Address(DEV6, "fd05::/128"),
]
DIRECT: list[Record] = [
    Route("10.5.200.0/24", "eth0", "192.168.7.200", protocol=ROUTE_PROTOCOL),
    Route("fd05:0:200::/64", "eth0", "fd00:7::200", protocol=ROUTE_PROTOCOL),
    Route("10.5.0.0/24", None, protocol=ROUTE_PROTOCOL, metric=4096, type="blackhole"),
    Route("fd05::/64", None, protocol=ROUTE_PROTOCOL, metric=4096, type="blackhole"),
]


class Host:
    """Works in the calling thread, which is inside the namespace."""

    def __init__(self, ns: Namespace, dataplane: Dataplane) -> None:
        self.ns = ns
        self.dataplane = dataplane
        self.scope = SCOPE

    def ip(self, command: str) -> str:
        return self.ns.run(f"ip {command}")

    def bridge(self, command: str) -> str:
        return self.ns.run(f"bridge {command}")

    def observe(self) -> Observation:
        return self.dataplane.observe(self.scope)

    def fresh(self) -> dict[Key, Record]:
        """The state after a look at everything, with nothing remembered."""
        self.dataplane.invalidate()
        return dict(self.observe().state)

    def put(self, *records: Record) -> list[Failure]:
        state = self.observe().state
        return self.dataplane.apply([Change("put", record, state.get(record.key)) for record in records])

    def establish(self, *records: Record) -> None:
        """Make the records true, the host's own first; the observation after that is the one to compare with."""
        assert self.put(*HOST, *records) == []
        self.until(lambda seen: all(self.holds(record, seen) for record in records))

    def holds(self, record: Record, seen: Observation) -> bool:
        return seen.state.get(record.key) == record

    def until(self, true: Callable[[Observation], bool], seconds: float = 10) -> Observation:
        """Look until it is true; what was observed then."""
        seconds *= wait.patience
        deadline = time.monotonic() + seconds
        while True:
            seen = self.observe()
            if true(seen):
                return seen
            assert time.monotonic() < deadline, f"not within {seconds} s; the state is {dict(seen.state)}"
            self.dataplane.wait(0.2)

    def quiet(self) -> None:
        """Until nothing more is to be told (the kernel settles addresses and carriers after the fact)."""
        while True:
            begin = time.monotonic()
            self.dataplane.wait(0.12)
            self.observe()
            if time.monotonic() - begin > 0.1:
                return


@contextlib.contextmanager
def open_host(label: str, *handlers: Callable[[], Handler], **options: int) -> Iterator[Host]:
    """``handlers`` are made inside the namespace."""
    with Namespace(label) as ns:
        ns.run("ip link add eth0 type veth peer name cable0")
        ns.run("ip link set cable0 up")
        ns.run("ip link set eth0 up")
        ns.run("ip addr add 192.168.7.1/16 dev eth0")
        ns.run("ip addr add fd00:7::1/64 dev eth0 nodad")
        with ns.inside():
            host = Host(ns, Dataplane([make() for make in handlers], **options))
            try:
                yield host
            finally:
                host.dataplane.close()
