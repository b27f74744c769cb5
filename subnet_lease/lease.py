"""Leases: which node owns which subnet, and what it tells its peers about itself.

The JSON spelling is flannel's (pkg/lease/lease.go), byte for byte, so that both can share one datastore.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Any, Final, Literal

from subnet_lease.network_config import NetworkConfig
from subnet_lease.persistent_map import PersistentMap

Family = Literal[4, 6]
FAMILIES: Final[tuple[Family, Family]] = (4, 6)
IPNetwork = IPv4Network | IPv6Network
IPAddress = IPv4Address | IPv6Address


@dataclass(frozen=True, slots=True)
class NodeIdentity:
    """Who a node is: three marks, no one of which is enough (docs/adr: node identity). "" means unknown."""

    name: str
    machine_id: str = ""
    mac: str = ""


@dataclass(frozen=True, slots=True)
class LeaseAttrs:
    """What a node publishes with its lease.

    ``backend_data`` is any JSON value, None when the backend publishes nothing for that family. ``node`` and
    ``behind_nat`` travel in an extra key that flannel ignores; a lease that a flanneld wrote has none. ``behind_nat``:
    the families whose public address is a router's, so that nobody has this node on its link.
    """

    public_ip: IPv4Address | None = None
    public_ipv6: IPv6Address | None = None
    backend_type: str = ""
    backend_data: Any = None
    backend_v6_data: Any = None
    node: NodeIdentity | None = None
    behind_nat: tuple[Family, ...] = ()

    @property
    def nat_family(self) -> Family | None:
        """The family behind NAT, where the node publishes the other one, too, and that is not; else None."""
        partly = self.behind_nat and any(self.public_ip_of(f) for f in FAMILIES if f not in self.behind_nat)
        return self.behind_nat[0] if partly else None

    def public_ip_of(self, family: Family) -> IPAddress | None:
        return self.public_ip if family == 4 else self.public_ipv6

    def backend_data_of(self, family: Family) -> Any:
        return self.backend_data if family == 4 else self.backend_v6_data


def marked_behind_nat(attrs: LeaseAttrs, family: Any) -> LeaseAttrs:
    """``attrs`` of a node that says it is behind NAT; ``family`` is what it says of the family, None: it is in all."""
    public = tuple(f for f in FAMILIES if attrs.public_ip_of(f) is not None)
    return replace(attrs, behind_nat=tuple(f for f in public if family not in FAMILIES or f == family))


@dataclass(frozen=True, slots=True)
class Lease:
    """A subnet (one for each family) and its owner's attributes.

    ``revision`` is the store's revision of the value that was read, 0 where the store has none. ``reservation`` is
    true for a lease that never expires. ``store_ref`` is the store's own handle (etcd's lease id), else 0.
    ``unreadable`` is true where the key names a subnet and nobody can read the value: the subnet is taken, by whom is
    not known. A snapshot has no such leases.
    """

    subnet: IPv4Network | None
    ipv6_subnet: IPv6Network | None
    attrs: LeaseAttrs
    revision: int = 0
    reservation: bool = False
    store_ref: int = 0
    unreadable: bool = False

    @property
    def key(self) -> str:
        """flannel's key: 10.5.52.0-24, or 10.5.52.0-24&fc00:0:0:34::-64 (pkg/subnet/subnet.go, MakeSubnetKey)."""
        return subnet_key(self.subnet, self.ipv6_subnet)

    @property
    def cidr(self) -> str:
        """For people, and as flannelctl takes it."""
        return cidr(self.subnet, self.ipv6_subnet)

    @property
    def families(self) -> tuple[Family, ...]:
        return tuple(family for family in FAMILIES if self.subnet_of(family) is not None)

    def subnet_of(self, family: Family) -> IPNetwork | None:
        return self.subnet if family == 4 else self.ipv6_subnet


def subnet_key(subnet: IPv4Network | None, ipv6_subnet: IPv6Network | None) -> str:
    """The key of a pair of subnets; a missing IPv4 subnet is spelled 0.0.0.0-0, as flannel does."""
    v4 = f"{subnet.network_address}-{subnet.prefixlen}" if subnet else "0.0.0.0-0"
    return f"{v4}&{ipv6_subnet.network_address}-{ipv6_subnet.prefixlen}" if ipv6_subnet else v4


def cidr(subnet: IPNetwork | None, ipv6_subnet: IPNetwork | None) -> str:
    """A pair of subnets for people: 10.5.52.0/24, or 10.5.52.0/24,fc00:0:0:34::/64."""
    return ",".join(str(network) for network in (subnet, ipv6_subnet) if network is not None)


@dataclass(frozen=True, slots=True)
class NodeHints:
    """What the store itself says about this node's addresses (Kubernetes' node-public-ip annotations)."""

    public_ip: IPv4Address | None = None
    public_ipv6: IPv6Address | None = None


@dataclass(frozen=True, slots=True)
class LeaseSnapshot:
    """Everything the store says at one revision: all leases by key, our own among them, and the configuration.

    A snapshot is complete or it does not exist. Unchanged leases are the *same objects* as in the snapshot before, so
    that ``leases.differences`` tells a reader which ones changed since any snapshot that it had, at the cost of those.
    """

    config: NetworkConfig
    leases: PersistentMap[str, Lease] = field(default_factory=PersistentMap)
    revision: int = 0
    hints: NodeHints = NodeHints()
