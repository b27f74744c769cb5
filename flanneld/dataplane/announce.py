"""Tells the neighbours that an address of ours is at another MAC: by ARP, or by a neighbour advertisement.

Where a NIC is replaced, or gets another MAC, the neighbours go on sending to the old one until their caches doubt it:
in IPv6 up to a minute, since what we ask them while we forward has our link-local address as source and tells them
nothing of the other one; in IPv4 until we ask one of them something ourselves.

The kernel could say it (arp_notify, ndisc_notify), but these are settings of a device that is not ours, and one that
has just come in place of another has them off when it gets its addresses.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import time
from collections.abc import Callable, Iterable
from typing import Final

from flanneld.dataplane import sysctl
from flanneld.dataplane.links import IFF_LOOPBACK, RawLink
from flanneld.dataplane.mirror import Interfaces

TIMES: Final = 3
"""MAX_NEIGHBOR_ADVERTISEMENT (RFC 4861): one may be lost, or too early, for a switch that does not forward yet or an
address that is still being probed."""

APART_SECONDS: Final = 1.0
"""RETRANS_TIMER; at the first look after that, so it may be some seconds."""

_ETH_P_ARP: Final = 0x0806
_ARP: Final = struct.Struct("!HHBBH6s4s6s4s")
_ADVERTISEMENT: Final = struct.Struct("!BBHB3x16sBB6s")
_OVERRIDE, _ROUTER = 0x20, 0x80

Said = tuple[str, str]
"""A source of ``Scope.sources`` and the MAC that it is at."""


class Announcer:
    """Remembers what has been said; what was said before the daemon started, nobody knows, so it is said again."""

    def __init__(
        self,
        send: Callable[[str, RawLink, str], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._send = send or announce
        self._clock = clock
        self._left: dict[Said, int] = {}
        self._next = 0.0

    def follow(self, sources: Iterable[str], interfaces: Interfaces) -> None:
        """Say what is new, or has not been said often enough. Called at every look."""
        now, left = self._clock(), {}
        again, next_time = now >= self._next, self._next
        for source in sources:
            link = _carrier(source, interfaces)
            if link is None or link.mac is None:
                continue
            said = (source, link.mac)
            left[said] = self._left.get(said, TIMES)
            if said not in self._left or (again and left[said]):
                self._send(source.partition("%")[0], link, link.mac)
                left[said] -= 1
                next_time = now + APART_SECONDS
        self._left, self._next = left, next_time


def _carrier(source: str, interfaces: Interfaces) -> RawLink | None:
    """The interface that has this source, if it is one with neighbours: nobody speaks for an address that has left."""
    address, _, index = source.partition("%")
    link = interfaces.links.get(int(index))
    if link is None or not link.up or link.flags & IFF_LOOPBACK:
        return None
    here = interfaces.addresses.get(link.index, {})
    return link if any(text.partition("/")[0] == address for text in here) else None


def announce(address: str, link: RawLink, mac: str) -> None:
    """To all on the link. What cannot be sent is left: caches come right by themselves, only later."""
    hardware = bytes.fromhex(mac.replace(":", ""))
    with contextlib.suppress(OSError):
        if ":" in address:
            _advertise(address, link, hardware)
        else:
            _arp(address, link, hardware)


def _arp(address: str, link: RawLink, hardware: bytes) -> None:
    """A request that asks for the address itself (RFC 5227, 3), as the kernel's own is."""
    raw, everybody = socket.inet_aton(address), b"\xff" * 6
    packet = _ARP.pack(1, 0x0800, 6, 4, 1, hardware, raw, bytes(6), raw)
    with socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        sock.sendto(packet, (link.name, _ETH_P_ARP, 0, 0, everybody))


def _advertise(address: str, link: RawLink, hardware: bytes) -> None:
    """An unsolicited advertisement to all nodes (RFC 4861, 7.2.6); the kernel computes the checksum."""
    forwards = sysctl.read(f"net/ipv6/conf/{link.name}/forwarding") not in (None, "0")
    flags = _OVERRIDE | (_ROUTER if forwards else 0)
    packet = _ADVERTISEMENT.pack(136, 0, 0, flags, socket.inet_pton(socket.AF_INET6, address), 2, 1, hardware)
    with socket.socket(socket.AF_INET6, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.IPPROTO_ICMPV6) as sock:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_HOPS, 255)
        sock.bind((address, 0, 0, link.index))
        sock.sendto(packet, ("ff02::1", 0, 0, link.index))
