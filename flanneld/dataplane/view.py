"""What the dataplane knows: the mirror, the interfaces, which of them are ours, and what has to be looked at again.

No netlink here; ``look`` fills it from dumps, ``follow`` from the kernel's messages, ``write`` from acknowledgements.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from backends.kernel_state import Address, InterfaceAddress, Key, Link, RouteLookup, is_flannel_device
from flanneld.dataplane.links import Ethtool, RawLink, settings_of
from flanneld.dataplane.mirror import Interfaces, Mirror
from flanneld.dataplane.wire import RouteFilter


@dataclass(slots=True)
class Stale:
    """What messages cannot tell, so that it has to be looked at: by index of interface, by family of routes, or all."""

    everything: bool = True
    interfaces: set[int] = field(default_factory=set)
    families: set[int] = field(default_factory=set)

    def __bool__(self) -> bool:
        return bool(self.everything or self.interfaces or self.families)

    def clear(self) -> None:
        self.everything = False
        self.interfaces.clear()
        self.families.clear()


class View:
    """``links`` are our devices as rtnetlink sees them, by name."""

    def __init__(self) -> None:
        self.mirror = Mirror()
        self.interfaces = Interfaces()
        self.links: dict[str, Link] = {}
        self.stale = Stale()
        self.filter = RouteFilter()
        self.doubled: set[Key] = set()
        """Keys for which the kernel holds more than one route."""
        self.defaults: dict[int, tuple[RouteLookup, ...]] = {}
        """Default routes by family (4, 6), until something touches them."""
        self._ethtool = Ethtool()
        self._devices: frozenset[str] = frozenset()
        self._networks: tuple[str, ...] = ()
        self._marked_routes = False

    def close(self) -> None:
        self._ethtool.close()

    def limit_to(self, devices: frozenset[str], networks: tuple[str, ...], marked_routes: bool = False) -> None:
        """Which devices, networks and routes concern us; another answer than before makes everything stale."""
        if (devices, networks, marked_routes) != (self._devices, self._networks, self._marked_routes):
            self._devices, self._networks, self._marked_routes = devices, networks, marked_routes
            self.stale.everything = True

    @property
    def pending(self) -> bool:
        """Whether there is something to look at, or something new to tell."""
        return bool(self.stale or self.mirror.pending or self.interfaces.pending)

    def is_ours(self, name: str) -> bool:
        return name in self._devices or is_flannel_device(name)

    def know_devices(self) -> None:
        """Which interfaces are ours, by the table of interfaces; their Link records."""
        ours = [link for link in self.interfaces.links.values() if self.is_ours(link.name)]
        self.filter = RouteFilter(frozenset(link.index for link in ours), self._networks, self._marked_routes)
        self.links = {link.name: self._record(link) for link in ours}

    def _record(self, link: RawLink) -> Link:
        settings = settings_of(link, self.interfaces.names.get)
        return Link(link.name, settings, link.mtu, link.mac, link.up, self._ethtool.tx_checksum(link.name))

    def take_link(self, link: RawLink) -> None:
        """A link as it is now."""
        self.defaults.clear()
        old = self.interfaces.links.get(link.index)
        renamed = old is not None and old.name != link.name
        if renamed:
            self.forget_link(link.index, keep_addresses=True)
            old = None
        self.interfaces.set_link(link)
        if old is None:
            self.know_devices()
            if renamed or self.is_ours(link.name):
                self.stale.interfaces.add(link.index)
            for record in self.links.values():
                self.mirror.learn(record.key, record)
            return
        if self.is_ours(link.name):
            record = self._record(link)
            self.links[link.name] = record
            self.mirror.learn(record.key, record)
            if old.up != link.up or old.mac != link.mac:
                self.stale.interfaces.add(link.index)
        elif old.up != link.up and self.mirror.carries_routes(link.name):
            self.stale.interfaces.add(link.index)

    def forget_link(self, index: int, *, keep_addresses: bool = False) -> None:
        """A link is gone, or has another name now."""
        self.defaults.clear()
        link = self.interfaces.links.get(index)
        if link is None:
            return
        addresses = self.interfaces.addresses.get(index, {})
        self.interfaces.remove_link(index)
        if keep_addresses:
            self.interfaces.addresses[index] = addresses
        if self.is_ours(link.name) or self.mirror.carries_routes(link.name):
            self.mirror.drop_device(link.name)
        self.stale.interfaces.discard(index)
        self.know_devices()

    def look_again(self, index: int) -> None:
        """Whatever is on this interface may have gone: look at it at the next refresh."""
        self.stale.interfaces.add(index)

    def own_address(self, address: Address, *, there: bool) -> None:
        """We added or removed an address. The kernel's message about IPv6 comes later, from a worker of its own."""
        index = self.interfaces.index(address.dev)
        if index is None:
            return
        if there:
            self.interfaces.set_address(index, InterfaceAddress(address.address))
        else:
            self.interfaces.remove_address(index, address.address)
            self.stale.interfaces.add(index)  # routes that need it went without a message

    def own_write(self, name: str) -> None:
        """The device of this name is as it is because we wrote it so: no news."""
        link = self.links.get(name)
        if link is not None:
            self.mirror.know(link.key, link)
