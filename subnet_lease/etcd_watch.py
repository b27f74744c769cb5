"""From etcd's list and watch to complete snapshots: one read, then events folded into a table.

``WatchStream`` is one watch on the wire; ``SnapshotTable`` is the fold, without I/O; ``SnapshotWatch`` runs both for as
long as the store lives. Nothing here raises into the daemon: a failure is counted, told once, and outlasted.
"""

from __future__ import annotations

import queue
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final

import grpc
import structlog
from etcd3 import etcdrpc

from subnet_lease import allocation
from subnet_lease.etcd_connection import EtcdConnection
from subnet_lease.lease import Lease, LeaseSnapshot
from subnet_lease.lease_wire import decode_attrs, parse_subnet_key
from subnet_lease.network_config import NetworkConfig, parse_network_config, validate_for_allocation
from subnet_lease.store import ConfigMissing, StoreError, StoreUnavailable

log = structlog.get_logger(__name__)

QUIET: Final = 4.0
"""Seconds without a message after which the watch is asked for a sign of life."""
SILENT: Final = 6.0
"""Seconds to wait for that sign before the stream is given up; with QUIET, a dead one is found within 10 s."""
BACKOFF: Final = (0.1, 5.0)
"""First and longest pause, in seconds, between attempts."""
STORM: Final = 0.005
"""Seconds for which changes are collected when one snapshot follows another at once; the first is never delayed."""
GRACE: Final = 60.0
"""Seconds for which the leases of a wiped or restored etcd are kept while their owners claim them again."""
_PUT: Final = 0  # etcd's Event.EventType: PUT, DELETE


Mark = tuple[int, int, int]
"""Revision, etcd lease and hash of a value: what tells two versions of a key apart."""


def decode_lease(key: str, value: bytes, revision: int, lease_id: int) -> Lease:
    """A lease from its key (without prefix) and value. ValueError says what is wrong."""
    v4, v6 = parse_subnet_key(key)
    attrs = decode_attrs(value.decode("utf-8", "replace"))
    return Lease(v4, v6, attrs, revision=revision, reservation=lease_id == 0, store_ref=lease_id)


class LeaseReader:
    """Decodes leases and remembers them: a start reads the same list three times, and decoding is what costs."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[Mark, Lease]] = {}

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


@dataclass
class EtcdStatus:
    """How the connection fares; written by the store's threads, read by anyone."""

    last_contact: float | None = None
    last_error: str | None = None
    counts: Counter[str] = field(default_factory=Counter)
    _cause: str = ""

    @property
    def errors(self) -> dict[str, int]:
        return dict(self.counts)

    def alive(self) -> None:
        """The watch has just been heard of."""
        self.last_contact = time.monotonic()
        if self.last_error is not None:
            self.last_error = None
            log.info("the watch on etcd works again")

    def failed(self, error: StoreError) -> None:
        """Count a failure of the watch; tell it once, until it is another one or heals."""
        self.counts[error.cause] += 1
        if self.last_error is None or error.cause != self._cause:
            log.warning("the watch on etcd fails; the last known leases stay in use", error=str(error))
        self.last_error, self._cause = str(error), error.cause


class SnapshotTable:
    """The leases and the configuration as last read. Knows nothing of connections."""

    def __init__(
        self, prefix: str, status: EtcdStatus, held: Callable[[], frozenset[str]], reader: LeaseReader
    ) -> None:
        self._reader = reader
        self._config_key = f"{prefix}/config".encode()
        self._subnets = f"{prefix}/subnets/".encode()
        self._status = status
        self._held = held
        self._bad: dict[str, int] = {}
        self._marks: dict[str, Mark] = {}
        self._lingering: dict[str, float] = {}  # key -> time.monotonic() at which it goes
        self._config_text: bytes | None = None
        self.leases: dict[str, Lease] = {}
        self.config: NetworkConfig | None = None
        self.revision = 0

    def snapshot(self) -> LeaseSnapshot | None:
        """The state now, None while there has never been a usable configuration."""
        if self.config is None:
            return None
        return LeaseSnapshot(self.config, MappingProxyType(self.leases.copy()), self.revision)

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
        self.revision = revision
        return changed

    def apply(self, events: Iterable[Any], wiped: bool = False) -> bool:
        """Fold watch events in; true if a reader would see a difference. ``wiped``: leases went with everything else."""
        changed = False
        gone: dict[str, None] = {}
        for event in events:
            kv = event.kv
            self.revision = max(self.revision, kv.mod_revision)
            if kv.key.startswith(self._subnets):
                key = kv.key[len(self._subnets) :].decode("utf-8", "replace")
                if event.type == _PUT:
                    changed |= self._put(kv)
                    gone.pop(key, None)
                else:
                    gone[key] = None
            elif kv.key == self._config_key:
                changed |= self._set_config(kv.value if event.type == _PUT else None)
        if wiped or self._config_text is None:
            self._linger([key for key in gone if key in self.leases])
        return self._drop(key for key in gone if key not in self._lingering) or changed

    def expire(self) -> bool:
        """Drop what lingers beyond its time; true if a reader would see a difference."""
        if not self._lingering:
            return False
        now = time.monotonic()
        late = [key for key, until in self._lingering.items() if until <= now]
        if late:
            log.warning("leases that nobody claimed again after etcd was wiped are gone", leases=sorted(late))
        return self._drop(late)

    @property
    def next_expiry(self) -> float | None:
        """time.monotonic() at which ``expire`` has something to do."""
        return min(self._lingering.values(), default=None)

    def _put(self, kv: Any) -> bool:
        key = kv.key[len(self._subnets) :].decode("utf-8", "replace")
        try:
            mark, lease = self._reader.read(key, kv)
        except ValueError as error:
            value_hash = hash(kv.value)
            if self._bad.get(key) != value_hash:
                self._bad[key] = value_hash
                self._status.counts["bad_key"] += 1
                known = "its last good value stays in use" if key in self.leases else "it is ignored"
                log.warning(f"unreadable lease in etcd; {known}", key=key, error=str(error))
            return False
        if self._marks.get(key) == mark:
            return False
        self._bad.pop(key, None)
        self._marks[key] = mark
        self._lingering.pop(key, None)
        self.leases[key] = lease
        if self._lingering:
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
            changed |= self.leases.pop(key, None) is not None
        return changed

    def _linger(self, keys: Iterable[str]) -> None:
        """Keep leases that vanished with the whole store, ours excepted: their owners will claim them again."""
        held = self._held()
        kept = [key for key in keys if key not in held]
        until = time.monotonic() + GRACE
        for key in kept:
            self._marks.pop(key, None)
            self._lingering[key] = until
        if kept:
            log.warning("etcd was wiped or restored; these peers stay for now", peers=len(kept), seconds=GRACE)

    def _set_config(self, text: bytes | None) -> bool:
        if text == self._config_text and self.config is not None:
            return False
        if text is None:
            if self._config_text is not None:
                log.warning("the network configuration is gone from etcd; the last good one stays in use")
                self._status.counts["config_missing"] += 1
            self._config_text = None
            return False
        if text == self._config_text:
            return False
        self._config_text = text
        try:
            config = validate_for_allocation(parse_network_config(text.decode("utf-8", "replace")))
        except StoreError as error:
            self._status.counts[error.cause] += 1
            stay = "the last good one stays in use" if self.config else "waiting for a usable one"
            log.error(f"unusable network configuration in etcd; {stay}", error=str(error))
            return False
        changed = config != self.config
        self.config = config
        return changed


class StreamEnded(Exception):
    """The watch stream is over; ``error`` says why."""

    def __init__(self, error: StoreError, compacted: bool = False) -> None:
        super().__init__(str(error))
        self.error = error
        self.compacted = compacted


class WatchStream:
    """One stream that watches some ranges, read by a thread of its own into a queue, so that a burst is one item."""

    def __init__(self, connection: EtcdConnection, ranges: Iterable[tuple[bytes, bytes]], start_revision: int) -> None:
        self._connection = connection
        self._requests: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._responses: queue.SimpleQueue[Any] = queue.SimpleQueue()
        for key, end in ranges:
            create = etcdrpc.WatchCreateRequest(key=key, range_end=end, start_revision=start_revision)
            self._requests.put(etcdrpc.WatchRequest(create_request=create))
        self._call = connection.watch(iter(self._requests.get, None))
        self._thread = threading.Thread(target=self._read, name="etcd-watch", daemon=True)
        self._thread.start()

    def _read(self) -> None:
        try:
            for response in self._call:
                self._responses.put(response)
            self._responses.put(StreamEnded(StoreUnavailable("etcd ended the watch")))
        except grpc.RpcError as error:
            self._responses.put(StreamEnded(self._connection.stream_failed(error)))

    def next(self, timeout: float) -> list[Any]:
        """All responses that are there, or the next one within ``timeout`` seconds; StreamEnded if it is over."""
        try:
            first = self._take(timeout)
        except queue.Empty:
            return []
        return [first, *self.drain()]

    def drain(self) -> list[Any]:
        """What is there now; the end of the stream, if that is there, is left for ``next``."""
        responses: list[Any] = []
        try:
            while len(responses) < 10_000:
                responses.append(self._take(0))
        except queue.Empty:
            pass
        except StreamEnded as end:
            self._responses.put(end)
        return responses

    def _take(self, timeout: float) -> Any:
        item = self._responses.get(timeout=timeout) if timeout > 0 else self._responses.get_nowait()
        if isinstance(item, StreamEnded):
            raise item
        if item.compact_revision:
            raise StreamEnded(StoreUnavailable("etcd has compacted the revision that the watch wanted"), True)
        if item.canceled:
            raise StreamEnded(self._connection.watch_refused(item.cancel_reason))
        return item

    def ask_progress(self) -> None:
        """Ask for a sign of life; it arrives as a response without events."""
        self._requests.put(etcdrpc.WatchRequest(progress_request=etcdrpc.WatchProgressRequest()))

    def wake(self) -> None:
        """Make ``next`` return, from another thread."""
        self._responses.put(StreamEnded(StoreUnavailable("closed")))

    def close(self) -> None:
        self._requests.put(None)  # ends gRPC's thread that reads the requests
        self._call.cancel()
        self._thread.join(timeout=5)


class SnapshotWatch:
    """Lists, watches, resumes and re-lists until closed, and yields complete snapshots."""

    def __init__(
        self,
        connection: EtcdConnection,
        prefix: str,
        status: EtcdStatus,
        held: Callable[[], frozenset[str]],
        reader: LeaseReader | None = None,
    ) -> None:
        """``held`` names the leases of this node: after a wipe they must be seen to be gone."""
        self._connection = connection
        self._prefix = prefix
        # Exactly what flannel reads: a role that suits flannel suits us, and signs of life do not wake us.
        self._ranges = (
            (f"{prefix}/config".encode(), b""),
            (f"{prefix}/subnets/".encode(), f"{prefix}/subnets0".encode()),
        )
        self._status = status
        self._table = SnapshotTable(prefix, status, held, reader or LeaseReader())
        self._closed = threading.Event()
        self._stream: WatchStream | None = None
        self._history: tuple[int, int] | None = None  # cluster id and raft term of the last list
        self._relist = True
        self._first = True

    def close(self) -> None:
        self._closed.set()
        stream = self._stream
        if stream is not None:
            stream.wake()

    def snapshots(self) -> Iterator[LeaseSnapshot]:
        pause = BACKOFF[0]
        while not self._closed.is_set():
            started = time.monotonic()
            try:
                if not self._same_history() and self._list():
                    yield self._snapshot()
                yield from self._follow()
            except (StreamEnded, StoreError) as failure:
                if self._closed.is_set():
                    return
                if isinstance(failure, StreamEnded) and failure.compacted:
                    self._relist = True
                    continue
                self._status.failed(failure.error if isinstance(failure, StreamEnded) else failure)
            if self._table.expire():
                yield self._snapshot()
            if time.monotonic() - started > 2 * BACKOFF[1]:
                pause = BACKOFF[0]
            self._closed.wait(pause * random.uniform(0.5, 1.0))
            pause = min(pause * 2, BACKOFF[1])

    def _snapshot(self) -> LeaseSnapshot:
        snapshot = self._table.snapshot()
        assert snapshot is not None
        return snapshot

    def _list(self) -> bool:
        """One read: the configuration and the leases at one revision. True if there is something to tell."""
        header, kvs = self._connection.read("read the leases", *self._ranges)
        other = self._other_history(header)
        self._history = (header.cluster_id, header.raft_term)
        changed = self._table.replace(kvs, header.revision, other)
        if self._table.config is None:
            raise ConfigMissing(
                f"no usable network configuration at {self._prefix}/config; "
                f"""write one: flannelctl config set '{{"Network":"10.5.0.0/16"}}'"""
            )
        first, self._relist = self._first, False
        self._first = False
        return changed or first

    def _other_history(self, header: Any) -> bool:
        if self._history is None:
            return False
        cluster, term = self._history
        return bool(header.cluster_id != cluster or header.raft_term < term or header.revision < self._table.revision)

    def _same_history(self) -> bool:
        """Whether the etcd that answers now is the one we followed, so that the watch may resume where it ended.

        A wiped or restored etcd starts again at a lower revision, but may have overtaken ours by the time we come
        back. So the youngest lease we know must also still be there, unchanged.
        """
        witness = self._table.witness()
        if self._relist or witness is None:
            return False
        key, mark = witness
        header, kvs = self._connection.read("read the leases", (key, b""))
        if self._other_history(header):
            return False
        return any((kv.mod_revision, kv.lease, hash(kv.value)) == mark for kv in kvs)

    def _follow(self) -> Iterator[LeaseSnapshot]:
        """Watch from the revision after the last one read, until the stream ends."""
        self._stream = stream = WatchStream(self._connection, self._ranges, self._table.revision + 1)
        try:
            if self._closed.is_set():
                return
            asked: float | None = None
            told = float("-inf")
            while True:
                responses = stream.next(self._patience(asked))
                now = time.monotonic()
                if responses and now - told < 2 * STORM:
                    self._closed.wait(STORM)
                    responses += stream.drain()
                if responses:
                    asked = None
                    self._status.alive()
                    if any(0 < response.header.revision < self._table.revision for response in responses):
                        self._relist = True
                        raise StreamEnded(StoreUnavailable("etcd went back to an earlier revision"))
                elif asked is None and now - (self._status.last_contact or 0) >= QUIET:
                    asked = now
                    stream.ask_progress()
                elif asked is not None and now - asked >= SILENT:
                    raise StreamEnded(StoreUnavailable(f"etcd does not answer (watch; {self._connection.names})"))
                events = [event for response in responses for event in response.events]
                changed = self._table.apply(events, self._wiped(events))
                if self._table.expire() or changed:
                    yield self._snapshot()
                    told = time.monotonic()
        finally:
            self._stream = None
            stream.close()

    def _wiped(self, events: list[Any]) -> bool:
        """Whether leases are deleted because the whole prefix is: the configuration's end comes in its own message."""
        deleted = sum(event.type != _PUT for event in events)
        if not deleted or deleted * 2 < len(self._table.leases):
            return False
        try:
            return not self._connection.read("read the network configuration", self._ranges[0])[1]
        except StoreError:
            return True

    def _patience(self, asked: float | None) -> float:
        """Seconds until something has to be done if nothing arrives."""
        now = time.monotonic()
        due = asked + SILENT if asked is not None else (self._status.last_contact or now) + QUIET
        expiry = self._table.next_expiry
        return max(0.01, min(due, expiry if expiry is not None else due) - now)
