"""The reconciler's two callbacks: what should be, and what was done. Both run in the reconciler's thread."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Set
from dataclasses import asdict
from typing import Any, Protocol

import structlog

from backends.backend import BackendError
from backends.kernel_state import Change, Link, Observation, Record, RouteLookup, Wireguard
from flanneld.board import Board
from flanneld.desired import DesiredState, Standing
from flanneld.host_claims import DeviceTaken, HostClaims
from flanneld.ownership import ownership
from flanneld.plan import Owned
from flanneld.reconciler import PassResult, Wanted
from flanneld.status import Health
from flanneld.telemetry import Metrics
from flanneld.underlay import View
from subnet_lease.lease import FAMILIES, cidr
from subnet_lease.lease_wire import parse_subnet_key

log = structlog.get_logger("flanneld")

LOOKUP_INTERVAL = 3.0
"""Seconds between looks at the default route, which may change without any link or address changing."""

FEW = 5
"""Up to so many events get a line each; more get one together."""


class Lookups(Protocol):
    """What of the dataplane the choice of the underlay needs."""

    def lookup(self, address: str) -> RouteLookup | None: ...
    def default_routes(self, family: int) -> tuple[RouteLookup, ...]: ...


class WantedState:
    """Answers the reconciler from what the board shows."""

    def __init__(
        self,
        board: Board,
        health: Health,
        metrics: Metrics,
        lookups: Lookups,
        can_reach: str,
        done: Callable[[Standing], None],
    ) -> None:
        self._board = board
        self._health = health
        self._metrics = metrics
        self._lookups = lookups
        self._can_reach = can_reach
        self._done = done
        self._claims = HostClaims()
        self._looked_at = 0.0
        self._device_went = False
        self._desired: DesiredState | None = None
        self._owned: tuple[object, object, Owned] | None = None
        self._refused: dict[str, str] = {}
        self._peers: set[str] = set()
        self.last_pass: dict[str, Any] = {}

    @property
    def desired(self) -> DesiredState | None:
        return self._desired

    def wanted(self, observed: Observation) -> Wanted | None:
        """What should be, as far as it is known. None: touch nothing."""
        self._health.beat = time.monotonic()
        self._show_view(observed)
        standing, snapshot = self._board.standing, self._board.snapshot
        if standing is None or snapshot is None:
            return None
        desired, fresh = self._desired, False
        if desired is None or desired.standing is not standing:
            desired = self._make(standing)
            if desired is None:
                return None
            fresh = desired is not self._desired
        update = desired.update(snapshot.leases, time.monotonic())
        self._log_peers(update.leases | self._peers if fresh else update.leases, desired, quiet=fresh)
        self._show_refused(update.leases | self._refused.keys() if fresh else update.leases, desired)
        self._desired = desired
        self._metrics.peers.set(desired.peers)
        changed = None if fresh else frozenset(update.records)
        owned = self._ownership(observed, desired)
        return Wanted(desired.state, desired.scope, changed, owned, desired.next_departure)

    def _make(self, standing: Standing) -> DesiredState | None:
        """The desired state of a new standing; where that cannot be, what ran before goes on."""
        try:
            made = DesiredState(standing)
            self._claims.take(made.scope.devices, made.networks)
        except BackendError as error:
            self._health.set("config", str(error))
            self._metrics.errors.labels("config_invalid").inc()
            return self._desired
        except DeviceTaken as error:
            self._health.set("devices", str(error))
            return self._desired
        self._health.set("devices", None)
        return made

    def report(self, result: PassResult) -> None:
        """Turn a pass into log lines, metrics and the kernel condition."""
        metrics = self._metrics
        self._health.beat = time.monotonic()
        metrics.passes.inc()
        metrics.seconds.observe(result.seconds)
        for (kind, op), number in Counter((c.record.kind, c.op) for c in result.changes).items():
            metrics.changes.labels(kind.name.lower(), op).inc(number)
        for kind, number in Counter(c.record.kind for c in result.repairs).items():
            metrics.repairs.labels(kind.name.lower()).inc(number)
        for failure in result.failures:
            metrics.errors.labels(failure.cause).inc()
        if result.blind:
            metrics.errors.labels("observe").inc()
        if result.changes:
            if not self.last_pass:
                self._log_strangers(result)
            self.last_pass = {
                "at": time.time(),
                "changes": len(result.changes),
                "failures": len(result.failures),
                "seconds": round(result.seconds, 6),
            }
            self._log_changes(result)
        self._judge(result)

    def _judge(self, result: PassResult) -> None:
        if result.blind:
            self._health.set("kernel", result.blind)
        elif result.failures and self._device_just_went(result):
            return
        elif result.failures:
            first = result.failures[0].message
            more = len(result.failures) + result.skipped - 1
            self._health.set("kernel", first if more == 0 else f"{first} (and {more} more)")
        elif result.complete:
            # subnet.env first: whoever waits for ready reads it next.
            assert self._desired is not None
            self._device_went = False
            self._done(self._desired.standing)
            self._health.set("kernel", None)

    def _device_just_went(self, result: PassResult) -> bool:
        """The kernel tells of a deleted device last, after what stood on it: one pass may come in between."""
        went = all(failure.cause == "ENODEV" for failure in result.failures) and not self._device_went
        self._device_went = went
        return went

    def _show_view(self, observed: Observation) -> None:
        now = time.monotonic()
        view = self._board.view
        same = view is not None and view.interfaces is observed.interfaces
        if same and now - self._looked_at < LOOKUP_INTERVAL:
            return
        self._looked_at = now
        default = {f: found for f in FAMILIES if (found := self._lookups.default_routes(f))}
        reach = self._lookups.lookup(self._can_reach) if self._can_reach else None
        new = View(observed.interfaces, default, reach)
        others = self._claims.other_networks()
        if others != self._board.other_networks:
            self._board.other_networks = others
            self._board.wake_keeper()
        if new != view:
            self._board.view = new
            self._board.wake_keeper()
        elif not same:
            self._board.view = new

    def _ownership(self, observed: Observation, desired: DesiredState) -> Owned:
        cached = self._owned
        if cached is None or cached[0] is not observed.interfaces or cached[1] is not desired:
            networks = (*desired.networks, *desired.standing.former_networks)
            owned = ownership(observed.interfaces, networks, desired.scope.devices)
            cached = self._owned = (observed.interfaces, desired, owned)
        return cached[2]

    def _log_peers(self, leases: Set[str], desired: DesiredState, *, quiet: bool) -> None:
        """Of these leases, only those of peers: another backend's nodes, and who is refused, are none."""
        peers = {key for key in leases if key in desired.admitted}
        came, went = peers - self._peers, (leases - peers) & self._peers
        self._peers |= came
        self._peers -= went
        if not came and not went:
            return
        if quiet or len(came) + len(went) > FEW:
            log.info("peers", joined=len(came), left=len(went), now=desired.peers)
            return
        for key in sorted(came):
            lease = desired.leases[key]
            attrs = lease.attrs
            name = {"node": attrs.node.name} if attrs.node else {}
            log.info("peer joined", subnet=lease.cidr, public_ip=str(attrs.public_ip or attrs.public_ipv6), **name)
        for key in sorted(went):
            log.info("peer left", subnet=_cidr_of(key))

    def _show_refused(self, leases: Set[str], desired: DesiredState) -> None:
        """Tell which of these leases are refused now, or no longer."""
        for key in sorted(leases):
            before, reason = self._refused.get(key), desired.refused.get(key)
            if reason == before:
                continue
            if reason is None:
                log.info("peer no longer refused", subnet=_cidr_of(key))
                del self._refused[key]
            else:
                log.warning("peer refused; its owner must mend its lease", reason=reason)
                self._metrics.errors.labels("peer_refused").inc()
                self._refused[key] = reason
        self._metrics.refused.set(len(self._refused))

    @staticmethod
    def _log_strangers(result: PassResult) -> None:
        """At the start: a device of our name that was made otherwise, by another program or another configuration."""
        for change in result.changes:
            now, before = change.record, change.previous
            if not isinstance(now, Link) or not isinstance(before, Link) or isinstance(now.settings, Wireguard):
                continue
            if change.op == "put" and now.settings != before.settings:
                had, has = str(before.settings), str(now.settings)
                log.warning("a device of this name stood there with other settings", device=now.name, had=had, has=has)

    def _log_changes(self, result: PassResult) -> None:
        repairs = result.repairs
        if repairs:
            if len(repairs) <= FEW:
                for change in repairs:
                    log.warning("repaired what somebody else changed", **_describe(change))
            else:
                log.warning("repaired what somebody else changed", **_counts(repairs))
        others = len(result.changes) - len(repairs)
        if others > FEW:
            log.info("kernel programmed", seconds=round(result.seconds, 3), **_counts(result.changes))
        if log.is_enabled_for(logging.DEBUG):
            for change in result.changes:
                log.debug("kernel change", **_describe(change))


def _cidr_of(key: str) -> str:
    return cidr(*parse_subnet_key(key))


def _counts(changes: tuple[Change, ...]) -> dict[str, int]:
    return {kind.name.lower(): n for kind, n in Counter(change.record.kind for change in changes).items()}


def _describe(change: Change) -> dict[str, Any]:
    return {"op": change.op, "kind": change.record.kind.name.lower(), "record": describe(change.record)}


def describe(record: Record) -> str:
    """A record in one line, without secrets and without what is not set."""
    fields = asdict(record)
    secret = {"private_key", "preshared_key"}
    shown = {k: v for k, v in fields.items() if v not in (None, False, (), "") and k not in secret}
    if isinstance(shown.get("settings"), dict):
        shown["settings"] = {k: v for k, v in shown["settings"].items() if k not in secret}
    for many in ("rules", "routes"):
        if many in shown:
            shown[many] = len(shown[many])
    return " ".join(f"{key}={value}" for key, value in shown.items())
