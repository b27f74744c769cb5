"""The thread that holds our lease: claims it, publishes what we are, renews it, and takes it back when it is lost.

Everything is a step that looks at what this node is now (``node_setup``) and at its lease, and does what is missing; a
step that fails is one condition and a later try. Whatever happens to the lease, the standing stays: the data path does
not depend on the store.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from dataclasses import replace

import structlog

from backends.backend import BackendError
from flanneld.board import Board
from flanneld.node_setup import NodeSetup, Setup
from flanneld.options import Options
from flanneld.status import WAITING, Health
from flanneld.underlay import UnderlayError
from subnet_lease.allocation import fits
from subnet_lease.lease import FAMILIES, Lease, LeaseAttrs, LeaseSnapshot
from subnet_lease.network_config import NetworkConfig
from subnet_lease.store import (
    ConfigInvalid,
    ConfigMissing,
    LeaseLost,
    LeaseRequest,
    LeaseStore,
    StoreError,
    SubnetTaken,
)

log = structlog.get_logger("flanneld")

RETRY_FIRST = 0.2
RETRY_LIMIT = 5.0
"""Seconds between tries while something is missing; so that what heals is seen within five seconds."""


class LeaseKeeper:
    """Runs in a thread of its own (``run``); ``wake`` makes it look again."""

    def __init__(
        self,
        options: Options,
        store: LeaseStore,
        board: Board,
        health: Health,
        count_error: Callable[[str], None],
    ) -> None:
        self._options = options
        self._store = store
        self._board = board
        self._health = health
        self._count_error = count_error
        self._wakeup = threading.Event()
        self._setup = NodeSetup(options, store, board, health)
        self._renew_at = 0.0
        self._renewed_at: float | None = None
        self._lost = False
        self._base: LeaseSnapshot | None = None
        """The newest snapshot when we last began to write: what it says of our lease is older than what we know."""
        board.wake_keeper = self.wake

    def wake(self) -> None:
        self._wakeup.set()

    def lease_age(self) -> float | None:
        """Seconds since the store last confirmed our lease, None before the first time."""
        return None if self._renewed_at is None else time.monotonic() - self._renewed_at

    def run(self) -> None:
        """Steps until the daemon stops."""
        delay = RETRY_FIRST
        while not self._board.stopping.is_set():
            self._wakeup.clear()
            pause, failed = self._try_step()
            if self._board.stopping.is_set():
                return
            if failed:
                pause, delay = delay, min(delay * 2, RETRY_LIMIT)
                # Not all nodes at once after an outage.
                pause *= random.uniform(0.8, 1.2)
            else:
                delay = RETRY_FIRST
            self._wakeup.wait(pause)
            if failed:
                time.sleep(0.02)

    def _try_step(self) -> tuple[float, bool]:
        """One step; seconds to wait, and whether something is missing."""
        try:
            return self._step(), False
        except (ConfigInvalid, ConfigMissing, BackendError) as error:
            self._fail("config", "config_invalid" if isinstance(error, BackendError) else error.cause, error)
            self._hold_on()
        except UnderlayError as error:
            self._fail("underlay", "underlay", error)
            self._hold_on()
        except StoreError as error:
            self._fail_lease(error)
        except Exception:
            # The thread that holds the lease must outlive what nobody thought of.
            log.exception("unexpected error while keeping the lease; trying again")
            self._health.set("lease", "unexpected error, see the log")
            self._count_error("unexpected")
        return 0.0, True

    def _fail(self, condition: str, cause: str, error: Exception) -> None:
        text = str(error)
        # What follows the first line of an underlay error is the list of interfaces, which come and go.
        fault = error.fault if isinstance(error, StoreError) else text.partition("\n")[0]
        self._health.set(condition, text, fault=fault)
        self._count_error(cause)

    def _fail_lease(self, error: StoreError) -> None:
        if isinstance(error, SubnetTaken):
            self._board.refuse = str(error)
        self._fail("lease", error.cause, error)
        if not error.transient and self._board.standing is None:
            self._board.stop(1)

    def _hold_on(self) -> None:
        """Keep the lease that we have although its configuration or interface is wrong: the old data path needs it."""
        lease = self._board.lease
        if lease is None:
            # The store answers now, whatever it did before.
            self._health.set("lease", WAITING["lease"])
        elif not self._lost:
            try:
                self._renew(lease)
                self._health.set("lease", None)
            except StoreError as error:
                self._fail_lease(error)

    def _step(self) -> float:
        view = self._board.view
        if view is None:
            return 1.0
        if self._board.reload:
            self._board.reload = False
            self._setup.reload()
            self._store.reconnect()
        setup = self._setup.follow(view)
        lease = self._board.lease
        lease = self._first_claim(setup) if lease is None else self._follow_lease(setup, lease)
        self._board.refuse = ""
        self._health.set("config", None)
        self._look_at_range(setup.config, lease)
        pause = self._renew(lease)
        self._health.set("lease", None)
        return pause

    def _first_claim(self, setup: Setup) -> Lease:
        previous = self._setup.previous_subnets(setup.config)
        bare = LeaseAttrs(**setup.bare_attrs)
        request = LeaseRequest(setup.identity, bare, previous, avoid=setup.underlay.prefixes)
        attrs = self._setup.attrs(setup, self._store.find_own(request))
        self._base = self._board.snapshot
        lease = self._store.acquire(setup.config, replace(request, attrs=attrs))
        log.info(
            "lease acquired",
            subnet=str(lease.subnet or lease.ipv6_subnet),
            **({"ipv6_subnet": str(lease.ipv6_subnet)} if lease.subnet and lease.ipv6_subnet else {}),
            public_ip=str(attrs.public_ip or attrs.public_ipv6),
            backend=setup.backend.name,
            interface=setup.underlay.name,
        )
        self._board.lease = lease
        self._stand(setup, lease)
        return lease

    def _follow_lease(self, setup: Setup, lease: Lease) -> Lease:
        """The kernel first, then the store: a changed underlay must work also while the store is away."""
        # Whose lease it is does not change with the interface that carries it today.
        setup = replace(setup, identity=lease.attrs.node or setup.identity)
        attrs = self._setup.attrs(setup, lease)
        if not _lies_inside(setup.config, lease):
            raise ConfigInvalid(
                f"this node's subnet {lease.subnet or lease.ipv6_subnet} lies outside the configured network; the old"
                " network keeps running here: drain the node and restart flanneld, which takes a subnet of the new one"
            )
        standing = self._board.standing
        moved = standing is not None and standing.host.underlay.local != setup.underlay.local
        self._stand(setup, lease)
        if moved:
            self._store.reconnect()
        if setup.problem is not None:
            raise setup.problem
        seen = self._seen(lease)
        if self._lost or seen is None or setup.families != lease.families:
            # A change of shape that was carried out although its answer got lost is no loss.
            gone = (self._lost or seen is None) and setup.families == lease.families
            lease = self._claim_again(setup, lease, attrs, gone=gone)
        elif attrs != seen.attrs:
            self._base = self._board.snapshot
            lease = self._store.publish(seen, attrs)
            log.info("published", public_ip=str(attrs.public_ip or attrs.public_ipv6), backend=setup.backend.name)
        else:
            lease = seen  # an operator may have made it a reservation, or an ordinary lease again
        self._board.lease = lease
        return lease

    def _claim_again(self, setup: Setup, lease: Lease, attrs: LeaseAttrs, *, gone: bool) -> Lease:
        """The subnets that we have, and no others: of those families that the network runs."""
        self._base = self._board.snapshot
        v4 = lease.subnet if 4 in setup.families else None
        v6 = lease.ipv6_subnet if 6 in setup.families else None
        request = LeaseRequest(setup.identity, attrs, (v4, v6), keep=True, avoid=setup.underlay.prefixes)
        lease = self._store.acquire(setup.config, request)
        if gone:
            log.warning("lease was gone; claimed the same subnet again", lease=lease.cidr)
        else:
            log.info("lease follows the address families of the network", lease=lease.cidr)
        self._lost = False
        self._renew_at = 0.0
        self._stand(setup, lease)
        return lease

    def _stand(self, setup: Setup, lease: Lease) -> None:
        """Show the reconciler what to build; it is woken only if that is something else."""
        new, old = self._setup.standing(setup, lease), self._board.standing
        if old is None or old.lease.key != lease.key or replace(old, lease=lease) != new:
            self._board.standing = new
            self._board.wake_reconciler()

    def _look_at_range(self, config: NetworkConfig, lease: Lease) -> None:
        """Warn of a subnet that a changed configuration would not hand out any more. Kubernetes hands out its own."""
        text = ""
        chosen = self._options.kube_subnet_mgr or lease.reservation  # by somebody who knew what they did
        if not chosen and not fits(config, (lease.subnet, lease.ipv6_subnet)):
            text = (
                f"this node keeps {lease.cidr}, which the network configuration would not hand out any more (SubnetLen,"
                f" SubnetMin, SubnetMax): containers live there. To move it: drain the node, stop flanneld, flannelctl"
                f" release {lease.cidr}, start flanneld"
            )
        self._health.warn("subnet", (text,) if text else ())

    def _seen(self, lease: Lease) -> Lease | None:
        """Our lease as the newest snapshot has it; None if it is gone or another node's."""
        snapshot, base = self._board.snapshot, self._base
        if snapshot is None or snapshot is base:
            return lease
        if snapshot.revision < lease.revision and (base is None or snapshot.revision >= base.revision):
            # Under way while we wrote. A revision that goes backwards, though, is another store: wiped, or restored.
            return lease
        seen = snapshot.leases.get(lease.key)
        if seen is None:
            return None
        mine, theirs = lease.attrs.node, seen.attrs.node
        if theirs is None:
            # Rewritten by a flanneld, or by hand: ours while it names our address.
            same = all(lease.attrs.public_ip_of(f) == seen.attrs.public_ip_of(f) for f in FAMILIES)
            return seen if same else None
        return seen if mine is None or theirs == mine else None

    def _renew(self, lease: Lease) -> float:
        now = time.monotonic()
        if now >= self._renew_at:
            try:
                self._renew_at = now + self._store.renew(lease)
                self._renewed_at = time.monotonic()
            except LeaseLost:
                self._lost = True
                raise
        return max(0.05, self._renew_at - now)


def _lies_inside(config: NetworkConfig, lease: Lease) -> bool:
    for family in lease.families:
        network = config.network_of(family)
        if network is not None and not lease.subnet_of(family).subnet_of(network):  # type: ignore[union-attr, arg-type]
            return False
    return True
