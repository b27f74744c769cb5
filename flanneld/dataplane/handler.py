"""What the dataplane asks of the parts that speak something else than rtnetlink: firewall, WireGuard, udp tunnel, hooks.

All calls come from one thread, the reconciler's, which is also the one that made the handler: its network namespace
is the one to work in. A handler may have threads and processes of its own behind that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, TypeAlias

from backends.kernel_state import Change, Failure, Key, Link, Record, Scope
from subnet_lease.persistent_map import PersistentMap

Answer: TypeAlias = PersistentMap[Key, Record]
"""What a handler sees: the same object for what has not changed, so that the rest is found without a look at it."""


class Handler(Protocol):
    """Observes and changes the kinds of record that it claims.

    Links are shared work. A handler that makes devices (WireGuard, TUN) claims the Link records with its settings;
    it makes the device and its settings true, the dataplane then sets MTU, MAC and up. On removal the handler lets go
    of what it holds (socket, process), the dataplane then deletes the device if it is still there.
    """

    def handles(self, record: Record) -> bool:
        """Whether changes of this record are this handler's. Asked once a change; must not touch the kernel."""

    def observe(self, scope: Scope, links: Mapping[str, Link]) -> Answer:
        """What is true now, by key.

        Called at every pass: return last time's answer with the changes since (``with_changes``, ``with_only``), and
        look at the kernel only when told (``invalidate``), when the scope changed, when ``fileno`` became readable, or
        on a schedule of your own.

        ``links`` are our devices as rtnetlink sees them, by name, whoever made them; a device whose settings only
        the handler can read has ``Foreign(kind)`` there ("wireguard", "tun"). A Link in the answer replaces it:
        ``dataclasses.replace(links[name], settings=...)``.

        Raises OSError (with a whole sentence) when it cannot look; the pass then fails and is tried again.
        """

    def apply(self, changes: Sequence[Change]) -> list[Failure]:
        """Make the changes, in order; those that failed. Never raises for what the kernel or a tool refuses.

        Afterwards ``observe`` must show the outcome without a new look at everything, if that would be expensive.
        """

    def fileno(self) -> int | None:
        """A descriptor that is readable when something may have changed (asked before each wait), or None.

        The dataplane polls it in ``wait`` and then calls ``observe``, which must drain it.
        """

    def invalidate(self) -> None:
        """Forget what is remembered: the next ``observe`` looks at everything (slow resync timer)."""

    def close(self) -> None:
        """Let go of sockets and threads. Kernel state stays."""
