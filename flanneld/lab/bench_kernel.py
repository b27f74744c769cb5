"""How long the kernel programming of N peers takes, beside ``ip -batch`` and ``bridge -batch`` fed the same entries.

    sudo .venv/bin/python -m flanneld.lab.bench_kernel [PEERS] [ROUNDS]

Both begin with a fresh namespace and a standing vxlan device, take turns, and do 3 entries a peer: forwarding entry,
neighbour, route. Ours includes packing, reading every acknowledgement and keeping the mirror; theirs includes parsing
the text, which a program that calls them has to write. Afterwards both kernels must hold the same.
"""

from __future__ import annotations

import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from backends.kernel_state import Address, Change, FdbEntry, Link, Neighbour, Record, Route, Scope, Vxlan
from flanneld.dataplane.dataplane import Dataplane
from flanneld.lab.netns import Namespace

DEV = "flannel.1"
LINK = Link(DEV, Vxlan(1, "192.168.7.1", "eth0"), 1450, "0a:58:00:00:00:01")
SCOPE = Scope(frozenset({DEV}), ("10.0.0.0/8",))


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds: by the clock, and of the processor (user and system, children included)."""

    wall: float
    user: float
    system: float


@dataclass(frozen=True, slots=True)
class Result:
    """Medians over the rounds."""

    peers: int
    rounds: int
    apply: Timing
    reference: Timing
    look: Timing
    """A look at everything, as at a restart."""
    remove: Timing

    def __str__(self) -> str:
        def line(what: str, t: Timing) -> str:
            cost = (t.user + t.system) / (3 * self.peers) * 1e6
            return f"{what:<28} {t.wall:6.3f} s   {t.user:6.3f} user {t.system:6.3f} system   {cost:5.1f} µs an entry"

        return "\n".join(
            (
                f"{self.peers} peers, {3 * self.peers} entries, medians of {self.rounds} rounds",
                line("ip -batch, bridge -batch", self.reference),
                line("Dataplane.apply", self.apply),
                line("Dataplane.observe, all anew", self.look),
                line("Dataplane.apply, removal", self.remove),
            )
        )


def records_of(peers: int) -> list[Record]:
    """FDB entries, then neighbours, then routes."""
    numbers = range(1, peers + 1)
    bases = [f"10.{5 + (n >> 8)}.{n & 255}.0" for n in numbers]
    macs = [f"0a:58:00:01:{n >> 8:02x}:{n & 255:02x}" for n in numbers]
    return [
        *(FdbEntry(DEV, mac, f"192.168.{8 + (n >> 8)}.{n & 255}") for n, mac in zip(numbers, macs, strict=True)),
        *(Neighbour(DEV, base, mac) for base, mac in zip(bases, macs, strict=True)),
        *(Route(f"{base}/24", DEV, base, onlink=True) for base in bases),
    ]


def batch_text(records: list[Record]) -> tuple[str, str]:
    """The same for ``bridge -batch`` and ``ip -batch``."""
    bridge: list[str] = []
    ip: list[str] = []
    for record in records:
        if isinstance(record, FdbEntry):
            bridge.append(f"fdb replace {record.mac} dst {record.dst} dev {DEV} self permanent")
        elif isinstance(record, Neighbour):
            ip.append(f"neigh replace {record.dst} lladdr {record.mac} dev {DEV} nud permanent")
        elif isinstance(record, Route):
            ip.append(f"route replace {record.dst} via {record.via} dev {DEV} onlink")
    return "\n".join(bridge), "\n".join(ip)


def timed(work: Callable[[], object]) -> Timing:
    def usage() -> tuple[float, float]:
        own, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
        return own.ru_utime + children.ru_utime, own.ru_stime + children.ru_stime

    before, begin = usage(), time.perf_counter()
    work()
    wall, after = time.perf_counter() - begin, usage()
    return Timing(wall, after[0] - before[0], after[1] - before[1])


def measure(peers: int = 5000, rounds: int = 5) -> Result:
    """Take turns; raises AssertionError if the two do not end in the same state."""
    records = records_of(peers)
    bridge_text, ip_text = batch_text(records)
    timings: dict[str, list[Timing]] = {"apply": [], "reference": [], "look": [], "remove": []}
    for turn in range(2 * rounds):
        with Namespace("bench") as ns:
            ns.run("ip link add eth0 type veth peer name cable0")
            ns.run("ip link set cable0 up")
            ns.run("ip link set eth0 up")
            ns.run("ip addr add 192.168.7.1/16 dev eth0")
            with ns.inside():
                dataplane = Dataplane()
                try:
                    dataplane.observe(SCOPE)
                    _apply(dataplane, [Change("put", LINK), Change("put", Address(DEV, "10.5.0.0/32"))])
                    if turn % 2:
                        timings["reference"].append(timed(partial(_reference, ns, bridge_text, ip_text)))
                        dataplane.invalidate()
                    else:
                        changes = [Change("put", record) for record in records]
                        timings["apply"].append(timed(partial(_apply, dataplane, changes)))
                        dataplane.observe(SCOPE)
                        dataplane.invalidate()
                    timings["look"].append(timed(partial(dataplane.observe, SCOPE)))
                    state = dataplane.observe(SCOPE).state
                    assert all(state.get(record.key) == record for record in records), "entries are missing"
                    removals = [Change("remove", record, record) for record in reversed(records)]
                    timings["remove"].append(timed(partial(_apply, dataplane, removals)))
                finally:
                    dataplane.close()
    medians = {name: _median(found) for name, found in timings.items()}
    return Result(peers, rounds, **medians)


def _reference(ns: Namespace, bridge_text: str, ip_text: str) -> None:
    ns.run("bridge -batch -", stdin=bridge_text)
    ns.run("ip -batch -", stdin=ip_text)


def _apply(dataplane: Dataplane, changes: Sequence[Change]) -> None:
    failures = dataplane.apply(changes)
    assert not failures, failures[:3]


def _median(timings: list[Timing]) -> Timing:
    return Timing(
        statistics.median(t.wall for t in timings),
        statistics.median(t.user for t in timings),
        statistics.median(t.system for t in timings),
    )


if __name__ == "__main__":
    print(measure(*(int(argument) for argument in sys.argv[1:3])))
