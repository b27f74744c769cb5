"""alloc: hold a subnet and nothing else; who carries the packets is somebody else's business."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Final

from backends.backend import Host, Published, Underlay
from backends.kernel_state import Record
from subnet_lease.lease import Family, Lease


class Alloc:
    """Like flannel's: no BackendType in the lease, no devices, no routes, no peers."""

    name: ClassVar[str] = "alloc"
    needs: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.unknown_options: Final = tuple(options)

    def mtu(self, underlay: Underlay, families: tuple[Family, ...]) -> int:
        return underlay.mtu

    def published(self, host: Host) -> Published:
        return Published("")

    def accepts(self, peer: Lease) -> bool:
        return False

    def host_state(self, host: Host) -> tuple[Record, ...]:
        return ()

    def peer_state(self, host: Host, peer: Lease) -> tuple[Record, ...]:
        return ()
