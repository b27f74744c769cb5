"""Pure: which observed records are ours, decided without any memory (docs/architecture.md has the table).

* Links: a device that flannel would name so and that carries an address inside our network. A second daemon's
  device carries an address of another network, so two daemons never touch each other's.
* On our devices: every address that is not link-local, permanent neighbour, FDB entry, tunnel peer, and every route
  that the kernel did not add itself.
* On other devices: routes with our protocol number, inside our network.
* Uplinks: by the name of their tunnel, if that device is ours or gone.
* Firewall tables and chains, and hooks: by name.
"""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import ip_network

from backends.kernel_state import (
    ROUTE_PROTOCOL,
    Interface,
    Link,
    Record,
    Route,
    Sysctl,
    Uplink,
    is_flannel_device,
)
from flanneld.plan import Owned, device_of
from subnet_lease.lease import IPNetwork

KERNEL_PROTOCOLS = frozenset({2, 9})
"""RTPROT_KERNEL and RTPROT_RA: routes that the kernel writes by itself."""


def ownership(interfaces: Iterable[Interface], networks: Iterable[IPNetwork], desired_devices: frozenset[str]) -> Owned:
    """A predicate over observed records: is this ours to remove?"""
    ours = tuple(networks)
    interfaces = tuple(interfaces)
    names = {interface.name for interface in interfaces}
    devices = desired_devices | {
        interface.name
        for interface in interfaces
        if is_flannel_device(interface.name) and any(within(a.address, ours) for a in interface.addresses)
    }

    def owned(record: Record) -> bool:
        if isinstance(record, Link):
            return record.name in devices
        if isinstance(record, Sysctl):
            return False
        if isinstance(record, Uplink):
            return record.tunnel in devices or record.tunnel not in names
        if isinstance(record, Route):
            if record.protocol in KERNEL_PROTOCOLS:
                return False
            if record.dev in devices:
                return True
            return record.protocol == ROUTE_PROTOCOL and within(record.dst, ours)
        device = device_of(record)
        return device is None or device in devices

    return owned


def with_marked_routes(owned: Owned, others: Iterable[IPNetwork]) -> Owned:
    """``owned``, and every route with our protocol number, but for those inside networks of other daemons.

    For a host whose subnet.env is gone: nothing else tells which network was ours.
    """
    theirs = tuple(others)

    def ours(record: Record) -> bool:
        if isinstance(record, Route) and record.protocol == ROUTE_PROTOCOL and not within(record.dst, theirs):
            return True
        return owned(record)

    return ours


def within(cidr: str, networks: Iterable[IPNetwork]) -> bool:
    """Whether a CIDR text (host bits allowed) lies inside one of the networks."""
    inner = ip_network(cidr, strict=False)
    return any(inner.version == n.version and inner.subnet_of(n) for n in networks)  # type: ignore[arg-type]
