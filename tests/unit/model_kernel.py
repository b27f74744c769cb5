"""A model of the kernel for property tests: it takes changes, and answers where a packet would go.

A fake, of course; tests/kernel asks the real one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from ipaddress import ip_address, ip_network

from backends.kernel_state import (
    Change,
    Failure,
    FdbEntry,
    Interface,
    Key,
    Link,
    Neighbour,
    Observation,
    Record,
    Route,
    Scope,
)


@dataclass
class ModelKernel:
    """Records by key; a device that goes takes along what stands on it. ``refuse`` makes changes of keys fail."""

    records: dict[Key, Record] = field(default_factory=dict)
    refuse: set[Key] = field(default_factory=set)
    changed: set[Key] | None = None
    writes: list[Change] = field(default_factory=list)
    woken: int = 0
    interfaces: tuple[Interface, ...] = ()

    def observe(self, scope: Scope) -> Observation:
        changed, self.changed = self.changed, set()
        return Observation(dict(self.records), None if changed is None else frozenset(changed), self.interfaces)

    def apply(self, changes: Sequence[Change]) -> list[Failure]:
        failures = []
        for change in changes:
            if change.record.key in self.refuse:
                failures.append(Failure(change, "refused", f"refused: {change.record}"))
                continue
            self.writes.append(change)
            if change.op == "put":
                self.records[change.record.key] = change.record
            else:
                self.records.pop(change.record.key, None)
                if isinstance(change.record, Link):
                    self._drop_device(change.record.name)
        return failures

    def _drop_device(self, name: str) -> None:
        self.records = {k: r for k, r in self.records.items() if getattr(r, "dev", None) != name}

    def interfere(self, key: Key, record: Record | None) -> None:
        """Somebody else changes a record."""
        if record is None:
            self.records.pop(key, None)
        else:
            self.records[key] = record
        if self.changed is not None:
            self.changed.add(key)

    def wait(self, timeout: float | None) -> None: ...

    def wake(self) -> None:
        self.woken += 1

    def invalidate(self) -> None:
        self.changed = None

    def where(self, destination: str) -> str | None:
        """The outer destination of a packet, "broken" if a route leads to a gap, None without a route."""
        ip = ip_address(destination)
        routes = [r for r in self.records.values() if isinstance(r, Route) and ip in ip_network(r.dst)]
        if not routes:
            return None
        route = max(routes, key=lambda r: ip_network(r.dst).prefixlen)
        neighbour = next(
            (r for r in self.records.values() if isinstance(r, Neighbour) and (r.dev, r.dst) == (route.dev, route.via)),
            None,
        )
        if neighbour is None:
            return "broken"
        entry = next(
            (
                r
                for r in self.records.values()
                if isinstance(r, FdbEntry) and (r.dev, r.mac) == (neighbour.dev, neighbour.mac)
            ),
            None,
        )
        return entry.dst if entry else "broken"
