"""The lease store in etcd, with flannel's keys (spec: pkg/subnet/etcd): the LeaseStore protocol's verbs.

    <prefix>/config               the network configuration
    <prefix>/subnets/10.5.52.0-24 one lease: flannel's JSON, attached to an etcd lease of 24 h; without one, a reservation
    <prefix>/up/10.5.52.0-24      ours: "the owner of that lease is running", attached to an etcd lease of 30 s

The last tells a node that is off from one that is alive with a mark or an address of ours (docs/adr/0003). It lies
outside ``subnets/``, so that no flanneld is woken by it.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Final

import structlog

from subnet_lease import allocation
from subnet_lease.etcd_connection import EtcdConnection, clean_prefix
from subnet_lease.etcd_keys import LeaseKeys
from subnet_lease.etcd_leases import LEASE_TTL, Grant, SignOfLife, keep_alive, revoke
from subnet_lease.etcd_table import LeaseReader
from subnet_lease.etcd_watch import SnapshotWatch
from subnet_lease.lease import Lease, LeaseAttrs, LeaseSnapshot, NodeHints, subnet_key
from subnet_lease.lease_wire import encode_attrs
from subnet_lease.network_config import NetworkConfig, parse_network_config, validate_for_allocation
from subnet_lease.store import (
    ConfigInvalid,
    ConfigMissing,
    LeaseLost,
    LeaseRequest,
    OutOfSubnets,
    SetupError,
    StoreError,
    StoreStatus,
    StoreUnavailable,
    write_config,
)

log = structlog.get_logger(__name__)

UP_INTERVAL: Final = 10.0
"""Seconds between two signs of life."""
RENEW_AT_LEAST: Final = 3600.0
"""Seconds between two renewals at most, whatever the margin: after an hour without etcd, 22 hours are left."""
RACE_TIME: Final = 60.0
"""Seconds for which ``acquire`` fights for a subnet before it reports that it lost every race."""


def boot_id() -> str:
    """What tells two machines with the same marks apart: the kernel's id of this boot."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


class EtcdStore:
    """LeaseStore over etcd v3. The verbs may be called from several threads; ``watch`` belongs to one."""

    def __init__(
        self,
        endpoints: Sequence[str],
        prefix: str = "/coreos.com/network",
        *,
        keyfile: str = "",
        certfile: str = "",
        cafile: str = "",
        username: str = "",
        password: str = "",
        renew_margin_minutes: int = 60,
        instance: str | None = None,
    ) -> None:
        """``instance`` tells this machine from a clone of it; by default the kernel's boot id."""
        if not 1 <= renew_margin_minutes <= 1439:
            raise SetupError(f"--subnet-lease-renew-margin {renew_margin_minutes}: must be 1 to 1439 minutes")
        self._prefix = clean_prefix(prefix)
        self._connection = EtcdConnection(
            endpoints,
            keyfile=keyfile,
            certfile=certfile,
            cafile=cafile,
            username=username,
            password=password,
            scope=self._prefix,
        )
        self._renew_every = min(LEASE_TTL - renew_margin_minutes * 60.0, RENEW_AT_LEAST)
        self._instance = boot_id() if instance is None else instance
        self._status = StoreStatus()
        self._held: frozenset[str] = frozenset()
        reader = LeaseReader()
        self._keys = LeaseKeys(self._connection, self._prefix, reader)
        self._watch = SnapshotWatch(self._connection, self._prefix, self._status, lambda: self._held, reader)
        self._renewed: dict[int, float] = {}  # etcd lease id -> time.monotonic() of its last renewal
        self._up = SignOfLife(self._connection, self._prefix, self._instance)
        self._random = random.Random()
        self._closed = threading.Event()

    @property
    def status(self) -> StoreStatus:
        return self._status

    def read_config(self) -> NetworkConfig:
        key = f"{self._prefix}/config"
        answer = self._connection.call("read the network configuration", lambda client: client.get_response(key))
        if not answer.kvs:
            raise ConfigMissing(f"no network configuration at {key}; write one: {write_config(self._prefix)}")
        try:
            return validate_for_allocation(parse_network_config(answer.kvs[0].value.decode("utf-8", "replace")))
        except ConfigInvalid as error:
            raise ConfigInvalid(f"{error}; correct it at {key} (flannelctl config set)") from None

    def hints(self) -> NodeHints:
        return NodeHints()

    def report(self, ready: bool, reasons: tuple[str, ...]) -> None:
        """etcd holds nothing of the kind."""

    def find_own(self, request: LeaseRequest) -> Lease | None:
        leases = self._keys.all()
        return allocation.find_own(leases, request, self._liveness(request)).lease

    def acquire(self, config: NetworkConfig, request: LeaseRequest) -> Lease:
        attrs = replace(request.attrs, node=request.identity)
        deadline = time.monotonic() + RACE_TIME
        pause = 0.02
        grant = Grant(self._connection)
        try:
            while True:
                lease = self._try_acquire(config, request, attrs, grant)
                if lease is not None:
                    break
                if time.monotonic() > deadline or self._closed.is_set():
                    raise StoreUnavailable(f"lost every race for a subnet under {self._prefix} for {RACE_TIME:g} s")
                time.sleep(pause * self._random.uniform(0.2, 1.0))
                pause = min(pause * 2, 0.5)
        finally:
            grant.drop_unused()
        self._held = frozenset({lease.key})
        if not lease.reservation:
            self._renewed[lease.store_ref] = time.monotonic()
        self._up.hold(lease.key, request.identity.name)
        return lease

    def renew(self, lease: Lease) -> float:
        current = self._keys.read(lease.key)
        if current is not None and current.unreadable and not self._lives_elsewhere(lease.key):
            current = self._overwrite(current, lease.attrs, lease.store_ref) or self._keys.read(lease.key)
        if current is None or not _same_owner(current, lease):
            raise self._lost(lease, current)
        if current.store_ref != lease.store_ref:
            if current.attrs != lease.attrs:
                raise self._lost(lease, current)
            lease = current  # an operator made it a reservation, or an ordinary lease again
        if not lease.reservation:
            due = self._renewed.get(lease.store_ref, float("-inf")) + self._renew_every
            if time.monotonic() >= due:
                if self._keep_alive(lease.store_ref) <= 0:
                    raise self._lost(lease, None)
                self._renewed[lease.store_ref] = time.monotonic()
        self._up.hold(lease.key, lease.attrs.node.name if lease.attrs.node else "")
        return min(UP_INTERVAL * self._random.uniform(0.9, 1.0), self._renew_every)

    def publish(self, lease: Lease, attrs: LeaseAttrs) -> Lease:
        attrs = replace(attrs, node=attrs.node or lease.attrs.node)
        if encode_attrs(attrs) == encode_attrs(lease.attrs):
            return lease  # nothing that a peer could see
        if attrs.node is not None and not allocation.same_address(attrs, lease.attrs):
            request = LeaseRequest(attrs.node, attrs)
            rival = allocation.find_own(self._keys.all(), request, self._liveness(request)).rival
            if rival is not None and rival.key != lease.key:
                raise allocation.address_in_use(rival, request)
        published = self._keys.rewrite(lease, attrs)
        if published is None:
            raise self._lost(lease, self._keys.read(lease.key))
        return published

    def release(self, lease: Lease) -> None:
        current = None if self._keys.delete(lease) else self._keys.read(lease.key)
        if current is not None:
            raise self._lost(lease, current)
        if lease.key in self._held:
            self._held -= {lease.key}
            self._up.drop()
        if lease.store_ref and self._renewed.pop(lease.store_ref, None) is not None:
            self._connection.call("release the lease", lambda client: revoke(client, lease.store_ref))

    def watch(self) -> Iterator[LeaseSnapshot]:
        return self._watch.snapshots()

    def reconnect(self) -> None:
        try:
            self._connection.reconnect()
        except SetupError as error:
            log.error(f"{error}; what was read before stays in use")

    def close(self) -> None:
        if self._closed.is_set():
            return
        self._closed.set()
        self._connection.hurry()
        try:
            self._up.drop()
        except StoreError as error:
            log.debug("the sign of life stays until it expires", error=str(error))
        self._watch.close()
        self._connection.close()

    # -- acquire, step by step -----------------------------------------------------------------------------------

    def _try_acquire(
        self, config: NetworkConfig, request: LeaseRequest, attrs: LeaseAttrs, grant: Grant
    ) -> Lease | None:
        """One round on a fresh list; None when somebody else was faster."""
        leases = self._keys.all()
        found = allocation.find_own(leases, request, self._liveness(request))
        if found.rival is not None:
            raise allocation.address_in_use(found.rival, request)
        own = found.lease
        if own is not None and allocation.suits(config, request, own):
            return self._take_back(own, attrs)
        spoilt = self._spoilt(leases, request)
        if spoilt is not None:
            mended = self._overwrite(spoilt, attrs, grant.id)
            grant.used = mended is not None
            return mended
        others = [lease for lease in leases if lease is not own]
        try:
            subnets = allocation.choose(config, others, request, self._random.randrange, own)
        except OutOfSubnets as error:
            raise OutOfSubnets(f"{error}{self._silent(others)}") from None
        # Ours, but of another shape: it makes room for the new one, in one step. A reservation stays one.
        changed = own is not None and own.key != subnet_key(*subnets) and allocation.overlapping([own], subnets)
        shape = own if changed else None
        permanent = shape is not None and shape.reservation
        alone = allocation.key_tells_all(config, leases)
        created = self._keys.create(subnets, attrs, 0 if permanent else grant.id, alone=alone, instead_of=shape)
        grant.used = created is not None and not permanent
        if created is None or own is None or shape is not None:
            return created
        if not own.reservation:
            if not request.keep:
                log.warning(
                    "this node's lease lay outside the network; it has another one now", old=own.cidr, new=created.cidr
                )
            self._keys.delete(own)
        elif not request.keep:
            log.warning(
                "the subnet reserved for this node lies outside the network; it has another one. Correct the network"
                " (flannelctl config set) or the reservation (flannelctl release, then reserve)",
                reserved=own.cidr,
                leased=created.cidr,
            )
        return created

    def _spoilt(self, leases: Sequence[Lease], request: LeaseRequest) -> Lease | None:
        """The key of the subnet that we hold and must keep, if somebody wrote into it what nobody can read."""
        for lease in leases:
            if request.keep and lease.unreadable and (lease.subnet, lease.ipv6_subnet) == request.previous:
                return None if self._lives_elsewhere(lease.key) else lease
        return None

    def _overwrite(self, spoilt: Lease, attrs: LeaseAttrs, lease_id: int) -> Lease | None:
        """Put our lease back over an unreadable value, if the key is still the revision that we read."""
        ours = replace(spoilt, store_ref=lease_id, reservation=lease_id == 0, unreadable=False)
        mended = self._keys.rewrite(ours, attrs)
        if mended is not None:
            log.warning(
                "somebody wrote into this node's lease what nobody can read; it is written again", key=mended.key
            )
        return mended

    def _lives_elsewhere(self, name: str) -> bool:
        """Whether the owner of this key says that it runs, and is not us."""
        return self._up.read(name) not in (None, self._instance)

    def _take_back(self, own: Lease, attrs: LeaseAttrs) -> Lease | None:
        """Go on with our own lease: no write at all when nothing changed."""
        if not own.reservation and self._keep_alive(own.store_ref) <= 0:
            return None  # it has just expired; the key is gone with it
        if encode_attrs(own.attrs) == encode_attrs(attrs):
            return own
        return self._keys.rewrite(own, attrs)

    # -- whose is whose ------------------------------------------------------------------------------------------

    def _silent(self, leases: Sequence[Lease]) -> str:
        """Whose leases could be reclaimed: owners that ought to give a sign of life, and give none."""
        with suppress(StoreError):
            signs = self._up.names()
            silent = [lease for lease in leases if lease.attrs.node and lease.key not in signs]
            if silent:
                some = ", ".join(
                    f"{lease.cidr} of {lease.attrs.node.name!r}" for lease in silent[:5] if lease.attrs.node
                )
                more = f" and {len(silent) - 5} more" if len(silent) > 5 else ""
                return f". Not alive now, so perhaps to be reclaimed: {some}{more}"
        return ""

    def _liveness(self, request: LeaseRequest) -> Callable[[Lease], bool]:
        """Answers by reading an owner's sign of life, for the few leases that the question arises for."""

        def alive(lease: Lease) -> bool:
            sign = self._up.read(lease.key)
            if sign is None:
                return False
            same = allocation.likeness(lease.attrs.node, request.identity) == "same"
            # A running node's lease may have been replaced by a reservation for it.
            ours = same or allocation.reserved_by_name(lease, request.identity)
            return not (ours and sign == self._instance)

        return alive

    def _keep_alive(self, lease_id: int) -> int:
        return keep_alive(self._connection, lease_id)

    def _lost(self, lease: Lease, current: Lease | None) -> LeaseLost:
        self._held -= {lease.key}
        self._renewed.pop(lease.store_ref, None)
        if current is None:
            return LeaseLost(f"lease {lease.cidr} of this node is gone from etcd")
        if current.unreadable:
            return LeaseLost(f"lease {lease.cidr} of this node holds a value that nobody can read")
        owner = current.attrs.node.name if current.attrs.node else str(current.attrs.public_ip)
        if _same_owner(current, lease):
            return LeaseLost(f"lease {lease.cidr} of this node was rewritten by another process")
        return LeaseLost(f"lease {lease.cidr} of this node now belongs to {owner!r}")


def _same_owner(current: Lease, ours: Lease) -> bool:
    if current.attrs.node is not None and ours.attrs.node is not None:
        return allocation.likeness(current.attrs.node, ours.attrs.node) in ("same", "alike")
    return allocation.same_address(current.attrs, ours.attrs)
