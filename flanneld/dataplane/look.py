"""Looking at the kernel: in full, at one interface again, and by its messages; all of it into the mirror."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from dataclasses import replace
from socket import AF_INET, AF_INET6, inet_pton

from backends.kernel_state import (
    Address,
    FdbEntry,
    InterfaceAddress,
    Key,
    Kind,
    Link,
    Neighbour,
    Record,
    Route,
    RouteLookup,
    is_flannel_device,
)
from flanneld.dataplane import links as link_wire
from flanneld.dataplane.links import Ethtool, RawLink, decode_link, settings_of
from flanneld.dataplane.mirror import Interfaces, Mirror
from flanneld.dataplane.netlink import Monitor, Netlink, NetlinkError, messages
from flanneld.dataplane.wire import (
    AF_BRIDGE,
    IFADDRMSG,
    MAIN_TABLE,
    NDA_IFINDEX,
    NDMSG,
    NLM_F_REPLACE,
    RTA_DST,
    RTA_OIF,
    RTM_DELADDR,
    RTM_DELLINK,
    RTM_DELNEIGH,
    RTM_DELROUTE,
    RTM_GETADDR,
    RTM_GETLINK,
    RTM_GETNEIGH,
    RTM_GETROUTE,
    RTM_NEWADDR,
    RTM_NEWLINK,
    RTM_NEWNEIGH,
    RTM_NEWROUTE,
    RTMSG,
    U32,
    RouteFilter,
    attribute,
    decode_address,
    decode_neighbour,
    decode_route,
    family_of,
)

_NOTHING_THERE = frozenset({errno.ENOENT, errno.ENODEV, errno.EAFNOSUPPORT, errno.EOPNOTSUPP, errno.ENXIO, errno.ESRCH})
"""What a filtered dump says when the device or the whole address family is not there."""
_FE80_10 = ("fe8", "fe9", "fea", "feb")


class Look:
    """Keeps ``mirror``, ``interfaces`` and ``links`` (our devices as rtnetlink sees them, by name) true."""

    def __init__(self, netlink: Netlink, monitor: Monitor) -> None:
        self.mirror = Mirror()
        self.interfaces = Interfaces()
        self.links: dict[str, Link] = {}
        self._netlink = netlink
        self._monitor = monitor
        self._ethtool = Ethtool()
        self._devices: frozenset[str] = frozenset()
        self._networks: tuple[str, ...] = ()
        self._filter = RouteFilter()
        self._all_stale = True
        self._blind = False  # the last look failed
        self._stale: set[int] = set()  # interfaces to be looked at again
        self._stale_families: set[int] = set()  # whose routes are to be looked at again
        self._doubled: set[Key] = set()  # keys for which the kernel holds more than one route

    def close(self) -> None:
        self._ethtool.close()

    def invalidate(self) -> None:
        self._all_stale = True

    @property
    def pending(self) -> bool:
        """Whether ``refresh`` has something to look at or something new to tell; no, while looking fails."""
        stale = self._all_stale or self._stale or self._stale_families
        return not self._blind and bool(stale or self.mirror.pending or self.interfaces.pending)

    def refresh(self, devices: frozenset[str], networks: tuple[str, ...]) -> bool:
        """Bring everything up to date. True if that took a look at everything."""
        if (devices, networks) != (self._devices, self._networks):
            self._devices, self._networks = devices, networks
            self._all_stale = True
        self._blind = True
        try:
            self.drain()
            everything = self._all_stale
            if everything:
                self._look_at_everything()
            while self._stale:
                self._again(self._stale.pop())
            while self._stale_families:
                self._routes_again(self._stale_families.pop())
        except OSError:
            self._all_stale = True
            raise
        self._blind = False
        return everything

    def drain(self) -> None:
        """Take in the messages that wait. Lost messages lead to a look at everything."""
        try:
            for data in self._monitor.receive():
                for kind, flags, start, end in messages(data):
                    self._take(kind, flags, data, start, end)
        except OSError as error:
            if error.errno != errno.ENOBUFS:
                raise
            self._all_stale = True

    def is_ours(self, name: str) -> bool:
        return name in self._devices or is_flannel_device(name)

    # --- dumps -----------------------------------------------------------------------------------------------------

    def _dump(self, kind: int, body: bytes) -> Iterator[tuple[bytes, int, int]]:
        """Data, start and end of the body of each object."""
        try:
            buffers = self._netlink.dump(kind, body)
        except NetlinkError as error:
            if error.errno in _NOTHING_THERE:
                return
            raise
        for data in buffers:
            for answer, _, start, end in messages(data):
                if answer >= RTM_NEWLINK:
                    yield data, start, end

    def _look_at_everything(self) -> None:
        self._all_stale = False
        self._stale.clear()
        self._stale_families.clear()
        links = [decode_link(*found) for found in self._dump(RTM_GETLINK, link_wire.dump_body())]
        seen = [decode_address(*found) for found in self._dump(RTM_GETADDR, IFADDRMSG.pack(0, 0, 0, 0, 0))]
        self.interfaces.load(links, ((found.index, found.address) for found in seen if found))
        self._know_devices()
        fresh: dict[Key, Record] = {}
        for index in self._filter.devices:
            fresh |= self._on_device(index)
        self._doubled.clear()
        for family in (AF_INET, AF_INET6):
            fresh |= self._routes(family)
        for link in self.links.values():
            fresh[link.key] = link
        kinds = (Link, Address, Neighbour, FdbEntry, Route)
        self.mirror.replace(fresh, lambda _, record: isinstance(record, kinds))
        self.drain()

    def _know_devices(self) -> None:
        """Which interfaces are ours, by the table of interfaces; their Link records."""
        ours = [link for link in self.interfaces.links.values() if self.is_ours(link.name)]
        self._filter = RouteFilter(frozenset(link.index for link in ours), self._networks)
        self.links = {link.name: self._record(link) for link in ours}

    def _record(self, link: RawLink) -> Link:
        settings = settings_of(link, self.interfaces.names.get)
        return Link(link.name, settings, link.mtu, link.mac, link.up, self._ethtool.tx_checksum(link.name))

    def _on_device(self, index: int) -> dict[Key, Record]:
        """Addresses, neighbours and forwarding entries of a device of ours."""
        name = self.interfaces.names[index]
        fresh: dict[Key, Record] = {}
        for text in self.interfaces.addresses.get(index, {}):
            if not text.startswith(_FE80_10):
                fresh[(Kind.ADDRESS, name, text)] = Address(name, text)
        narrowed = attribute(NDA_IFINDEX, U32.pack(index))
        for body in (
            NDMSG.pack(AF_INET, 0, 0, 0, 0, 0, 0) + narrowed,
            NDMSG.pack(AF_INET6, 0, 0, 0, 0, 0, 0) + narrowed,
            NDMSG.pack(AF_BRIDGE, 0, 0, index, 0, 0, 0),
        ):
            for data, start, end in self._dump(RTM_GETNEIGH, body):
                if NDMSG.unpack_from(data, start)[3] != index:
                    continue
                found = decode_neighbour(data, start, end, name)
                if found and found[1] is not None:
                    fresh[found[0]] = found[1]
        return fresh

    def _routes(self, family: int, oif: int | None = None) -> dict[Key, Record]:
        """The main table's routes that concern us; of two with one key, the one that the kernel uses."""
        body = RTMSG.pack(family, 0, 0, 0, MAIN_TABLE, 0, 0, 0, 0)
        if oif is not None:
            body += attribute(RTA_OIF, U32.pack(oif))
        fresh: dict[Key, Record] = {}
        names, wanted = self.interfaces.names, self._filter
        for data, start, end in self._dump(RTM_GETROUTE, body):
            route = decode_route(data, start, end, wanted, names)
            if route is None:
                continue
            key = route.key
            if key in fresh:
                self._doubled.add(key)
            else:
                fresh[key] = route
        return fresh

    def _again(self, index: int) -> None:
        """Look at one interface again: its routes, and if it is ours, all that is on it."""
        name = self.interfaces.names.get(index)
        if name is None:
            return
        fresh = self._routes(AF_INET, index) | self._routes(AF_INET6, index)
        # A route with the same key over another interface is the one in use, or else the kernel said so.
        fresh = {key: route for key, route in fresh.items() if self._holder(key) in (None, name)}
        if index in self._filter.devices:
            fresh |= self._on_device(index)
        self.mirror.replace(
            fresh,
            lambda _, record: (
                not isinstance(record, Link)
                and getattr(record, "dev", None) == name
                and isinstance(record, (Address, Neighbour, FdbEntry, Route))
            ),
        )

    def _holder(self, key: Key) -> str | None:
        record = self.mirror.state.get(key)
        return record.dev if isinstance(record, Route) else None

    def _routes_again(self, family: int) -> None:
        v6 = family == AF_INET6
        for key in [key for key in self._doubled if (":" in str(key[1])) == v6]:
            self._doubled.discard(key)
        self.mirror.replace(
            self._routes(family), lambda _, record: isinstance(record, Route) and (":" in record.dst) == v6
        )

    # --- messages --------------------------------------------------------------------------------------------------

    def _take(self, kind: int, flags: int, data: bytes, start: int, end: int) -> None:
        if kind in (RTM_NEWNEIGH, RTM_DELNEIGH):
            index = NDMSG.unpack_from(data, start)[3]
            if index in self._filter.devices:
                found = decode_neighbour(data, start, end, self.interfaces.names[index])
                if found:
                    self.mirror.learn(found[0], found[1] if kind == RTM_NEWNEIGH else None)
        elif kind in (RTM_NEWROUTE, RTM_DELROUTE):
            route = decode_route(data, start, end, self._filter, self.interfaces.names)
            if route is not None:
                self._take_route(route, kind == RTM_NEWROUTE, flags)
        elif kind in (RTM_NEWADDR, RTM_DELADDR):
            self._take_address(data, start, end, kind == RTM_NEWADDR)
        elif kind in (RTM_NEWLINK, RTM_DELLINK) and data[start] == 0:  # another family: a bridge's port
            link = decode_link(data, start, end)
            if kind == RTM_NEWLINK:
                self.take_link(link)
            else:
                self.forget_link(link.index)

    def _take_route(self, route: Route, new: bool, flags: int) -> None:
        key = route.key
        held = self.mirror.state.get(key)
        alone = key not in self._doubled
        if new and alone and (held is None or held == route or flags & NLM_F_REPLACE):
            self.mirror.learn(key, route)
        elif not new and alone and (held is None or _same_way(held, route)):
            self.mirror.learn(key, None)
        else:  # two routes with one key: which one counts only the table knows
            self._stale_families.add(family_of(route.dst))

    def _take_address(self, data: bytes, start: int, end: int, new: bool) -> None:
        seen = decode_address(data, start, end)
        if seen is None or seen.index not in self.interfaces.links:
            return
        name, text = self.interfaces.names[seen.index], seen.address.address
        if new:
            self.interfaces.set_address(seen.index, seen.address)
        else:
            self.interfaces.remove_address(seen.index, text)
            # Routes that need the address go without a message.
            if self.mirror.carries_routes(name):
                self._stale.add(seen.index)
            if self.mirror.sends_from(text.partition("/")[0]):
                self._stale_families.add(family_of(text))
        if seen.index in self._filter.devices and not text.startswith(_FE80_10):
            self.mirror.learn((Kind.ADDRESS, name, text), Address(name, text) if new else None)

    def take_link(self, link: RawLink) -> None:
        """A link as it is now."""
        old = self.interfaces.links.get(link.index)
        renamed = old is not None and old.name != link.name
        if renamed:
            self.forget_link(link.index, keep_addresses=True)
            old = None
        self.interfaces.set_link(link)
        if old is None:
            self._know_devices()
            if renamed or self.is_ours(link.name):
                self._stale.add(link.index)
            for record in self.links.values():
                self.mirror.learn(record.key, record)
            return
        if self.is_ours(link.name):
            record = self._record(link)
            self.links[link.name] = record
            self.mirror.learn(record.key, record)
            if old.up != link.up or old.mac != link.mac:
                self._stale.add(link.index)
        elif old.up != link.up and self.mirror.carries_routes(link.name):
            self._stale.add(link.index)

    def forget_link(self, index: int, *, keep_addresses: bool = False) -> None:
        """A link is gone, or has another name now."""
        link = self.interfaces.links.get(index)
        if link is None:
            return
        addresses = self.interfaces.addresses.get(index, {})
        self.interfaces.remove_link(index)
        if keep_addresses:
            self.interfaces.addresses[index] = addresses
        if self.is_ours(link.name) or self.mirror.carries_routes(link.name):
            self.mirror.drop_device(link.name)
        self._stale.discard(index)
        self._know_devices()

    def look_again(self, index: int) -> None:
        """Whatever is on this interface may have gone: look at it at the next refresh."""
        self._stale.add(index)

    def own_address(self, address: Address, *, there: bool) -> None:
        """We added or removed an address. The kernel's message about IPv6 comes later, from a worker of its own."""
        index = self.interfaces.index(address.dev)
        if index is None:
            return
        if there:
            self.interfaces.set_address(index, InterfaceAddress(address.address))
        else:
            self.interfaces.remove_address(index, address.address)
            self._stale.add(index)  # routes that need it went without a message

    def own_write(self, name: str) -> None:
        """The device of this name is as it is because we wrote it so: no news."""
        link = self.links.get(name)
        if link is not None:
            self.mirror.know(link.key, link)

    def look_at(self, name: str) -> RawLink | None:
        """Ask for a link by name, now."""
        body = link_wire.index_body(0) + attribute(link_wire.IFLA_IFNAME, name.encode() + b"\0")
        try:
            data = self._netlink.get(RTM_GETLINK, body)
        except NetlinkError as error:
            if error.errno == errno.ENODEV:
                return None
            raise
        _, _, start, end = next(messages(data))
        return decode_link(data, start, end)

    # --- questions -------------------------------------------------------------------------------------------------

    def route_to(self, address: str) -> RouteLookup | None:
        family = family_of(address)
        raw = inet_pton(family, address)
        body = RTMSG.pack(family, len(raw) * 8, 0, 0, 0, 0, 0, 0, 0) + attribute(RTA_DST, raw)
        try:
            data = self._netlink.get(RTM_GETROUTE, body)
        except NetlinkError as error:
            if error.errno in (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EACCES, errno.EINVAL, errno.ENOENT):
                return None
            raise
        _, _, start, end = next(messages(data))
        body = _as_main(data[start:end])
        route = decode_route(body, 0, len(body), None, self.interfaces.names or self._names())
        return None if route is None or route.dev is None else RouteLookup(route.dev, route.via, route.src)

    def default_route(self, family: int) -> RouteLookup | None:
        number = AF_INET6 if family == 6 else AF_INET
        names = self.interfaces.names or self._names()
        found: list[Route] = []
        body = RTMSG.pack(number, 0, 0, 0, MAIN_TABLE, 0, 0, 0, 0)
        for data, start, end in self._dump(RTM_GETROUTE, body):
            if data[start + 1] == 0:
                route = decode_route(data, start, end, None, names)
                if route is not None and route.dev is not None:
                    found.append(route)
        if not found:
            return None
        best = min(found, key=lambda route: route.metric or 0)
        return RouteLookup(best.dev or "", best.via, best.src)

    def _names(self) -> dict[int, str]:
        """Before the first observe there is no table of interfaces yet."""
        links = [decode_link(*found) for found in self._dump(RTM_GETLINK, link_wire.dump_body())]
        return {link.index: link.name for link in links}


def _as_main(body: bytes) -> bytes:
    """The answer to a lookup is a clone, perhaps of another table's route; this reads like one of the main table."""
    family, dst_len, src_len, _, _, protocol, scope, kind, _ = RTMSG.unpack_from(body)
    return RTMSG.pack(family, dst_len, src_len, 0, MAIN_TABLE, protocol, scope, kind, 0) + body[12:]


def _same_way(held: Record, gone: Route) -> bool:
    """Whether a deletion notice speaks of the route that we hold; notices may lack flags."""
    return isinstance(held, Route) and replace(gone, onlink=held.onlink, link_scope=held.link_scope) == held
