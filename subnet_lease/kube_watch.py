"""List and watch, folded: the nodes of a cluster as leases, kept complete.

Three parts. ``ListWatch`` is a thread that lists once, then follows the watch from the list's resource version, and
starts over only when the server no longer knows that version. ``NodeFold`` turns what it says into leases. Both
leave word of how it goes in a ``StoreStatus``.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Final, Generic, Protocol

import structlog

from subnet_lease.kube_annotations import BadNode, Keys, parse_lease
from subnet_lease.kube_api import Api, Gone, Watch
from subnet_lease.kube_objects import Change, Node, Watched
from subnet_lease.lease import Lease
from subnet_lease.network_config import NetworkConfig
from subnet_lease.persistent_map import PersistentMap
from subnet_lease.store import StoreError, StoreStatus

_FIRST_DELAY: Final = 0.2
_LAST_DELAY: Final = 5.0
"""Seconds between attempts, doubling; each is multiplied by a random factor of 0.5 to 1.5, since a whole cluster waits
for the same API server."""

_log = structlog.get_logger("kube")


def same_content(a: Lease, b: Lease) -> bool:
    """Whether two leases differ in nothing but the revision at which they were read."""
    return (a.subnet, a.ipv6_subnet, a.attrs) == (b.subnet, b.ipv6_subnet, b.attrs)


class Handler(Protocol[Watched]):
    """What ``ListWatch`` talks to, from its own thread."""

    def relisted(self, objects: Iterable[Watched]) -> None:
        """Everything there is. Iterating may raise StoreError: then nothing may have changed."""

    def changed(self, changes: list[Change[Watched]]) -> None:
        """What happened since."""


class ListWatch(Generic[Watched]):
    """Feeds a handler until ``close``; survives everything."""

    def __init__(
        self, api: Callable[[], Api], kind: type[Watched], handler: Handler[Watched], health: StoreStatus
    ) -> None:
        self._api = api
        self._kind: type[Watched] = kind
        self._handler: Handler[Watched] = handler
        self._health = health
        self._version = ""
        self._watch: Watch[Watched] | None = None
        self._wanted = threading.Event()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"kube-{kind.__name__.lower()}", daemon=True)

    @property
    def revision(self) -> int:
        """The resource version as a number, 0 where it is none."""
        return int(self._version) if self._version.isdecimal() else 0

    def start(self) -> None:
        self._thread.start()

    def relist(self) -> None:
        """List again soon, whatever the watch is doing."""
        self._wanted.set()
        self.reopen()

    def reopen(self) -> None:
        """Leave the present watch for a new one that goes on where it was."""
        watch = self._watch
        if watch is not None:
            watch.close()

    def close(self) -> None:
        self._closed.set()
        self.reopen()

    def join(self, timeout: float) -> None:
        if self._thread.is_alive():
            self._thread.join(timeout)

    def _run(self) -> None:
        delay = _FIRST_DELAY
        while not self._closed.is_set():
            began = time.monotonic()
            try:
                if self._wanted.is_set() or not self._version:
                    self._wanted.clear()
                    self._version = self._list()
                self._follow()
                # A watch that lasted has ended as it should; one that ends at once would be opened in a tight loop.
                if time.monotonic() - began > 2.0:
                    delay = _FIRST_DELAY
                    continue
            except Gone:
                self._version = ""
            except StoreError as error:
                self._failed(error)
            except Exception as error:  # noqa: BLE001 -- the watch outlives whatever a library may throw
                self._version = ""
                _log.exception("unexpected failure while watching Kubernetes")
                self._failed(StoreError(f"unexpected failure: {type(error).__name__}: {error}"))
            if not self._wanted.is_set():
                self._closed.wait(delay * random.uniform(0.5, 1.5))
            delay = min(delay * 2, _LAST_DELAY)

    def _failed(self, error: StoreError) -> None:
        if not self._closed.is_set():
            self._health.failed(error)

    def _list(self) -> str:
        listing = self._api().list(self._kind)
        self._handler.relisted(listing)
        self._health.alive()
        return listing.version

    def _follow(self) -> None:
        watch = self._watch = self._api().watch(self._kind, self._version)
        try:
            if self._closed.is_set() or self._wanted.is_set():
                watch.close()
            self._health.alive()
            for batch in watch:
                self._health.alive()
                for change in batch:
                    self._advance(change.object.metadata.resource_version)
                changes = [change for change in batch if change.type != "BOOKMARK"]
                if changes:
                    self._handler.changed(changes)
        finally:
            self._watch = None

    def _advance(self, version: str) -> None:
        """Remember how far we are. A version that goes backwards means that the cluster was restored: list again."""
        if version.isdecimal() and self._version.isdecimal() and int(version) < int(self._version):
            raise Gone(f"resource version {version} after {self._version}: the cluster's data went back in time")
        self._version = version or self._version


class NodeFold:
    """The leases that a cluster's nodes stand for, by lease key; used by one thread, read by others.

    A node whose annotations cannot be read keeps its last good lease, or has none; nobody else is touched
    (field problem 5). A lease object is replaced only when something in it has changed, so heartbeats change nothing.
    """

    def __init__(
        self,
        keys: Keys,
        own: str,
        config: NetworkConfig,
        count: Callable[[str], None],
        noticed: Callable[[], None] = lambda: None,
    ) -> None:
        """``count`` is told of each unusable node, ``noticed`` is called after each change."""
        self.config = config
        self.own: Node | None = None
        self.listed = False
        self.leases: PersistentMap[str, Lease] = PersistentMap()
        self._keys = keys
        self._own_name = own
        self._count = count
        self._noticed = noticed
        self._by_node: dict[str, Lease] = {}
        self._changes: dict[str, Lease | None] = {}
        """What ``leases`` does not show yet, by key; None for what is gone."""
        self._claims: dict[str, tuple[str, ...]] = {}
        self._bad: dict[str, str] = {}

    @property
    def own_lease(self) -> Lease | None:
        """The lease that our own node stands for."""
        return self._by_node.get(self._own_name)

    def relisted(self, nodes: Iterable[Node]) -> None:
        """Take over a complete list; departed nodes are gone afterwards."""
        own = None
        found: dict[str, Lease | None] = {}
        for node in nodes:
            found[node.metadata.name] = self._lease(node)
            if node.metadata.name == self._own_name:
                own = node
        # Nothing has changed up to here, so a list that breaks off changes nothing.
        for name in self._by_node.keys() - found.keys():
            self._put(name, None)
        for name, lease in found.items():
            self._put(name, lease)
        self._bad = {name: text for name, text in self._bad.items() if name in found}
        self._show()
        self.own, self.listed = own, True
        self._noticed()

    def changed(self, changes: Iterable[Change[Node]]) -> None:
        """Fold in what happened; ``leases`` becomes a new mapping only if a lease has changed."""
        touched, own = False, self.own
        for change in changes:
            node, name = change.object, change.object.metadata.name
            gone = change.type == "DELETED"
            if name == self._own_name:
                self.own = None if gone else node
            if gone:
                self._bad.pop(name, None)
            touched = self._put(name, None if gone else self._lease(node)) or touched
        self._show()
        if touched or own is not self.own:
            self._noticed()

    def _show(self) -> None:
        self.leases = self.leases.with_changes(self._changes)
        self._changes.clear()

    def reconfigure(self, config: NetworkConfig) -> None:
        """Read nodes by another configuration from the next list on; ``listed`` is false until then."""
        self.config = config
        self.listed = False

    def _put(self, name: str, lease: Lease | None) -> bool:
        """Give a node this lease; whether that changed anything."""
        before = self._by_node.pop(name, None)
        if lease is not None:
            self._by_node[name] = lease
        if before is lease:
            return False
        if before is not None and (lease is None or lease.key != before.key):
            self._settle(before.key, tuple(n for n in self._claims.get(before.key, ()) if n != name))
        if lease is not None:
            claims = self._claims.get(lease.key, ())
            if name not in claims:
                claims = (name, *claims) if name == self._own_name else (*claims, name)
            self._settle(lease.key, claims)
        return True

    def _settle(self, key: str, claims: tuple[str, ...]) -> None:
        """Of several nodes with one podCIDR, the one that had it first keeps it; ours goes before all."""
        if not claims:
            self._claims.pop(key, None)
            self._changes[key] = None
            return
        self._claims[key] = claims
        self._changes[key] = holder = self._by_node[claims[0]]
        for loser in claims[1:]:
            self._complain(loser, f"podCIDR {holder.cidr} belongs to node {claims[0]}, too", None)

    def _lease(self, node: Node) -> Lease | None:
        name = node.metadata.name
        before = self._by_node.get(name)
        try:
            lease = parse_lease(self._keys, self.config, name, node.annotations, node.cidrs)
        except BadNode as error:
            self._complain(name, str(error), before)
            return before
        self._bad.pop(name, None)
        if lease is None or before is None or not same_content(lease, before):
            return lease and replace(lease, revision=node.revision)
        return before

    def _complain(self, name: str, text: str, before: Lease | None) -> None:
        """Once for each node and fault, not once for each heartbeat."""
        if self._bad.get(name) != text:
            self._bad[name] = text
            self._count("bad_key")
            kept = "its last good lease stays" if before else "it is no peer until that is mended"
            _log.warning("a node's annotations cannot be used", node=name, error=text, consequence=kept)
