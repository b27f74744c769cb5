"""The store of the ``host-local`` IPAM plugin: one file for each address, ``<dataDir>/<network>/<address>``.

Its text is the container's ID and, after CR LF, the interface's name (older versions wrote only the ID).
"""

from __future__ import annotations

import os

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

    def free(self, is_dead: Callable[[Reservation], bool]) -> int:
        """Remove the reservations that are dead, under host-local's own lock; how many."""
        if not os.path.isdir(self.directory):
            return 0
        import fcntl

        # The plugin locks a file of this name (older ones the directory itself); flock ends with the descriptor.
        lock = os.open(os.path.join(self.directory, "lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
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
