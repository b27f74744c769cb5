"""Looking at the kernel by dumps: in full, at one interface again, at the routes of one family; all into the view."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from socket import AF_INET, AF_INET6, inet_pton

from backends.kernel_state import (
    Address,
    FdbEntry,
    Key,
    Kind,
    Link,
    Neighbour,
    Record,
    Route,
    RouteLookup,
)
from flanneld.dataplane import links as link_wire
from flanneld.dataplane.follow import Follower
from flanneld.dataplane.links import RawLink, decode_link
from flanneld.dataplane.netlink import Netlink, NetlinkError, messages
from flanneld.dataplane.view import View
from flanneld.dataplane.wire import (
    AF_BRIDGE,
    IFADDRMSG,
    IPV6_DEFAULT_METRIC,
    MAIN_TABLE,
    NDA_IFINDEX,
    NDMSG,
    RTA_DST,
    RTA_OIF,
    RTM_GETADDR,
    RTM_GETLINK,
    RTM_GETNEIGH,
    RTM_GETROUTE,
    RTM_NEWLINK,
    RTMSG,
    U32,
    as_main,
    attribute,
    decode_address,
    decode_neighbour,
    decode_route,
    family_of,
    first_hop,
    is_link_local,
)

_NOTHING_THERE = frozenset({errno.ENOENT, errno.ENODEV, errno.EAFNOSUPPORT, errno.EOPNOTSUPP, errno.ENXIO, errno.ESRCH})
"""What a filtered dump says when the device or the whole address family is not there."""


class Look:
    """Keeps the view true: by dumps at first and where it is stale, else by following the messages."""

    def __init__(self, netlink: Netlink, follower: Follower, view: View) -> None:
        self._netlink = netlink
        self._follower = follower
        self._view = view
        self.blind = False
        """Whether the last look failed: then nothing new is known, however stale the view is."""

    def refresh(self) -> bool:
        """Bring everything up to date. True if that took a look at everything. Raises OSError."""
        stale = self._view.stale
        self.blind = True
        try:
            self._follower.drain()
            everything = stale.everything
            if everything:
                self._look_at_everything()
            while stale.interfaces:
                self._again(stale.interfaces.pop())
            while stale.families:
                self._routes_again(stale.families.pop())
        except OSError:
            stale.everything = True
            raise
        self.blind = False
        return everything

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
        self._view.stale.clear()
        self._view.defaults.clear()
        links = [decode_link(*found) for found in self._dump(RTM_GETLINK, link_wire.dump_body())]
        seen = [decode_address(*found) for found in self._dump(RTM_GETADDR, IFADDRMSG.pack(0, 0, 0, 0, 0))]
        self._view.interfaces.load(links, ((found.index, found.address) for found in seen if found))
        self._view.know_devices()
        fresh: dict[Key, Record] = {}
        for index in self._view.filter.devices:
            fresh |= self._on_device(index)
        self._view.doubled.clear()
        for family in (AF_INET, AF_INET6):
            fresh |= self._routes(family)
        for link in self._view.links.values():
            fresh[link.key] = link
        kinds = (Link, Address, Neighbour, FdbEntry, Route)
        self._view.mirror.replace(fresh, lambda _, record: isinstance(record, kinds))
        self._follower.drain()

    def _on_device(self, index: int) -> dict[Key, Record]:
        """Addresses, neighbours and forwarding entries of a device of ours."""
        name = self._view.interfaces.names[index]
        fresh: dict[Key, Record] = {}
        for text in self._view.interfaces.addresses.get(index, {}):
            if not is_link_local(text):
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
                found = decode_neighbour(data, start, end, name, self._view.interfaces.names)
                if found and found[1] is not None:
                    fresh[found[0]] = found[1]
        return fresh

    def _routes(self, family: int, oif: int | None = None) -> dict[Key, Record]:
        """The main table's routes that concern us; of two with one key, the one that the kernel uses."""
        body = RTMSG.pack(family, 0, 0, 0, MAIN_TABLE, 0, 0, 0, 0)
        if oif is not None:
            body += attribute(RTA_OIF, U32.pack(oif))
        fresh: dict[Key, Record] = {}
        names, wanted = self._view.interfaces.names, self._view.filter
        for data, start, end in self._dump(RTM_GETROUTE, body):
            route = decode_route(data, start, end, wanted, names)
            if route is None:
                continue
            key = route.key
            if key in fresh:
                self._view.doubled.add(key)
            else:
                fresh[key] = route
        return fresh

    def _again(self, index: int) -> None:
        """Look at one interface again: its routes, and if it is ours, all that is on it."""
        name = self._view.interfaces.names.get(index)
        if name is None:
            return
        fresh = self._routes(AF_INET, index) | self._routes(AF_INET6, index)
        # A route with the same key over another interface is the one in use, or else the kernel said so.
        fresh = {key: route for key, route in fresh.items() if self._holder(key) in (None, name)}
        if index in self._view.filter.devices:
            fresh |= self._on_device(index)
        self._view.mirror.replace(
            fresh,
            lambda _, record: (
                not isinstance(record, Link)
                and getattr(record, "dev", None) == name
                and isinstance(record, (Address, Neighbour, FdbEntry, Route))
            ),
        )

    def _holder(self, key: Key) -> str | None:
        record = self._view.mirror.state.get(key)
        return record.dev if isinstance(record, Route) else None

    def _routes_again(self, family: int) -> None:
        v6 = family == AF_INET6
        for key in [key for key in self._view.doubled if (":" in str(key[1])) == v6]:
            self._view.doubled.discard(key)
        self._view.mirror.replace(
            self._routes(family), lambda _, record: isinstance(record, Route) and (":" in record.dst) == v6
        )

    # --- messages --------------------------------------------------------------------------------------------------

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
        body = as_main(data[start:end])
        route = decode_route(body, 0, len(body), None, self._view.interfaces.names or self._names())
        return None if route is None or route.dev is None else RouteLookup(route.dev, route.via, route.src)

    def default_routes(self, family: int) -> tuple[RouteLookup, ...]:
        """The default routes of the family (4, 6) by rising metric; where one has several gateways, its first."""
        known = self._view.defaults
        if not self._view.interfaces.names:
            return self._default_routes(family, self._names())
        self._follower.drain()
        if family not in known or self._view.stale.everything:
            known[family] = self._default_routes(family, self._view.interfaces.names)
        return known[family]

    def _default_routes(self, family: int, names: dict[int, str]) -> tuple[RouteLookup, ...]:
        found: list[tuple[int, RouteLookup]] = []
        body = RTMSG.pack(AF_INET6 if family == 6 else AF_INET, 0, 0, 0, MAIN_TABLE, 0, 0, 0, 0)
        for data, start, end in self._dump(RTM_GETROUTE, body):
            if data[start + 1] != 0:
                continue
            route = decode_route(data, start, end, None, names)
            if route is None or route.type == "blackhole":
                continue
            hop = RouteLookup(route.dev, route.via, route.src) if route.dev else first_hop(data, start, end, names)
            metric = route.metric or (IPV6_DEFAULT_METRIC if family == 6 else 0)
            if hop is not None:
                found.append((metric, hop))
        return tuple(hop for _, hop in sorted(found, key=lambda entry: entry[0]))

    def _names(self) -> dict[int, str]:
        """Before the first observe there is no table of interfaces yet."""
        links = [decode_link(*found) for found in self._dump(RTM_GETLINK, link_wire.dump_body())]
        return {link.index: link.name for link in links}
