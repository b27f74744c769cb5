"""etcd's list and watch, run for as long as the store lives: resumed after a break, listed again when in doubt.

``WatchStream`` is one watch on the wire, ``SnapshotWatch`` keeps one going and folds it into ``etcd_table``'s table.
Nothing here raises into the daemon: a failure is counted, told once, and outlasted.
"""

from __future__ import annotations

import queue
import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final

import grpc
from etcd3 import etcdrpc

from subnet_lease.etcd_connection import EtcdConnection
from subnet_lease.etcd_table import PUT, LeaseReader, SnapshotTable
from subnet_lease.lease import LeaseSnapshot
from subnet_lease.store import ConfigMissing, StoreError, StoreStatus, StoreUnavailable, write_config

QUIET: Final = 4.0
"""Seconds without a message after which the watch is asked for a sign of life."""
SILENT: Final = 6.0
"""Seconds to wait for that sign before the stream is given up; with QUIET, a dead one is found within 10 s."""
BACKOFF: Final = (0.1, 5.0)
"""First and longest pause, in seconds, between attempts."""
STORM: Final = 0.005
"""Seconds for which changes are collected when one snapshot follows another at once; the first is never delayed."""


class StreamEnded(Exception):
    """The watch stream is over; ``error`` says why. ``compacted`` calls for a new list."""

    def __init__(self, error: StoreError, *, compacted: bool = False) -> None:
        super().__init__(str(error))
        self.error = error
        self.compacted = compacted


class WatchStream:
    """One stream that watches some ranges, read by a thread of its own into a queue, so that a burst is one item."""

    def __init__(self, connection: EtcdConnection, ranges: Iterable[tuple[bytes, bytes, int]]) -> None:
        """``ranges``: first key, end (b"" for that one key), and the last revision that is known."""
        self._connection = connection
        self._requests: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._responses: queue.SimpleQueue[Any] = queue.SimpleQueue()
        for key, end, known in ranges:
            create = etcdrpc.WatchCreateRequest(key=key, range_end=end, start_revision=known + 1)
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
            raise StreamEnded(StoreUnavailable("etcd has compacted the revision that the watch wanted"), compacted=True)
        if item.canceled:
            raise StreamEnded(self._connection.watch_refused(item.cancel_reason))
        return item

    def ask_progress(self) -> None:
        """Ask for a sign of life; it arrives as a response without events."""
        self._requests.put(etcdrpc.WatchRequest(progress_request=etcdrpc.WatchProgressRequest()))

    def leave(self) -> None:
        """Make ``next`` end the stream, from another thread."""
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
        status: StoreStatus,
        held: Callable[[], frozenset[str]],
        reader: LeaseReader | None = None,
        *,
        bare: bool = False,
    ) -> None:
        """``held`` names the leases of this node: after a wipe they must be seen to be gone. ``bare``: see the table."""
        self._connection = connection
        self._prefix = prefix
        # Exactly what flannel reads: a role that suits flannel suits us, and signs of life do not wake us.
        self._ranges = (
            (f"{prefix}/config".encode(), b""),
            (f"{prefix}/subnets/".encode(), f"{prefix}/subnets0".encode()),
        )
        self._status = status
        self._bare = bare
        self._table = SnapshotTable(prefix, status, held, reader or LeaseReader(), bare=bare)
        self._closed = threading.Event()
        self._stream: WatchStream | None = None
        self._history: tuple[int, int] | None = None  # cluster id and raft term of the last list
        self._relist = True
        self._first = True

    def close(self) -> None:
        self._closed.set()
        stream = self._stream
        if stream is not None:
            stream.leave()

    def snapshots(self) -> Iterator[LeaseSnapshot]:
        pause = BACKOFF[0]
        while not self._closed.is_set():
            started, generation = time.monotonic(), self._connection.generation
            try:
                if not self._same_history() and self._list():
                    yield self._snapshot()
                yield from self._follow()
            except (StreamEnded, StoreError) as failure:
                if self._closed.is_set():
                    return
                compacted = isinstance(failure, StreamEnded) and failure.compacted
                if compacted or generation != self._connection.generation:  # what we left has not failed
                    self._relist = self._relist or compacted
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
        if self._table.config is None and not self._bare:
            raise ConfigMissing(
                f"no usable network configuration at {self._prefix}/config; write one: {write_config(self._prefix)}"
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
        """Watch from the revisions after the last ones read, until the stream ends."""
        known = (self._table.config_revision, self._table.revision)
        ranges = [(*each, revision) for each, revision in zip(self._ranges, known, strict=True)]
        self._stream = stream = WatchStream(self._connection, ranges)
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
                    raise StreamEnded(self._connection.nothing_came("watch", SILENT))
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
        deleted = sum(event.type != PUT for event in events)
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
