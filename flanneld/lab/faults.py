"""What people and programs do to a host's overlay, and how long it then took to be whole again, under a running ping."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from flanneld.lab.containers import Container
from flanneld.lab.healing import time_to_heal
from flanneld.lab.hosts import Host
from flanneld.lab.wait import wait_until


@dataclass(frozen=True, slots=True)
class Peer:
    """How one host's kernel reaches another over VXLAN, as iproute2 prints it."""

    subnet: str
    vtep: str
    mac: str
    address: str


@dataclass(frozen=True, slots=True)
class Fault:
    """``command`` does the damage on the host; ``gone`` and ``back`` are what the kernel then announces (regexes)."""

    title: str
    command: str
    gone: str
    back: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Healing:
    """``seconds`` the kernel was without it; pings ``sent`` and ``lost`` around it; ``gap``: seconds without a reply."""

    fault: Fault
    seconds: float
    sent: int
    lost: int
    gap: float


def peers_in_kernel(host: Host, device: str = "flannel.1") -> list[Peer]:
    """The peers for which a host has a route, a neighbour and an FDB entry; what is incomplete is left out."""
    routes = re.findall(rf"^(\S+) via (\S+)(?: dev {device})? onlink", host.run(f"ip route show dev {device}"), re.M)
    neighbours = dict(re.findall(r"^(\S+) lladdr (\S+)", host.run(f"ip neigh show dev {device}"), re.M))
    fdb = dict(re.findall(r"^(\S+) (?:dev \S+ )?dst (\S+)", host.run(f"bridge fdb show dev {device}"), re.M))
    found = []
    for subnet, vtep in routes:
        mac = neighbours.get(vtep)
        if mac is not None and mac in fdb:
            found.append(Peer(subnet, vtep, mac, fdb[mac]))
    return found


def vxlan_faults(host: Host, target: Peer, device: str = "flannel.1") -> list[Fault]:
    """A route, an FDB entry, and the whole device: each one taken from ``host`` while it sends to ``target``."""

    def route(peer: Peer) -> str:
        return rf"{re.escape(peer.subnet)} via "

    def entry(peer: Peer) -> str:
        return rf"{re.escape(peer.address)} dev {re.escape(device)} lladdr {peer.mac} "

    def neighbour(peer: Peer) -> str:
        return rf"{re.escape(peer.vtep)} dev {re.escape(device)} lladdr {peer.mac} "

    everything = [line(peer) for peer in peers_in_kernel(host, device) for line in (entry, neighbour, route)]
    name = re.escape(device)
    link = rf"\d+: {name}:"
    return [
        Fault("a route", f"ip route del {target.subnet} dev {device}", route(target), (route(target),)),
        Fault(
            "an FDB entry",
            f"bridge fdb del {target.mac} dev {device} dst {target.address}",
            entry(target),
            (entry(target),),
        ),
        # The kernel takes a device apart before it announces its end: the clock starts with the first part.
        Fault("the whole device", f"ip link del {device}", rf"(\d+: {name}:|.* dev {name} )", (link, *everything)),
    ]


def heal(host: Host, fault: Fault, sender: Container, receiver: Container, *, timeout: float = 20) -> Healing:
    """Do the damage under a ping of 100 a second; NotYet if it did not heal, with what is missing."""
    with sender.ping_stream(receiver) as stream:
        _replies(stream.replies, 20)
        seconds = time_to_heal(host.ns, fault.gone, fault.back, lambda: host.run(fault.command), timeout=timeout)
        _replies(stream.replies, len(stream.replies()) + 20)
        result = stream.stop()
    return Healing(fault, seconds, result.sent, result.lost, result.longest_gap)


def _replies(replies: Callable[[], Sequence[object]], count: int) -> None:
    began = time.monotonic()
    wait_until(lambda: len(replies()) >= count, 10, lambda: f"{count} replies ({time.monotonic() - began:.1f} s)")
