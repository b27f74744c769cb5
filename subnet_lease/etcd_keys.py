"""The keys below ``<prefix>/subnets/``: read in one call, written only by compare-and-swap on the revision that was read."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from typing import Any

from subnet_lease import allocation
from subnet_lease.etcd_connection import EtcdConnection, EtcdLeaseGone
from subnet_lease.etcd_table import LeaseReader, decode_any, unreadable_lease
from subnet_lease.lease import Lease, LeaseAttrs, subnet_key
from subnet_lease.lease_wire import encode_attrs


class LeaseKeys:
    """Leases as etcd's keys. Every method may raise a StoreError."""

    def __init__(self, connection: EtcdConnection, prefix: str, reader: LeaseReader) -> None:
        self._connection = connection
        self._subnets = f"{prefix}/subnets/"
        self._reader = reader

    def all(self) -> list[Lease]:
        """All leases in one range read. One with an unreadable value still takes its subnet; the watch tells of it."""
        answer = self._connection.call("read the leases", lambda client: client.get_prefix_response(self._subnets))
        leases = []
        with self._reader.turn:
            for kv in answer.kvs:
                name = kv.key.decode("utf-8", "replace").removeprefix(self._subnets)
                try:
                    leases.append(self._reader.read(name, kv)[1])
                except ValueError:
                    with suppress(ValueError):
                        leases.append(unreadable_lease(name, kv.mod_revision, kv.lease))
        return leases

    def read(self, name: str) -> Lease | None:
        answer = self._connection.call("read the lease", lambda client: client.get_response(self._subnets + name))
        for kv in answer.kvs:
            return self._decode(kv.key, kv.value, kv.mod_revision, kv.lease)
        return None

    def create(
        self,
        subnets: allocation.Subnets,
        attrs: LeaseAttrs,
        lease_id: int,
        *,
        alone: bool,
        instead_of: Lease | None = None,
    ) -> Lease | None:
        """Create the key if nobody has; None if somebody was faster. Without an etcd lease (0) it is a reservation.

        ``alone``: no other key can overlap this one. Else older leases are looked at, and the youngest gives way.
        ``instead_of`` is our own lease, which goes in the same transaction, and comes back if this one gives way.
        """
        name = subnet_key(*subnets)
        key, value = self._subnets + name, encode_attrs(attrs)

        def create(client: Any) -> Any:
            t = client.transactions
            look = t.get(key) if alone else t.get(self._subnets, _end(self._subnets))
            compare, success = [t.version(key) == 0], [t.put(key, value, lease_id or None), look]
            if instead_of is not None:
                compare.append(t.mod(self._subnets + instead_of.key) == instead_of.revision)
                success.insert(0, t.delete(self._subnets + instead_of.key))
            return client.transaction(compare=compare, success=success, failure=[look])

        _, answers = self._connection.call("create a lease", create)
        made: dict[str, int] = {}
        created: Lease | None = None
        others: list[Lease] = []
        for data, meta in answers[-1]:
            lease = self._decode(meta.key, data, meta.mod_revision, meta.lease_id)
            if lease is None:
                continue
            made[lease.key] = meta.create_revision
            if lease.key != name:
                others.append(lease)
            elif data == value.encode() and meta.lease_id == lease_id:
                # Also when the comparison failed: the first try may have been carried out and only its answer got lost.
                created = lease
        if created is None:
            return None
        older = [lease for lease in others if made[lease.key] < made[name]]
        if allocation.overlapping(older, subnets):
            self._give_way(created, instead_of)
            return None
        return replace(created, attrs=attrs)

    def _give_way(self, created: Lease, instead_of: Lease | None) -> None:
        """Delete what was just created, and put back what it replaced."""
        key = self._subnets + created.key

        def undo(client: Any) -> Any:
            t = client.transactions
            success = [t.delete(key)]
            if instead_of is not None:
                before = encode_attrs(instead_of.attrs)
                success.append(t.put(self._subnets + instead_of.key, before, instead_of.store_ref or None))
            return client.transaction(compare=[t.mod(key) == created.revision], success=success, failure=[])

        self._connection.call("give way to an older lease", undo)

    def rewrite(self, lease: Lease, attrs: LeaseAttrs) -> Lease | None:
        """Write new attributes if the key is still the revision that we read; None if it is not."""
        key, value = self._subnets + lease.key, encode_attrs(attrs)

        def put(client: Any) -> Any:
            t = client.transactions
            return client.transaction(
                compare=[t.mod(key) == lease.revision, t.version(key) > 0],
                success=[t.put(key, value, lease.store_ref or None), t.get(key)],
                failure=[t.get(key)],
            )

        try:
            _, answers = self._connection.call("rewrite the lease", put)
        except EtcdLeaseGone:
            return None
        for data, meta in answers[-1]:
            # Also when the comparison failed: the first try may have been carried out and only its answer got lost.
            if data == value.encode() and meta.lease_id == lease.store_ref:
                return replace(lease, attrs=attrs, revision=meta.mod_revision)
        return None

    def delete(self, lease: Lease) -> bool:
        """Delete the key if it is still the revision that we read; whoever changed it meanwhile keeps it."""
        key = self._subnets + lease.key

        def delete(client: Any) -> Any:
            t = client.transactions
            return client.transaction(
                compare=[t.mod(key) == lease.revision, t.version(key) > 0], success=[t.delete(key)], failure=[]
            )

        return bool(self._connection.call("delete the lease", delete)[0])

    def _decode(self, key: bytes, value: bytes, revision: int, lease_id: int) -> Lease | None:
        """A lease, readable or not; None for a key that names no subnet."""
        return decode_any(key.decode("utf-8", "replace").removeprefix(self._subnets), value, revision, lease_id)


def _end(prefix: str) -> str:
    return prefix[:-1] + chr(ord(prefix[-1]) + 1)
