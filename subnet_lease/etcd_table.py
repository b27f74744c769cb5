"""From key-value pairs to complete snapshots: the fold, without I/O.

A bad key or value withdraws nothing: the last good one stays, one counter rises, one line is logged.
"""

from __future__ import annotations

import shlex
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from itertools import takewhile
from typing import Any, Final

import structlog

from subnet_lease import allocation
from subnet_lease.lease import Lease, LeaseAttrs, LeaseSnapshot
from subnet_lease.lease_wire import decode_attrs, parse_subnet_key
from subnet_lease.network_config import NetworkConfig, parse_network_config, validate_for_allocation
from subnet_lease.persistent_map import PersistentMap
from subnet_lease.store import ConfigMissing, StoreError, StoreStatus, unused, write_config

log = structlog.get_logger(__name__)

GRACE: Final = 60.0
"""Seconds for which the leases of a wiped or restored etcd are kept while their owners claim them again."""
PUT: Final = 0  # etcd's Event.EventType: PUT, DELETE

Mark = tuple[int, int, int]
"""Revision, etcd lease and hash of a value: what tells two versions of a key apart."""


def decode_lease(key: str, value: bytes, revision: int, lease_id: int) -> Lease:
    """A lease from its key (without prefix) and value. ValueError says what is wrong."""
    v4, v6 = parse_subnet_key(key)
    attrs = decode_attrs(value.decode("utf-8", "replace"))
    return Lease(v4, v6, attrs, revision=revision, reservation=lease_id == 0, store_ref=lease_id)


def unreadable_lease(key: str, revision: int, lease_id: int) -> Lease:
    """What is known of a key whose value cannot be read. ValueError if the key names no subnet either."""
    return Lease(*parse_subnet_key(key), LeaseAttrs(), revision=revision, store_ref=lease_id, unreadable=True)


def decode_any(key: str, value: bytes, revision: int, lease_id: int) -> Lease | None:
    """A lease, readable or not; None for a key that names no subnet."""
    try:
        return decode_lease(key, value, revision, lease_id)
    except ValueError:
        with suppress(ValueError):
            return unreadable_lease(key, revision, lease_id)
    return None


def shell_word(key: bytes) -> str:
    """A key as a word for the shell; for bash, if it is no plain text."""
    text = key.decode("utf-8", "replace")
    if text.isprintable() and text.encode() == key:
        return shlex.quote(text)
    return (
        "$'" + "".join(chr(b) if (chr(b).isalnum() and b < 128) or b in b"/.-_:&" else f"\\x{b:02x}" for b in key) + "'"
    )


class LeaseReader:
    """Decodes leases and remembers them: a start reads the same list three times, and decoding is what costs."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[Mark, Lease]] = {}
        self.turn = threading.Lock()
        """Held while a whole list is read: at a start two threads have the same one, and the second finds it done."""

    def read(self, key: str, kv: Any) -> tuple[Mark, Lease]:
        """The mark and the lease of a key-value pair; ValueError says what is wrong with it."""
        known = self._known.get(key)
        mark = (kv.mod_revision, kv.lease, hash(kv.value))
        if known is not None and known[0] == mark:
            return known
        known = mark, decode_lease(key, kv.value, kv.mod_revision, kv.lease)
        self._known[key] = known
        return known

    def forget(self, key: str) -> None:
        self._known.pop(key, None)


class SnapshotTable:
    """The leases and the configuration as last read. Knows nothing of connections."""

    def __init__(
        self,
        prefix: str,
        status: StoreStatus,
        held: Callable[[], frozenset[str]],
        reader: LeaseReader,
        *,
        bare: bool = False,
    ) -> None:
        """``bare``: for one who only looks. Leases as they are, also without a configuration, none kept after its end."""
        self._reader = reader
        self._bare = bare
        self._config_key = f"{prefix}/config".encode()
        self._subnets = f"{prefix}/subnets/".encode()
        self._status = status
        self._held = held
        self._bad: dict[str, int] = {}
        self._marks: dict[str, Mark] = {}
        self._lingering: dict[str, float] = {}
        """Keys that are kept for a while, and the time.monotonic() at which each goes, the first one first."""
        self._config_text: bytes | None = None
        self.leases: dict[str, Lease] = {}
        self._changes: dict[str, Lease | None] = {}
        """Of ``leases``, since the last snapshot; None for what is gone."""
        self._told: PersistentMap[str, Lease] = PersistentMap()
        self.config: NetworkConfig | None = None
        self.revision = 0
        """Up to which the leases are known; ``config_revision``: the configuration. Two watches are two streams of
        events, and neither tells how far the other one is."""
        self.config_revision = 0

    def snapshot(self) -> LeaseSnapshot | None:
        """The state now, None while there has never been a usable configuration."""
        if self.config is None and not self._bare:
            return None
        self._told = self._told.with_changes(self._changes)
        self._changes.clear()
        return LeaseSnapshot(self.config or NetworkConfig(), self._told, self.revision)

    def witness(self) -> tuple[bytes, Mark] | None:
        """The youngest lease known: if etcd still has it just so, it is the etcd that we knew."""
        if not self._marks:
            return None
        key, mark = max(self._marks.items(), key=lambda item: item[1][0])
        return self._subnets + key.encode(), mark

    def replace(self, kvs: Iterable[Any], revision: int, other_history: bool = False) -> bool:
        """Take a complete list; true if a reader would see a difference.

        ``other_history``: this is not the etcd that we followed, but an empty or restored one in its place.
        """
        wiped = other_history or revision < self.revision
        if wiped:
            self._marks.clear()  # revisions of another history say nothing
        changed = False
        seen: set[str] = set()
        config: bytes | None = None
        with self._reader.turn:
            for kv in kvs:
                if kv.key == self._config_key:
                    config = kv.value
                elif kv.key.startswith(self._subnets):
                    seen.add(kv.key[len(self._subnets) :].decode("utf-8", "replace"))
                    changed |= self._put(kv)
        wiped |= config is None and self._config_text is not None
        changed |= self._set_config(config)
        gone = [key for key in self.leases if key not in seen and key not in self._lingering]
        if wiped:
            self._linger(gone)
            changed |= self._drop(key for key in gone if key not in self._lingering)
        else:
            changed |= self._drop(gone)
        self.revision = self.config_revision = revision
        return changed

    def apply(self, events: Iterable[Any], wiped: bool = False) -> bool:
        """Fold watch events in; true if a reader would see a difference. ``wiped``: leases went with everything else."""
        changed = False
        gone: dict[str, None] = {}
        for event in events:
            kv = event.kv
            if kv.key.startswith(self._subnets):
                self.revision = max(self.revision, kv.mod_revision)
                key = kv.key[len(self._subnets) :].decode("utf-8", "replace")
                if event.type == PUT:
                    changed |= self._put(kv)
                    gone.pop(key, None)
                else:
                    gone[key] = None
            elif kv.key == self._config_key:
                self.config_revision = max(self.config_revision, kv.mod_revision)
                changed |= self._set_config(kv.value if event.type == PUT else None)
        if wiped or self._config_text is None:
            self._linger([key for key in gone if key in self.leases])
        return self._drop(key for key in gone if key not in self._lingering) or changed

    def expire(self) -> bool:
        """Drop what lingers beyond its time; true if a reader would see a difference."""
        if not self._lingering:
            return False
        now = time.monotonic()
        late = list(takewhile(lambda key: self._lingering[key] <= now, self._lingering))
        if late:
            log.warning(
                "leases that nobody claimed again after etcd was wiped are gone",
                leases=sorted(self.leases[key].cidr for key in late),
            )
        return self._drop(late)

    @property
    def next_expiry(self) -> float | None:
        """time.monotonic() at which ``expire`` has something to do."""
        return next(iter(self._lingering.values()), None)

    def _put(self, kv: Any) -> bool:
        key = kv.key[len(self._subnets) :].decode("utf-8", "replace")
        try:
            mark, lease = self._reader.read(key, kv)
        except ValueError as error:
            value_hash = hash(kv.value)
            if self._bad.get(key) != value_hash:
                self._bad[key] = value_hash
                self._status.count("bad_key")
                known = "its last good value stays in use" if key in self.leases else "it is ignored"
                remedy = f"etcdctl del {shell_word(kv.key)}"
                log.warning(f"unreadable lease in etcd; {known}", key=key, error=str(error), to_remove_it=remedy)
            return False
        if self._marks.get(key) == mark:
            return False
        self._bad.pop(key, None)
        self._marks[key] = mark
        claimed_again = self._lingering.pop(key, None) is not None
        self.leases[key] = self._changes[key] = lease
        if self._lingering and not claimed_again:  # else there is no other: leases of one store do not overlap
            rivals = allocation.overlapping(
                [self.leases[other] for other in self._lingering], (lease.subnet, lease.ipv6_subnet)
            )
            self._drop([rival.key for rival in rivals])
        return True

    def _drop(self, keys: Iterable[str]) -> bool:
        changed = False
        for key in keys:
            self._bad.pop(key, None)
            self._marks.pop(key, None)
            self._lingering.pop(key, None)
            self._reader.forget(key)
            if self.leases.pop(key, None) is not None:
                self._changes[key] = None
                changed = True
        return changed

    def _linger(self, keys: Iterable[str]) -> None:
        """Keep leases that vanished with the whole store, ours excepted: their owners will claim them again."""
        if self._bare:
            return
        held = self._held()
        kept = [key for key in keys if key not in held]
        until = time.monotonic() + GRACE
        for key in kept:
            self._marks.pop(key, None)
            self._lingering.pop(key, None)  # the last one goes last
            self._lingering[key] = until
        if kept:
            log.warning("etcd was wiped or restored; these peers stay for now", peers=len(kept), seconds=GRACE)

    def _set_config(self, text: bytes | None) -> bool:
        """Take the stored configuration if it can be used, else say why not; true if a reader would see another one."""
        if text == self._config_text:
            return False
        self._config_text = text
        key = self._config_key.decode()
        try:
            if text is None:
                raise ConfigMissing(f"{key} is gone; write it again: {write_config(key.removesuffix('/config'))}")
            config = validate_for_allocation(parse_network_config(text.decode("utf-8", "replace")))
        except StoreError as error:
            self._status.count(error.cause)
            if self.config is not None:  # else there is nobody to serve yet, and who asked for it is told
                self._status.config_error = unused(f"{key}: {error}" if text is not None else str(error))
            return False
        self._status.config_error = None
        changed = config != self.config
        self.config = config
        return changed
