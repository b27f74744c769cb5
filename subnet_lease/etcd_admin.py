"""What an operator asks of etcd: read and write the configuration, list leases with their age, reserve, release.

Every write is a compare-and-swap on what was read; a daemon never meets a half-done change. Daemons use
``subnet_lease.etcd``; the two share keys, values and errors.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from subnet_lease.etcd_connection import EtcdConnection, clean_prefix
from subnet_lease.etcd_leases import SignOfLife
from subnet_lease.etcd_table import decode_any, shell_word
from subnet_lease.etcd_watch import SnapshotWatch
from subnet_lease.lease import Lease, LeaseSnapshot
from subnet_lease.lease_wire import encode_attrs, parse_subnet_key
from subnet_lease.store import ConfigMissing, StoreError, StoreStatus, write_config


class ChangedMeanwhile(StoreError):
    """Somebody else wrote between our read and our write."""

    cause = "changed_meanwhile"


@dataclass(frozen=True, slots=True)
class Stray:
    """A key among the leases that names no subnet: nobody reads it, and nobody removes it. ``remove`` is for a shell."""

    key: str
    error: str
    remove: str


class EtcdAdmin:
    """One operator's connection. Close it, or use it as a context manager."""

    allocates = True
    """Subnets are handed out from the configuration."""

    def __init__(self, connection: EtcdConnection, prefix: str) -> None:
        self._connection = connection
        self._prefix = clean_prefix(prefix)
        self._watch: SnapshotWatch | None = None

    @property
    def config_name(self) -> str:
        """Where the configuration is, for messages."""
        return f"{self._prefix}/config"

    @property
    def leases_name(self) -> str:
        """Where the leases are, for messages."""
        return f"{self._prefix}/subnets/"

    def config_text(self) -> tuple[str, int]:
        """The stored configuration as it is, and its revision. ConfigMissing if there is none."""
        value, meta = self._connection.call("read the configuration", lambda client: client.get(self.config_name))
        if value is None:
            raise ConfigMissing(
                f"no network configuration at {self.config_name} (asked {self._connection.names}); "
                f"write one: {write_config(self._prefix)}"
            )
        return value.decode("utf-8", "replace"), int(meta.mod_revision)

    def write_config(self, text: str, revision: int) -> None:
        """Store a configuration if the stored one is still at ``revision`` (0: there is none). ChangedMeanwhile."""
        self._swap("write the configuration", self.config_name, revision, text)

    def leases(self) -> list[Lease]:
        """Every lease, also those whose values nobody can read."""
        return self.leases_and_strays()[0]

    def leases_and_strays(self) -> tuple[list[Lease], list[Stray]]:
        """Everything below ``leases_name``, in one range read."""
        answer = self._connection.call("read the leases", lambda client: client.get_prefix_response(self.leases_name))
        leases: list[Lease] = []
        strays: list[Stray] = []
        for kv in answer.kvs:
            key = kv.key[len(self.leases_name) :].decode("utf-8", "replace")
            lease = decode_any(key, kv.value, kv.mod_revision, kv.lease)
            if lease is not None:
                leases.append(lease)
            else:  # daemons ignore it and count it
                strays.append(Stray(kv.key.decode("utf-8", "replace"), _why(key), f"etcdctl del {shell_word(kv.key)}"))
        return leases, strays

    def ttl(self, lease: Lease) -> float | None:
        """Seconds until a lease expires unless its node renews it; None for a reservation."""
        if not lease.store_ref:
            return None
        info = self._connection.call("read a lease's age", lambda client: client.get_lease_info(lease.store_ref))
        return max(float(info.TTL), 0.0)

    def lives(self, lease: Lease) -> bool:
        """Whether the owner of a lease gives a sign of life; a plain flanneld never does. AccessDenied."""
        return SignOfLife(self._connection, self._prefix, "").ask(lease.key) is not None

    def watch(self) -> Iterator[LeaseSnapshot]:
        """All leases whenever they change, until ``close``; outlasts every failure, and needs no configuration."""
        self._watch = SnapshotWatch(self._connection, self._prefix, StoreStatus(), frozenset, bare=True)
        return self._watch.snapshots()

    def reserve(self, lease: Lease) -> None:
        """Write a lease that never expires, over the revision that was read (0: nobody has it). ChangedMeanwhile."""
        self._swap("write the reservation", f"{self.leases_name}{lease.key}", lease.revision, encode_attrs(lease.attrs))

    def remove(self, lease: Lease) -> None:
        """Delete a lease if it is still as it was read. ChangedMeanwhile."""
        self._swap("delete the lease", f"{self.leases_name}{lease.key}", lease.revision, None)

    def _swap(self, what: str, key: str, revision: int, text: str | None) -> None:
        def attempt(client: Any) -> bool:
            known = client.transactions
            step = known.delete(key) if text is None else known.put(key, text)
            done, _ = client.transaction(compare=[known.mod(key) == revision], success=[step], failure=[])
            return bool(done)

        if not self._connection.call(what, attempt):
            raise ChangedMeanwhile(f"{key} was changed by somebody else meanwhile; look at it and try again")

    def close(self) -> None:
        if self._watch is not None:
            self._watch.close()
        self._connection.close()

    def __enter__(self) -> EtcdAdmin:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _why(key: str) -> str:
    """What is wrong with a key that names no subnet."""
    try:
        parse_subnet_key(key)
    except ValueError as error:
        return str(error).partition(": ")[2]
    return "names no subnet"
