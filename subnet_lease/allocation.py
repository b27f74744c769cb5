"""Pure choice of a subnet: which leases are ours, which subnets are free, which one to claim.

No clock, no randomness, no I/O: liveness of an owner and the random index come in as arguments. Cost grows with the
number of leases, never with the size of the network.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network
from typing import Final, Literal

from subnet_lease.lease import (
    FAMILIES,
    Family,
    IPNetwork,
    Lease,
    LeaseAttrs,
    NodeIdentity,
    cidr,
)
from subnet_lease.network_config import NetworkConfig
from subnet_lease.store import AddressInUse, LeaseRequest, OutOfSubnets, SubnetTaken

Subnets = tuple[IPv4Network | None, IPv6Network | None]
Likeness = Literal["same", "alike", "other", "unknown"]
Alive = Callable[[Lease], bool]
"""Whether a lease's owner is running right now, somewhere other than here."""

FIRST_FREE: Final = 100
"""As many free subnets are looked at, and one of them taken at random; flannel's number."""


def likeness(lease: NodeIdentity | None, ours: NodeIdentity) -> Likeness:
    """How much a lease's owner looks like us. Marks that either side lacks say nothing (ADR 0003)."""
    if lease is None:
        return "unknown"
    if lease == ours:
        return "same"
    pairs = [(lease.name, ours.name), (lease.machine_id, ours.machine_id), (lease.mac, ours.mac)]
    known = [a == b for a, b in pairs if a and b]
    equal = sum(known)
    if equal < 2:
        return "other"
    return "same" if equal == len(known) else "alike"


def reserved_by_name(lease: Lease, ours: NodeIdentity) -> bool:
    """Whether this is a reservation that carries our name and nothing else, so that no node has taken it yet."""
    attrs = lease.attrs
    bare = attrs.public_ip is None and attrs.public_ipv6 is None
    return lease.reservation and bare and bool(ours.name) and attrs.node == NodeIdentity(ours.name)


def same_address(a: LeaseAttrs, b: LeaseAttrs) -> bool:
    """Whether two nodes publish one address, in either family."""
    return any(a.public_ip_of(f) is not None and a.public_ip_of(f) == b.public_ip_of(f) for f in FAMILIES)


@dataclass(frozen=True, slots=True)
class Own:
    """What the leases say about us: the lease to take back, and the one whose live owner has our address."""

    lease: Lease | None
    rival: Lease | None = None


def find_own(leases: Iterable[Lease], request: LeaseRequest, alive: Alive) -> Own:
    """The lease that is ours: by identity, else by public IP as flannel does it (ADR 0003 has the table)."""
    best: tuple[tuple[int, bool, bool, str], Lease] | None = None
    rival: Lease | None = None
    for lease in leases:
        alike = likeness(lease.attrs.node, request.identity)
        address = same_address(lease.attrs, request.attrs)
        named = reserved_by_name(lease, request.identity)
        if not address and not named and alike in ("other", "unknown"):
            continue
        if alike != "unknown" and alive(lease):
            rival = lease if address else rival
            continue
        rank = 1 if named else {"same": 0, "unknown": 2, "alike": 3, "other": 4}[alike]
        order = (rank, not address, (lease.subnet, lease.ipv6_subnet) != request.previous, lease.key)
        if best is None or order < best[0]:
            best = (order, lease)
    return Own(best[1] if best else None, rival)


def address_in_use(rival: Lease, request: LeaseRequest) -> AddressInUse:
    """The error for a node whose public IP a live node holds."""
    family: Family = 4 if rival.attrs.public_ip_of(4) == request.attrs.public_ip_of(4) else 6
    owner = rival.attrs.node.name if rival.attrs.node else "unknown"
    likely_ghost = likeness(rival.attrs.node, request.identity) in ("same", "alike")
    return AddressInUse(
        f"public IP {rival.attrs.public_ip_of(family)} of node {request.identity.name!r} is in use by the live node "
        f"{owner!r}, which leases {rival.cidr}. Two nodes cannot share one: give each its own with --public-ip or "
        f"choose another interface with --iface; if both are one machine, give it one --node-name"
        + ("; if that was this node before a crash, it has its lease back within 30 s" if likely_ghost else "")
    )


def fits(config: NetworkConfig, subnets: Subnets) -> bool:
    """Whether the configuration would hand out these subnets: right families, right length, inside the range."""
    return _right_families(config, subnets) and all(subnet is None or _in_range(config, subnet) for subnet in subnets)


def suits(config: NetworkConfig, request: LeaseRequest, own: Lease) -> bool:
    """Whether we go on with our own lease as it is: right families, and where it was, or at least inside the network.

    Range and length bind new subnets only: containers live in the old one.
    """
    subnets = (own.subnet, own.ipv6_subnet)
    if not _right_families(config, subnets):
        return False
    if request.keep:
        return all(had is None or had == now for had, now in zip(request.previous, subnets, strict=True))
    return all(subnet is None or _in_network(config, subnet) for subnet in subnets)


def _right_families(config: NetworkConfig, subnets: Subnets) -> bool:
    return all((subnet is None) == (config.network_of(f) is None) for f, subnet in zip(FAMILIES, subnets, strict=True))


def _in_network(config: NetworkConfig, subnet: IPNetwork) -> bool:
    network = config.network_of(subnet.version)
    return network is not None and subnet.subnet_of(network)  # type: ignore[arg-type]


def _in_range(config: NetworkConfig, subnet: IPNetwork) -> bool:
    low, high = config.subnet_range_of(subnet.version)
    if subnet.prefixlen != config.subnet_len_of(subnet.version) or low is None or high is None:
        return False
    return int(low.network_address) <= int(subnet.network_address) <= int(high.network_address)


def choose(
    config: NetworkConfig,
    leases: Collection[Lease],
    request: LeaseRequest,
    pick: Callable[[int], int],
    own: Lease | None = None,
) -> Subnets:
    """The subnets to claim. For each family: what ``own`` has, else the previous one while free, else a random one; for
    IPv6, before that, the one in the same place as the IPv4 subnet.

    ``own`` is our lease that does not suit as a whole, ``leases`` are all others, ``pick(n)`` is an index below n.
    Raises SubnetTaken when ``request.keep`` is set and the previous ones cannot be had, OutOfSubnets when none is free.
    """
    if request.keep:
        _check_kept(leases, request)
    chosen: dict[Family, IPNetwork] = {}
    for family in FAMILIES:
        had = request.previous[0 if family == 4 else 1]
        if request.keep and had is not None:
            chosen[family] = had
        elif config.network_of(family) is not None:
            held = own.subnet_of(family) if own is not None else None
            twin = _twin(config, chosen[4]) if family == 6 and 4 in chosen else None
            wishes = (
                held if held is not None and _in_network(config, held) else None,
                had if had is not None and _in_range(config, had) else None,
                twin
                if twin is not None and not any(twin.overlaps(n) for n in request.avoid if n.version == 6)
                else None,
            )
            wish = next((wish for wish in wishes if wish is not None and _free(wish, leases)), None)
            chosen[family] = wish or _any_free(config, family, leases, request, pick)
    v4, v6 = chosen.get(4), chosen.get(6)
    assert not isinstance(v4, IPv6Network) and not isinstance(v6, IPv4Network)
    return v4, v6


def _twin(config: NetworkConfig, v4: IPNetwork) -> IPv6Network | None:
    """The IPv6 subnet in the same place as this IPv4 subnet: 10.5.7.0/24 and fc00:0:0:7::/64.

    When IPv6 is turned on, every node looks for a subnet at once; so they do not all race for the first ones.
    """
    network4, network6 = config.network_of(4), config.network_of(6)
    if network4 is None or not isinstance(network6, IPv6Network) or not _in_network(config, v4):
        return None
    place = (int(v4.network_address) - int(network4.network_address)) >> (32 - config.subnet_len)
    first = int(network6.network_address) + (place << (128 - config.ipv6_subnet_len))
    if first > int(network6.broadcast_address):
        return None
    twin = IPv6Network((first, config.ipv6_subnet_len))
    return twin if _in_range(config, twin) else None


def _any_free(
    config: NetworkConfig, family: Family, leases: Collection[Lease], request: LeaseRequest, pick: Callable[[int], int]
) -> IPNetwork:
    network, low = config.network_of(family), config.subnet_range_of(family)[0]
    assert network is not None
    free = free_subnets(config, family, [*leases, *_as_leases(request.avoid, network)])
    if not free or low is None:
        raise OutOfSubnets(_out_of_subnets(config, family, leases) + _because_of(request.avoid, network))
    size = 1 << (network.max_prefixlen - config.subnet_len_of(family))
    index = free[pick(len(free))]
    return type(network)((int(low.network_address) + index * size, config.subnet_len_of(family)))


def _as_leases(avoid: Iterable[IPNetwork], network: IPNetwork) -> Iterable[Lease]:
    """The hosts' networks as if they were leased. One that holds the whole network says nothing: it is on purpose."""
    for prefix in avoid:
        if isinstance(prefix, IPv4Network) and isinstance(network, IPv4Network) and prefix.subnet_of(network):
            yield Lease(prefix, None, LeaseAttrs())
        elif isinstance(prefix, IPv6Network) and isinstance(network, IPv6Network) and prefix.subnet_of(network):
            yield Lease(None, prefix, LeaseAttrs())


def _because_of(avoid: Iterable[IPNetwork], network: IPNetwork) -> str:
    taken = [str(lease.subnet or lease.ipv6_subnet) for lease in _as_leases(avoid, network)]
    return f". Not handed out, since hosts are there: {', '.join(taken)}" if taken else ""


def _check_kept(leases: Iterable[Lease], request: LeaseRequest) -> None:
    for lease in leases:
        if _overlaps(lease, request.previous):
            address = lease.attrs.public_ip or lease.attrs.public_ipv6
            owner = lease.attrs.node.name if lease.attrs.node else str(address or "a node without a name")
            subnet = cidr(*request.previous)
            taken = f"subnet {subnet} of this node is now leased to {owner!r} as {lease.cidr}"
            if lease.unreadable:
                taken = f"subnet {subnet} of this node is taken by {lease.cidr}, whose value nobody can read"
            raise SubnetTaken(
                f"{taken}. This node keeps its data path; release the other lease (flannelctl release {lease.cidr}), or "
                f"drain this node, remove its subnet file and restart flanneld to get a new subnet"
            )


def _free(subnet: IPNetwork, leases: Iterable[Lease]) -> bool:
    pair = (subnet, None) if isinstance(subnet, IPv4Network) else (None, subnet)
    return not any(_overlaps(lease, pair) for lease in leases)


def _overlaps(lease: Lease, subnets: Subnets) -> bool:
    v4, v6 = subnets
    return bool(
        (v4 and lease.subnet and v4.overlaps(lease.subnet))
        or (v6 and lease.ipv6_subnet and v6.overlaps(lease.ipv6_subnet))
    )


def overlapping(leases: Iterable[Lease], subnets: Subnets) -> list[Lease]:
    """The leases that share an address with these subnets."""
    return [lease for lease in leases if _overlaps(lease, subnets)]


def key_tells_all(config: NetworkConfig, leases: Iterable[Lease]) -> bool:
    """Whether two overlapping leases would have the same key: one family, and all subnets of one length."""
    families = [family for family in FAMILIES if config.network_of(family) is not None]
    if len(families) != 1:
        return False
    family, length = families[0], config.subnet_len_of(families[0])
    other: Family = 6 if family == 4 else 4
    for lease in leases:
        subnet = lease.subnet_of(family)
        if subnet is None or subnet.prefixlen != length or lease.subnet_of(other) is not None:
            return False
    return True


def free_subnets(config: NetworkConfig, family: Family, leases: Iterable[Lease], limit: int = FIRST_FREE) -> list[int]:
    """Indexes, counted from SubnetMin, of the first ``limit`` subnets that overlap no lease."""
    low, high = config.subnet_range_of(family)
    if low is None or high is None:
        return []
    size = 1 << (low.max_prefixlen - low.prefixlen)
    base = int(low.network_address)
    count = (int(high.network_address) - base) // size + 1
    taken = []
    for lease in leases:
        subnet = lease.subnet_of(family)
        if subnet is not None:
            first = int(subnet.network_address) - base
            last = first + (1 << (subnet.max_prefixlen - subnet.prefixlen)) - 1
            taken.append((first // size, last // size))
    taken.sort()
    free: list[int] = []
    position = 0
    for first, last in [*taken, (count, count)]:
        while position < min(first, count) and len(free) < limit:
            free.append(position)
            position += 1
        position = max(position, last + 1)
    return free


def _out_of_subnets(config: NetworkConfig, family: Family, leases: Collection[Lease]) -> str:
    low, high = config.subnet_range_of(family)
    assert low is not None and high is not None
    size = 1 << (low.max_prefixlen - low.prefixlen)
    count = (int(high.network_address) - int(low.network_address)) // size + 1
    here = [lease for lease in leases if lease.subnet_of(family) is not None]
    unfit = [lease.cidr for lease in here if not fits(config, (lease.subnet, lease.ipv6_subnet))]
    reserved = [lease.cidr for lease in here if lease.reservation]
    unreadable = [lease.cidr for lease in here if lease.unreadable]
    text = (
        f"out of subnets: all {count} IPv{family} subnets from {low} to {high} are taken, {len(here)} leases, "
        f"{len(reserved)} of them reservations. "
    )
    if unfit:
        text += f"Left over from another configuration: {_some(unfit)}. "
    if reserved:
        text += f"Reserved: {_some(reserved)}. "
    if unreadable:
        text += f"Of nobody knows whom, since the value cannot be read: {_some(unreadable)}. "
    return text + (
        "Release what is no longer used (flannelctl leases, flannelctl release), let leases of removed nodes expire, "
        f"or make the network larger or {'SubnetLen' if family == 4 else 'IPv6SubnetLen'} longer"
    )


def _some(keys: list[str]) -> str:
    more = len(keys) - 5
    return ", ".join(sorted(keys)[:5]) + (f" and {more} more" if more > 0 else "")
