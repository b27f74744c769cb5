"""ICMP errors about packets that the tunnel cannot carry, sent as this host's own."""

from __future__ import annotations

import contextlib
import socket
import time
from collections import Counter
from typing import Final

from flanneld.dataplane.udp_tunnel import device, packet

PER_SECOND: Final = 1000
"""The kernel's own limit (net.ipv4.icmp_msgs_per_sec)."""


class IcmpErrors:
    """Sends them from the device's address, and counts them as ``icmp_sent``.

    From a raw socket: one that came out of the TUN with this host's address as source would be dropped as martian, and
    one about a peer's packet takes the tunnel by itself.
    """

    def __init__(self, device_name: str, counters: Counter[str]) -> None:
        self._device = device_name
        self._counters = counters
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.IPPROTO_RAW)
        self._second, self._sent = 0, 0

    def send(self, kind: tuple[int, int], about: memoryview, size: int) -> None:
        """Tell the sender of the packet in the first ``size`` bytes why it goes no further. ``kind``: type and code."""
        second = int(time.monotonic())
        if second != self._second:
            self._second, self._sent = second, 0
        if self._sent >= PER_SECOND:
            return
        sender = device.address_of(self._device)
        error = packet.icmp_error(kind, about, size, sender) if sender else None
        if error is None:
            return
        self._sent += 1
        with contextlib.suppress(OSError):
            self._socket.sendto(error, (socket.inet_ntoa(error[16:20]), 0))
            self._counters["icmp_sent"] += 1
