"""What we tell Kubernetes about this node: the NetworkUnavailable condition, and Events for an operator."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Final

import structlog

from subnet_lease.kube_api import Api, Conflict
from subnet_lease.kube_objects import Event, EventMetadata, Node, Reference
from subnet_lease.store import AccessDenied, StoreError

BROKEN_AFTER: Final = 10.0
"""Seconds for which the data path must be broken before the scheduler is told: a restart is shorter than that."""

REPEAT_AFTER: Final = 600.0
"""Seconds before the same Event about the same object is created once more."""

_UP = ("False", "FlannelIsUp", "Flannel is running on this node")

_log = structlog.get_logger("kube")


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


class Events:
    """Creates Events; never raises, since an Event that is lost must not stop what it speaks of."""

    def __init__(self, api: Callable[[], Api], node: Callable[[], str]) -> None:
        self._api = api
        self._node = node
        self._last: dict[tuple[str, str, str, str], float] = {}

    def about_node(self, kind: str, reason: str, message: str) -> None:
        """An Event about our own node. ``kind`` is Normal or Warning."""
        name = self._node()
        # kubelet's events carry the node's name as uid, and kubectl describe looks for that.
        self.create(Reference("v1", "Node", name, uid=name), kind, reason, message)

    def create(self, about: Reference, kind: str, reason: str, message: str, name: str = "") -> None:
        """With a ``name``, the Event exists once in the cluster, however many nodes create it."""
        key = (about.kind, f"{about.namespace}/{about.name}", reason, message)
        now = time.monotonic()
        if now - self._last.get(key, -REPEAT_AFTER) < REPEAT_AFTER:
            return
        if len(self._last) > 1000:
            self._last.clear()
        self._last[key] = now
        stamp = _now()
        event = Event(
            metadata=EventMetadata(name or f"{about.name}.{uuid.uuid4().hex[:16]}", about.namespace or "default"),
            involved_object=about,
            type=kind,
            reason=reason,
            message=message[:1024],
            first_timestamp=stamp,
            last_timestamp=stamp,
            source={"component": "flanneld", "host": self._node()},
            reporting_component="flanneld",
            reporting_instance=self._node(),
        )
        try:
            self._api().create_event(event)
        except Conflict:
            pass
        except StoreError as error:
            if not isinstance(error, AccessDenied):
                self._last.pop(key, None)
            _log.info("an Event could not be created", reason=reason, message=message, error=str(error))


class NodeCondition:
    """Keeps NetworkUnavailable as the daemon reports it, with as few writes as that takes."""

    def __init__(self, api: Callable[[], Api], node: Callable[[], str], events: Events) -> None:
        self._api = api
        self._node = node
        self._events = events
        self._told: tuple[bool, tuple[str, ...]] | None = None
        self._broken_since: float | None = None
        self._written: tuple[str, str, str] | None = None
        self._turn = threading.Lock()
        self._version = ""

    def report(self, ready: bool, reasons: tuple[str, ...], now: float) -> None:
        """``now`` is monotonic. Raises StoreError; ``settle`` tries again."""
        if ready:
            self._broken_since = None
        elif self._broken_since is None:
            self._broken_since = now
        self._told = (ready, reasons)
        self.settle(now)

    def settle(self, now: float) -> None:
        """Write what was reported last, once it is time to. Called again and again; usually nothing is to be done.

        Two threads call it: one at a time, or the second would take for written what the first is about to replace.
        """
        with self._turn:
            self._settle(now)

    def _settle(self, now: float) -> None:
        if self._told is None:
            return
        ready, reasons = self._told
        if ready:
            self._write(_UP)
        elif self._broken_since is not None and now - self._broken_since >= BROKEN_AFTER:
            text = "; ".join(reasons) or "the data path is not ready"
            if self._written is None or self._written[0] != "True":
                self._write(("True", "FlannelIsNotReady", text[:1024]))

    def observed(self, node: Node) -> None:
        """What our node says now: if it is not what we wrote, the next report writes it again."""
        if self._written is None or node.older_than(self._version):
            return
        found = next((c for c in node.status.conditions or [] if c.type == "NetworkUnavailable"), None)
        if found is None or (found.status, found.reason) != self._written[:2]:
            self._written = None

    def _write(self, wanted: tuple[str, str, str]) -> None:
        if self._written == wanted:
            return
        before, (status, reason, message) = self._written, wanted
        stamp = _now()
        node = self._api().patch_condition(
            self._node(),
            {
                "type": "NetworkUnavailable",
                "status": status,
                "reason": reason,
                "message": message,
                "lastHeartbeatTime": stamp,
                "lastTransitionTime": stamp,
            },
        )
        self._written, self._version = wanted, node.metadata.resource_version
        if status == "True":
            self._events.about_node("Warning", reason, f"The pod network of this node is broken: {message}")
        elif before is not None:
            self._events.about_node("Normal", reason, "The pod network of this node works again")
