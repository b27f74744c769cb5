"""Pure: what this host should have in its kernel, kept up to date lease by lease.

One ``DesiredState`` holds for one standing of this node (its configuration, backend, underlay and own lease); when
that changes, a new one is made. ``update`` takes complete snapshots and costs one call of the backend for each lease
that differs from the last one it took; the others are not looked at.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, field
from itertools import takewhile

from backends.backend import Backend, Host, PeerRefused
from backends.kernel_state import (
    BLACKHOLE_METRIC,
    ROUTE_PROTOCOL,
    Firewall,
    KernelState,
    Key,
    Kind,
    Link,
    Record,
    Route,
    Scope,
    Sysctl,
)
from subnet_lease.lease import FAMILIES, Family, IPNetwork, Lease
from subnet_lease.persistent_map import PersistentMap


@dataclass(frozen=True, slots=True)
class Standing:
    """What this node is at the moment: everything that the desired state depends on, except the peers."""

    backend: Backend
    host: Host
    lease: Lease
    firewalls: tuple[Firewall, ...] = ()
    blackhole: bool = False
    former_networks: tuple[IPNetwork, ...] = ()
    """Networks that this node was part of before (from subnet.env); what is left of them is ours to remove."""
    instance: str = ""


LINGER = 2.0
"""Seconds for which a peer whose lease is gone keeps its records, unless another lease needs them: a key that was
deleted by mistake is claimed again within that time, and no packet is lost meanwhile."""


@dataclass(frozen=True, slots=True)
class Update:
    """Where an update may have changed something: keys of records that came, went or changed, and keys of leases."""

    records: set[Key] = field(default_factory=set)
    leases: set[str] = field(default_factory=set)


class DesiredState:
    """The desired records by key, and why some peers have none."""

    def __init__(self, standing: Standing) -> None:
        self.standing = standing
        host = standing.host
        self.networks: tuple[IPNetwork, ...] = tuple(
            n for n in (host.config.network_of(f) for f in FAMILIES) if n is not None
        )
        self._own_key = standing.lease.key
        self._ranges: tuple[tuple[Family, IPNetwork, IPNetwork | None], ...] = tuple(
            (f, n, host.subnets.get(f)) for f in FAMILIES if (n := host.config.network_of(f)) is not None
        )
        self._records: dict[Key, Record] = {}
        self._owner: dict[Key, str] = {}
        self._leases: PersistentMap[str, Lease] = PersistentMap()
        self._peers: dict[str, dict[Key, Record]] = {}
        self._lingering: dict[str, float] = {}
        """Leases that are gone, and when their records go, the first one first."""
        self._waiting: dict[Key, set[str]] = {}
        """Leases that were refused because another one has this record; ``_waits_for``: the record, by lease."""
        self._waits_for: dict[str, Key] = {}
        self.refused: dict[str, str] = {}
        for record in self._host_records():
            self._records[record.key] = record
        self.scope = Scope(
            devices=frozenset(r.name for r in self._records.values() if isinstance(r, Link)),
            networks=tuple(str(n) for n in (*self.networks, *standing.former_networks)),
            instance=standing.instance,
            firewall=standing.firewalls,
            sysctls=tuple(r.path for r in self._records.values() if isinstance(r, Sysctl)),
            sources=tuple(f"{address}%{host.underlay.index}" for address in host.underlay.local.values()),
        )

    @property
    def state(self) -> KernelState:
        return self._records

    @property
    def leases(self) -> Mapping[str, Lease]:
        """The leases of the last ``update``."""
        return self._leases

    @property
    def peers(self) -> int:
        """How many peers have records."""
        return len(self._peers)

    @property
    def admitted(self) -> Set[str]:
        """The leases of those peers, by key."""
        return self._peers.keys()

    @property
    def next_departure(self) -> float | None:
        """When ``update`` has something to do without a new snapshot, on the clock of its ``now``."""
        return next(iter(self._lingering.values()), None)

    def update(self, leases: PersistentMap[str, Lease], now: float) -> Update:
        """Follow a snapshot at time ``now`` (seconds)."""
        update = Update()
        # In the order of their keys: of leases that collide, every node that starts gives the same one its way.
        news = [(key, leases.get(key)) for key in sorted(leases.differences(self._leases))]
        self._leases = leases
        freed: set[Key] = set()
        for key, lease in news:
            if lease is None:
                self._lingering[key] = now + LINGER
                self.refused.pop(key, None)
                self._stop_waiting(key)
                update.leases.add(key)
                freed.update(self._peers.get(key, ()))
        for key, lease in news:
            if lease is not None:
                self._lingering.pop(key, None)
                self._admit(key, lease, update)
        for key in list(takewhile(lambda key: self._lingering[key] <= now, self._lingering)):
            self._withdraw(key, update)
        # What a refused peer collided with may be gone, or go, now.
        waiting = {waiter for key in freed | update.records for waiter in self._waiting.pop(key, ())}
        for key in sorted(waiting):
            if key in self.refused:
                self._admit(key, leases[key], update)
        return update

    def _host_records(self) -> Iterable[Record]:
        yield from self.standing.backend.host_state(self.standing.host)
        yield from self.standing.firewalls
        if self.standing.blackhole:
            for subnet in self.standing.host.subnets.values():
                yield Route(str(subnet), None, type="blackhole", metric=BLACKHOLE_METRIC, protocol=ROUTE_PROTOCOL)

    def _admit(self, lease_key: str, lease: Lease, update: Update) -> None:
        """Give a lease its records. What lingers in its way goes at once."""
        self._stop_waiting(lease_key)
        if self._is_ours(lease_key, lease) or not self.standing.backend.accepts(lease):
            self._withdraw(lease_key, update)
            return
        try:
            self._check(lease)
            new, reason = self._ask(lease)
            self._check_collisions(lease, new, update)
        except PeerRefused as refusal:
            new, reason = {}, str(refusal)
        if reason and not new:
            self._withdraw(lease_key, update)
            self.refused[lease_key] = reason
            return
        old = self._peers.get(lease_key)
        if old is None:
            update.records.update(new)
        else:
            update.records.update(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
            for key in old.keys() - new.keys():
                del self._records[key], self._owner[key]
        self._records.update(new)
        self._owner.update(dict.fromkeys(new, lease_key))
        self._peers[lease_key] = new
        if reason:
            self.refused[lease_key] = reason
        else:
            self.refused.pop(lease_key, None)
        update.leases.add(lease_key)

    def _ask(self, lease: Lease) -> tuple[dict[Key, Record], str]:
        """The backend's records, and why one family has none ("": all have theirs)."""
        try:
            return {r.key: r for r in self.standing.backend.peer_state(self.standing.host, lease)}, ""
        except PeerRefused as refusal:
            return {r.key: r for r in refusal.records}, str(refusal)

    def _withdraw(self, lease_key: str, update: Update) -> None:
        self.refused.pop(lease_key, None)
        self._lingering.pop(lease_key, None)
        records = self._peers.pop(lease_key, {})
        for key in records:
            del self._records[key], self._owner[key]
        update.leases.add(lease_key)
        update.records.update(records)

    def _stop_waiting(self, lease_key: str) -> None:
        record = self._waits_for.pop(lease_key, None)
        if record is not None and (others := self._waiting.get(record)) is not None:
            others.discard(lease_key)
            if not others:
                del self._waiting[record]

    def _is_ours(self, lease_key: str, lease: Lease) -> bool:
        """Our lease, or what is left of it for a moment when it has moved to another key (a family turned on or off)."""
        if lease_key == self._own_key:
            return True
        own = self.standing.lease
        same_node = own.attrs.node is not None and lease.attrs.node == own.attrs.node
        return same_node and any(lease.subnet_of(f) == s for f, _, s in self._ranges if s is not None)

    def _check(self, lease: Lease) -> None:
        """Refuse a subnet outside the network, one that overlaps our own, or one that would cut hosts off."""
        for family, network, own in self._ranges:
            subnet = lease.subnet_of(family)
            if subnet is None:
                continue
            if subnet.prefixlen < network.prefixlen or not _overlap(subnet, network):
                raise PeerRefused(f"lease {lease.cidr} lies outside the network {network}")
            if own is not None and _overlap(subnet, own):
                raise PeerRefused(f"lease {lease.cidr} of {_owner_name(lease)} overlaps this node's own subnet {own}")
            self._check_underlay(lease, family, subnet)

    def _check_underlay(self, lease: Lease, family: Family, subnet: IPNetwork) -> None:
        """A route to a subnet that holds the hosts themselves would send the tunnel into itself."""
        underlay = self.standing.host.underlay
        for prefix in underlay.prefixes:
            if prefix.version == family and subnet.prefixlen <= prefix.prefixlen and _overlap(subnet, prefix):
                raise PeerRefused(f"lease {lease.cidr} covers {prefix}, the network of this host's {underlay.name}")
        addresses = {
            "this host's own address": underlay.local.get(family),
            "this host's public address": underlay.public.get(family),
            "its owner's public address": lease.attrs.public_ip_of(family),
        }
        for whose, address in addresses.items():
            if address is not None and address in subnet:
                raise PeerRefused(f"lease {lease.cidr} covers {address}, {whose}")

    def _check_collisions(self, lease: Lease, records: Mapping[Key, Record], update: Update) -> None:
        for key in records:
            if key not in self._records:
                continue
            holder = self._owner.get(key)
            if holder is None:
                raise PeerRefused(f"lease {lease.cidr} wants {_name(key)}, which belongs to this node")
            if holder in self._lingering:
                self._withdraw(holder, update)
            elif holder != lease.key:
                self._waiting.setdefault(key, set()).add(lease.key)
                self._waits_for[lease.key] = key
                other = self._leases[holder].cidr
                raise PeerRefused(f"lease {lease.cidr} wants {_name(key)}, which belongs to lease {other}")


def _name(key: Key) -> str:
    """What there can be only one of: "fdb flannel.1 02:00:00:00:05:05"."""
    kind, *names = key
    assert isinstance(kind, Kind)
    return " ".join((kind.name.lower(), *(str(name) for name in names if name is not None)))


def _overlap(a: IPNetwork, b: IPNetwork) -> bool:
    """Whether two networks of one family overlap; ``ipaddress`` takes ten times as long, once for each peer."""
    host_bits = a.max_prefixlen - min(a.prefixlen, b.prefixlen)
    return (int(a.network_address) ^ int(b.network_address)) >> host_bits == 0


def _owner_name(lease: Lease) -> str:
    name = lease.attrs.node.name if lease.attrs.node else ""
    return f"node {name}" if name else f"the node at {lease.attrs.public_ip or lease.attrs.public_ipv6}"
