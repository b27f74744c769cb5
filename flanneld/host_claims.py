"""What several flannelds on one host know of each other: whose a device is, and which networks there are.

A claim is a listening socket with an abstract name (unix(7)). Such names belong to the network namespace, as devices
do; no two processes can have the same; and a claim ends with its process, however that ends. Only claims of root count.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterable
from ipaddress import ip_network
from pathlib import Path
from typing import Final

from subnet_lease.lease import IPNetwork

_DEVICE: Final = "flanneld/device/"
_NETWORK: Final = "flanneld/network/"
_LISTED: Final = Path("/proc/net/unix")


class DeviceTaken(Exception):
    """Another flanneld of this host keeps a device of that name. The text names both and the remedy."""


class HostClaims:
    """The claims of this process. All methods are called from one thread."""

    def __init__(self) -> None:
        self._held: dict[str, socket.socket] = {}
        self._others: dict[str, IPNetwork | None] = {}
        """Networks of other daemons, by name; None for a claim that does not count."""

    def take(self, devices: Iterable[str], networks: Iterable[IPNetwork]) -> None:
        """Hold these and no others. DeviceTaken: what was held before stays held."""
        wanted = {f"{_DEVICE}{name}" for name in devices} | {f"{_NETWORK}{network}" for network in networks}
        new: dict[str, socket.socket] = {}
        try:
            for name in wanted - self._held.keys():
                claim = _listen(name)
                if claim is not None:
                    new[name] = claim
                elif name.startswith(_DEVICE) and (holder := _holder(name)) is not None:
                    where = f"process {holder}" if holder else "in another container"
                    raise DeviceTaken(
                        f"another flanneld on this host ({where}) keeps {name.removeprefix(_DEVICE)}; give"
                        " this network a VNI of its own (vxlan), host-gw, or another backend than that one has"
                    )
        except DeviceTaken:
            for claim in new.values():
                claim.close()
            raise
        for name in self._held.keys() - wanted:
            self._held.pop(name).close()
        self._held |= new

    def other_networks(self) -> tuple[IPNetwork, ...]:
        """The networks of all other daemons seen so far, sorted. One that has stopped still counts: what it set up
        stands, and it may be back in a moment."""
        for claim in self._held.values():
            _drain(claim)
        try:
            listed = _LISTED.read_text(errors="replace")
        except OSError:  # hidden by the service's confinement
            listed = ""
        for line in listed.splitlines():
            name = line.rpartition(" @")[2]
            if name.startswith(_NETWORK) and name not in self._held and name not in self._others:
                self._others[name] = _network(name)
        found = {network for name, network in self._others.items() if network is not None and name not in self._held}
        return tuple(sorted(found, key=lambda n: (n.version, n.network_address.packed, n.prefixlen)))

    def close(self) -> None:
        """Give everything back."""
        self.take((), ())


def _listen(name: str) -> socket.socket | None:
    """The claim, or None where somebody else has it."""
    claim = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        claim.bind(f"\0{name}")
    except OSError:
        claim.close()
        return None
    claim.listen(64)
    return claim


def _holder(name: str) -> int | None:
    """The process that holds a claim, 0 where it is in another PID namespace; None if it is not root's, or gone."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        try:
            probe.connect(f"\0{name}")
        except OSError:
            return None
        pid, user, _ = struct.unpack("3i", probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        return pid if user == os.geteuid() else None


def _drain(claim: socket.socket) -> None:
    """Let go of those who asked who we are: their connections would fill the queue."""
    while True:
        try:
            claim.accept()[0].close()
        except OSError:
            return


def _network(name: str) -> IPNetwork | None:
    try:
        return ip_network(name.removeprefix(_NETWORK)) if _holder(name) is not None else None
    except ValueError:
        return None
