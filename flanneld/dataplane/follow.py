"""The kernel's messages, taken into the view as they come.

Most carry the new truth themselves. Some only show that something else went without a word: the kernel drops IPv4
routes of an interface that goes down, or that need an address that is removed, silently. Those become ``stale``.
"""

from __future__ import annotations

import errno
from dataclasses import replace

from backends.kernel_state import Address, Kind, Record, Route
from flanneld.dataplane.links import decode_link
from flanneld.dataplane.netlink import Monitor, messages
from flanneld.dataplane.view import View
from flanneld.dataplane.wire import (
    NDMSG,
    NLM_F_REPLACE,
    RTM_DELADDR,
    RTM_DELLINK,
    RTM_DELNEIGH,
    RTM_DELROUTE,
    RTM_NEWADDR,
    RTM_NEWLINK,
    RTM_NEWNEIGH,
    RTM_NEWROUTE,
    decode_address,
    decode_neighbour,
    decode_route,
    family_of,
    is_link_local,
)


class Follower:
    """Reads the monitor into the view."""

    def __init__(self, monitor: Monitor, view: View) -> None:
        self._monitor = monitor
        self._view = view

    def drain(self) -> None:
        """Take in the messages that wait. Lost messages lead to a look at everything."""
        try:
            for data in self._monitor.receive():
                for kind, flags, start, end in messages(data):
                    self._take(kind, flags, data, start, end)
        except OSError as error:
            if error.errno != errno.ENOBUFS:
                raise
            self._view.stale.everything = True

    def _take(self, kind: int, flags: int, data: bytes, start: int, end: int) -> None:
        if kind in (RTM_NEWNEIGH, RTM_DELNEIGH):
            index = NDMSG.unpack_from(data, start)[3]
            if index in self._view.filter.devices:
                names = self._view.interfaces.names
                found = decode_neighbour(data, start, end, names[index], names)
                if found:
                    self._view.mirror.learn(found[0], found[1] if kind == RTM_NEWNEIGH else None)
        elif kind in (RTM_NEWROUTE, RTM_DELROUTE):
            if data[start + 1] == 0:
                self._view.defaults.clear()
            route = decode_route(data, start, end, self._view.filter, self._view.interfaces.names)
            if route is not None:
                self._take_route(route, kind == RTM_NEWROUTE, flags)
        elif kind in (RTM_NEWADDR, RTM_DELADDR):
            self._take_address(data, start, end, kind == RTM_NEWADDR)
        elif kind in (RTM_NEWLINK, RTM_DELLINK) and data[start] == 0:  # another family: a bridge's port
            link = decode_link(data, start, end)
            if kind == RTM_NEWLINK:
                self._view.take_link(link)
            else:
                self._view.forget_link(link.index)

    def _take_route(self, route: Route, new: bool, flags: int) -> None:
        key = route.key
        held = self._view.mirror.state.get(key)
        alone = key not in self._view.doubled
        if new and alone and (held is None or held == route or flags & NLM_F_REPLACE):
            self._view.mirror.learn(key, route)
        elif not new and alone and (held is None or _same_way(held, route)):
            self._view.mirror.learn(key, None)
        else:  # two routes with one key: which one counts only the table knows
            self._view.stale.families.add(family_of(route.dst))

    def _take_address(self, data: bytes, start: int, end: int, new: bool) -> None:
        seen = decode_address(data, start, end)
        if seen is None or seen.index not in self._view.interfaces.links:
            return
        name, text = self._view.interfaces.names[seen.index], seen.address.address
        if new:
            self._view.interfaces.set_address(seen.index, seen.address)
        else:
            self._view.interfaces.remove_address(seen.index, text)
            self._view.defaults.clear()
            # Routes that need the address go without a message.
            if self._view.mirror.carries_routes(name):
                self._view.stale.interfaces.add(seen.index)
            if self._view.mirror.sends_from(text.partition("/")[0]):
                self._view.stale.families.add(family_of(text))
        if seen.index in self._view.filter.devices and not is_link_local(text):
            self._view.mirror.learn((Kind.ADDRESS, name, text), Address(name, text) if new else None)


def _same_way(held: Record, gone: Route) -> bool:
    """Whether a deletion notice speaks of the route that we hold; notices may lack flags."""
    return isinstance(held, Route) and replace(gone, onlink=held.onlink, link_scope=held.link_scope) == held
