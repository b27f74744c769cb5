"""What we believe is in the kernel: records by key, and the table of interfaces. No I/O.

There are two ways to learn. ``learn`` is news (a message of the kernel, or a look at it): the key counts as changed if
the value differs from what was last observed. ``know`` is our own acknowledged write: whoever asked for it knows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from ipaddress import ip_interface

from backends.kernel_state import Interface, InterfaceAddress, Key, Kind, Link, Record, Route
from flanneld.dataplane.links import IFF_LOOPBACK, RawLink


class Mirror:
    """The state by key, with the memory of what changed since it was last asked."""

    def __init__(self) -> None:
        self.state: dict[Key, Record] = {}
        self._before: dict[Key, Record | None] = {}
        self._routes_on: Counter[str | None] = Counter()
        self._routes_from: Counter[str | None] = Counter()

    def learn(self, key: Key, record: Record | None) -> None:
        old = self.state.get(key)
        if old == record:
            return
        self._before.setdefault(key, old)
        self._set(key, record)

    def know(self, key: Key, record: Record | None) -> None:
        self._before.pop(key, None)
        self._set(key, record)

    def replace(self, fresh: dict[Key, Record], mine: Callable[[Key, Record], bool]) -> None:
        """Learn that ``fresh`` is all there is of those records for which ``mine`` holds."""
        for key in [key for key, record in self.state.items() if mine(key, record) and key not in fresh]:
            self.learn(key, None)
        for key, record in fresh.items():
            self.learn(key, record)

    def drop_device(self, name: str) -> None:
        """A device is gone, and everything on it with it; the kernel does not tell one by one."""
        self.replace({}, lambda _, record: device_of(record) == name)

    def carries_routes(self, name: str) -> bool:
        """Whether a route goes over this device."""
        return self._routes_on[name] > 0

    def sends_from(self, address: str) -> bool:
        """Whether a route uses this source address."""
        return self._routes_from[address] > 0

    @property
    def pending(self) -> bool:
        """Whether ``take_changed`` has something to tell."""
        return any(self.state.get(key) != old for key, old in self._before.items())

    def take_changed(self) -> frozenset[Key]:
        """The keys that differ from the last time this was asked, except by our own writes."""
        changed = frozenset(key for key, old in self._before.items() if self.state.get(key) != old)
        self._before.clear()
        return changed

    def _set(self, key: Key, record: Record | None) -> None:
        if key[0] == Kind.ROUTE:
            for route, more in ((self.state.get(key), -1), (record, 1)):
                if isinstance(route, Route):
                    self._routes_on[route.dev] += more
                    self._routes_from[route.src] += more
        if record is None:
            self.state.pop(key, None)
        else:
            self.state[key] = record


def device_of(record: Record) -> str | None:
    """The device that a record is on; a Link is on itself."""
    return record.name if isinstance(record, Link) else getattr(record, "dev", None)


class Interfaces:
    """All links and their addresses. ``snapshot`` is the same object while nothing in it has changed."""

    def __init__(self) -> None:
        self.links: dict[int, RawLink] = {}
        self.addresses: dict[int, dict[str, InterfaceAddress]] = {}
        self.names: dict[int, str] = {}
        self._indexes: dict[str, int] = {}
        self._parts: dict[int, Interface] = {}
        self._snapshot: tuple[Interface, ...] = ()
        self._touched: set[int] = set()

    def index(self, name: str) -> int | None:
        return self._indexes.get(name)

    def by_name(self, name: str) -> RawLink | None:
        index = self._indexes.get(name)
        return None if index is None else self.links.get(index)

    def set_link(self, link: RawLink) -> None:
        old = self.links.get(link.index)
        if old == link:
            return
        if old is not None and old.name != link.name and self._indexes.get(old.name) == link.index:
            del self._indexes[old.name]
        self.links[link.index] = link
        self.names[link.index] = link.name
        self._indexes[link.name] = link.index
        self._touched.add(link.index)

    def remove_link(self, index: int) -> None:
        link = self.links.pop(index, None)
        if link is None:
            return
        self.addresses.pop(index, None)
        self.names.pop(index, None)
        if self._indexes.get(link.name) == index:
            del self._indexes[link.name]
        self._touched.add(index)

    def set_address(self, index: int, address: InterfaceAddress) -> None:
        here = self.addresses.setdefault(index, {})
        if here.get(address.address) != address:
            here[address.address] = address
            self._touched.add(index)

    def remove_address(self, index: int, address: str) -> None:
        if self.addresses.get(index, {}).pop(address, None) is not None:
            self._touched.add(index)

    def networks(self) -> dict[str, str]:
        """The networks that interfaces which are up are on, as CIDRs, each with the name of one of them."""
        found = {}
        for index, addresses in self.addresses.items():
            link = self.links.get(index)
            for text in addresses if link is not None and link.up else ():
                found[str(ip_interface(text).network)] = self.names.get(index, "")
        return found

    def load(self, links: Iterable[RawLink], addresses: Iterable[tuple[int, InterfaceAddress]]) -> None:
        """Begin anew from a full look."""
        self._touched |= self.links.keys()
        self.links, self.addresses, self.names, self._indexes = {}, {}, {}, {}
        for link in links:
            self.set_link(link)
        for index, address in addresses:
            self.set_address(index, address)

    @property
    def pending(self) -> bool:
        """Whether the snapshot would be another one."""
        return any(self._parts.get(index) != self._interface(index) for index in self._touched)

    def snapshot(self) -> tuple[Interface, ...]:
        changed = False
        for index in self._touched:
            interface = self._interface(index)
            if self._parts.get(index) == interface:
                continue
            changed = True
            if interface is None:
                del self._parts[index]
            else:
                self._parts[index] = interface
        self._touched.clear()
        if changed:
            self._snapshot = tuple(self._parts[index] for index in sorted(self._parts))
        return self._snapshot

    def _interface(self, index: int) -> Interface | None:
        link = self.links.get(index)
        if link is None:
            return None
        return Interface(
            name=link.name,
            index=index,
            mtu=link.mtu,
            up=link.up,
            mac=link.mac,
            kind=link.kind or None,
            loopback=link.flags & IFF_LOOPBACK != 0,
            addresses=tuple(self.addresses.get(index, {}).values()),
        )


def with_settings_of(link: Link, other: Link) -> Link:
    """``link`` as rtnetlink sees it, with the settings that only its handler can read."""
    return replace(link, settings=other.settings)
