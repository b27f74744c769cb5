"""The store of the ``host-local`` IPAM plugin: one file for each address, ``<dataDir>/<network>/<address>``.

Its text is the container's ID and, after CR LF, the interface's name (older versions wrote only the ID).
"""

from __future__ import annotations

import os

from cni.cidr import Cidr, parse
from cni.errors import INTERNAL, CniError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

DEFAULT_DATA_DIR = "/var/lib/cni/networks"


class Reservation:
    """An address and who holds it. ``time`` is when it was reserved (seconds since 1970); ``ifname`` "" if unknown."""

    __slots__ = ("address", "container", "ifname", "path", "time")

    def __init__(self, path: str, text: str, time: float) -> None:
        self.path = path
        self.address = os.path.basename(path)
        container, _, ifname = text.strip().partition("\n")
        self.container = container.strip()
        self.ifname = ifname.strip()
        self.time = time


class Store:
    """The reservations of one network."""

    def __init__(self, ipam: dict[str, Any], network: str) -> None:
        self.directory = os.path.join(str(ipam.get("dataDir") or DEFAULT_DATA_DIR), network)

    def reservations(self) -> list[Reservation]:
        """All of them, as they stand now; none where the network has no store."""
        found = []
        try:
            names = os.listdir(self.directory)
        except OSError:
            return []
        for name in names:
            if name == "lock" or name.startswith(("last_reserved_ip", ".")):
                continue
            path = os.path.join(self.directory, name)
            try:
                with open(path, "rb") as file:
                    text = file.read(4096).decode("utf-8", "replace")
                    found.append(Reservation(path, text, os.fstat(file.fileno()).st_mtime))
            except OSError:
                continue  # freed in this moment
        return found

    def _lock(self) -> int:
        """host-local's own lock; it ends when the returned descriptor is closed."""
        import fcntl

        descriptor = os.open(os.path.join(self.directory, "lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        return descriptor

    def reserve(self, subnet: Cidr, index: int, container: str, ifname: str) -> Cidr:
        """Take a free address of the subnet for the container; ``index`` is the range's place in the configuration.

        As host-local does it: not the network's own, not the gateway's (the first), not the broadcast address; the
        search starts after the address that was given out last. CniError in host-local's words when all are taken.
        """
        os.makedirs(self.directory, mode=0o755, exist_ok=True)
        size = 1 << (len(subnet.packed) * 8 - subnet.prefix)
        base = int.from_bytes(subnet.network.packed, "big")
        first, last = base + 2, base + size - (2 if subnet.family == 4 else 1)
        note = os.path.join(self.directory, f"last_reserved_ip.{index}")
        lock = self._lock()
        try:
            start = _read_address(note, subnet)
            start = start + 1 if first <= start < last else first
            taken = {held.address for held in self.reservations()}
            # No more than the taken ones can be in the way.
            for step in range(min(last - first, len(taken)) + 1):
                value = first + (start - first + step) % (last - first + 1)
                found = Cidr(value.to_bytes(len(subnet.packed), "big"), subnet.prefix)
                if found.address not in taken:
                    _write(os.path.join(self.directory, found.address), f"{container}\r\n{ifname}")
                    _write(note, found.address)
                    return found
        finally:
            os.close(lock)
        raise CniError(INTERNAL, f"failed to allocate for range {index}: no IP addresses available in range: {subnet}")

    def free(self, is_dead: Callable[[Reservation], bool]) -> int:
        """Remove the reservations that are dead, under host-local's own lock; how many."""
        if not os.path.isdir(self.directory):
            return 0
        lock = self._lock()
        try:
            freed = 0
            for reservation in self.reservations():
                if is_dead(reservation):
                    try:
                        os.unlink(reservation.path)
                        freed += 1
                    except FileNotFoundError:
                        pass
            return freed
        finally:
            os.close(lock)


def _read_address(path: str, subnet: Cidr) -> int:
    """The address in the file as a number; 0 where there is none of this subnet."""
    try:
        with open(path, "rb") as file:
            found = parse(f"{file.read(64).decode('ascii').strip()}/{subnet.prefix}")
    except (OSError, ValueError):
        return 0
    return int.from_bytes(found.packed, "big") if subnet.holds(found) else 0


def _write(path: str, text: str) -> None:
    with open(path, "wb") as file:
        file.write(text.encode())
