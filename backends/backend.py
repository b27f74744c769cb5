"""The Backend protocol: two questions to pure functions.

*What do I publish in my lease?* and *what do I want in the kernel, for this host and for this peer?* A backend is made
from its options once and holds no other state. It answers with records (``backends.kernel_state``); the reconciler
makes the kernel equal to them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from backends.kernel_state import Record, RouteLookup
from subnet_lease.lease import FAMILIES, Family, IPAddress, IPNetwork, Lease
from subnet_lease.network_config import NetworkConfig


class BackendError(Exception):
    """The backend cannot work with these options or on this host. The text names the thing and the remedy."""


class PeerRefused(Exception):
    """A peer's lease asks for something impossible or harmful. The text says what.

    That peer gets no records but ``records``: what reaches it all the same, in the family that is in order.
    """

    def __init__(self, reason: str, records: Iterable[Record] = ()) -> None:
        super().__init__(reason)
        self.records = tuple(records)


@dataclass(frozen=True, slots=True)
class Underlay:
    """The interface and addresses that carry the tunnels.

    ``local`` is bound on this host, ``public`` is what peers send to; behind NAT they differ (field problem 21).
    ``prefixes`` are the on-link networks of the interface. ``mtu`` is the interface's, in bytes. ``pinned`` are the
    families whose packets the routing table would send by another interface, although this one has a default route,
    too: a tunnel that can name its interface does so (field problem 34). ``ways_out`` are the families in which the
    kernel, left to itself, may send from another address or interface, each with the default route to be used: this
    interface's own, for loopback the one in use; None where there is none. ``index`` tells an interface from another one
    that later has the same name. ``loopback``: packets have this interface's address and leave by others.
    """

    name: str
    mtu: int
    local: Mapping[Family, IPAddress]
    public: Mapping[Family, IPAddress]
    prefixes: tuple[IPNetwork, ...] = ()
    pinned: frozenset[Family] = frozenset()
    ways_out: Mapping[Family, RouteLookup | None] = field(default_factory=dict)
    index: int = 0
    loopback: bool = False


@dataclass(frozen=True, slots=True)
class Host:
    """Everything about this node that a backend may look at.

    ``facts`` are answers to the backend's ``needs``, found by the daemon: "vtep_mac" and "vtep_mac_v6" (text),
    "wireguard_key" (private, base64), "wireguard_public_key", "startup_output" (the extension backend's).
    ``subnets`` is empty until the lease is ours.
    """

    underlay: Underlay
    config: NetworkConfig
    subnets: Mapping[Family, IPNetwork] = field(default_factory=dict)
    facts: Mapping[str, str] = field(default_factory=dict, repr=False)
    families: tuple[Family, ...] = field(init=False)
    """The families for which we hold a subnet; asked once for each peer, so it is not found anew each time."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "families", tuple(f for f in FAMILIES if f in self.subnets))


@dataclass(frozen=True, slots=True)
class Published:
    """The backend's part of a lease: BackendType and the two BackendData values (None: the key is left out)."""

    backend_type: str
    data: Any = None
    v6_data: Any = None


class Backend(Protocol):
    """Implementations: one file each in this package, or a package that declares ``flanneld.backends``."""

    name: ClassVar[str]
    needs: ClassVar[frozenset[str]]
    """Which facts the daemon must find for ``Host.facts``."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        """Validate ``options`` (the configuration's Backend object without Type); BackendError names what is wrong."""

    @property
    def unknown_options(self) -> tuple[str, ...]:
        """Keys of ``options`` that nothing reads."""

    def mtu(self, underlay: Underlay, families: tuple[Family, ...]) -> int:
        """The MTU that containers may use, in bytes: FLANNEL_MTU, valid for every given family."""

    def published(self, host: Host) -> Published:
        """What goes into our lease."""

    def accepts(self, peer: Lease) -> bool:
        """Whether a lease of this backend_type is a peer of ours; leases of others are ignored."""

    def host_state(self, host: Host) -> Iterable[Record]:
        """Devices, addresses, sysctls and routes that do not depend on peers."""

    def peer_state(self, host: Host, peer: Lease) -> Iterable[Record]:
        """What reaches one peer. Raises PeerRefused."""


def by_family(host: Host, peer: Lease, records_of: Callable[[Family], Iterable[Record]]) -> tuple[Record, ...]:
    """The records of each family that both run. A family that is refused does not take the other one with it."""
    records: list[Record] = []
    reasons: list[str] = []
    for family in host.families:
        if peer.subnet_of(family) is None:
            continue
        try:
            records += records_of(family)
        except PeerRefused as refusal:
            reasons.append(str(refusal))
    if reasons:
        raise PeerRefused("; ".join(dict.fromkeys(reasons)), records)
    return tuple(records)


def peer_address(host: Host, peer: Lease, family: Family) -> IPAddress:
    """Where to send to ``peer``; PeerRefused for an address that cannot be another host's."""
    address = peer.attrs.public_ip_of(family)
    if address is None:
        raise PeerRefused(f"lease {peer.cidr} publishes no IPv{family} address")
    if address.is_unspecified or address.is_loopback or address.is_multicast:
        raise PeerRefused(f"lease {peer.cidr} publishes {address}, which is no host's address")
    if address in (host.underlay.local.get(family), host.underlay.public.get(family)):
        raise PeerRefused(f"lease {peer.cidr} publishes {address}, which is this node's own address")
    return address


def direct(host: Host, peer: Lease, address: IPAddress) -> bool:
    """Whether ``peer`` itself, and no router in its name, is reached at ``address`` without a gateway."""
    return address.version not in peer.attrs.behind_nat and on_link(host, address)


def on_link(host: Host, address: IPAddress) -> bool:
    """Whether ``address`` is reached without a gateway through the underlay interface."""
    return any(address.version == prefix.version and address in prefix for prefix in host.underlay.prefixes)
