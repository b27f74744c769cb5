"""The thread that holds our lease: claims it, publishes what we are, renews it, and takes it back when it is lost.

It also decides what this node *is* (``Standing``): configuration, backend, underlay, lease. Everything is a step that
looks at what is known now and does what is missing; a step that fails is one condition and a later try. Whatever
happens to the lease, the standing stays: the data path does not depend on the store.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from ipaddress import IPv4Network, IPv6Network, ip_address
from pathlib import Path

import structlog

from backends.backend import Backend, BackendError, Host, Underlay
from backends.registry import backend_class
from flanneld.board import Board
from flanneld.desired import Standing
from flanneld.facts import find_facts
from flanneld.identity import node_identity
from flanneld.options import Options
from flanneld.status import WAITING, Health
from flanneld.traffic_rules import firewalls
from flanneld.underlay import Choice, UnderlayError, View, choose_underlay
from subnet_lease import subnet_file
from subnet_lease.allocation import fits
from subnet_lease.lease import (
    FAMILIES,
    Family,
    IPAddress,
    IPNetwork,
    Lease,
    LeaseAttrs,
    LeaseSnapshot,
    NodeHints,
    NodeIdentity,
)
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
        self._hints: NodeHints | None = None
        self._config: NetworkConfig | None = None
        self._backend: Backend | None = None
        self._facts: dict[str, str] = {}
        self._choose_anew = False
        """After SIGHUP: look at the default route as at a start."""
        self._renew_at = 0.0
        self._renewed_at: float | None = None
        self._lost = False
        self._base: LeaseSnapshot | None = None
        """The newest snapshot when we last began to write: what it says of our lease is older than what we know."""
        self._previous = read_previous(Path(options.subnet_file))
        previous = (self._previous.network, self._previous.ipv6_network)
        self._networks: list[IPNetwork] = [network for network in previous if network is not None]
        """All that this node was part of; what is left of those that it is not any more is ours to remove."""
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
            except StoreError as error:
                self._fail_lease(error)

    def _step(self) -> float:
        view = self._board.view
        if view is None:
            return 1.0
        if self._board.reload:
            self._board.reload = False
            self._choose_anew = True
            self._config = self._hints = None
            self._store.reconnect()
        config = self._follow_config()
        underlay = self._choose_underlay(view, config)
        self._health.set("underlay", None)
        backend = self._follow_backend(config)
        # Raises where nothing would fit into the underlay's packets.
        backend.mtu(underlay, _families(config))
        identity = node_identity(self._options.node_name, view.interfaces, underlay)
        lease = self._board.lease
        if lease is None:
            lease = self._first_claim(config, backend, underlay, identity, view)
        else:
            lease = self._follow_lease(config, backend, underlay, identity, lease)
        self._board.refuse = ""
        self._health.set("config", None)
        self._look_at_range(config, lease)
        pause = self._renew(lease)
        self._health.set("lease", None)
        return pause

    def _follow_config(self) -> NetworkConfig:
        """The newest valid configuration; the first is read directly, later ones come with the snapshots."""
        snapshot = self._board.snapshot
        if self._config is None:
            self._config = self._store.read_config()
        elif snapshot is not None and snapshot.config != self._config:
            log.info("network configuration changed")
            self._config = snapshot.config
        return self._config

    def _choose_underlay(self, view: View, config: NetworkConfig) -> Underlay:
        snapshot = self._board.snapshot
        if self._hints is None:
            self._hints = self._store.hints()
        elif snapshot is not None:
            self._hints = snapshot.hints
        standing = self._board.standing
        current = standing.host.underlay.name if standing is not None and not self._choose_anew else ""
        underlay = choose_underlay(view, make_choice(self._options, config, self._hints, current))
        self._choose_anew = False
        return underlay

    def _follow_backend(self, config: NetworkConfig) -> Backend:
        """The backend of this configuration, made anew only when its part of the configuration changed."""
        backend = self._backend
        wanted = (config.backend_type, config.backend_options, _families(config))
        if backend is None or wanted != self._backend_made_of:
            backend = backend_class(config.backend_type)(config.backend_options)
            for key in (*config.unknown_keys, *(f"Backend.{k}" for k in backend.unknown_options)):
                log.warning("the network configuration has a key that nothing reads; is it misspelt?", key=key)
            self._backend, self._backend_made_of = backend, wanted
            self._facts = {}
        return backend

    _backend_made_of: tuple[object, ...] = ()

    def _first_claim(
        self, config: NetworkConfig, backend: Backend, underlay: Underlay, identity: NodeIdentity, view: View
    ) -> Lease:
        bare = LeaseAttrs(
            public_ip=underlay.public.get(4),  # type: ignore[arg-type]
            public_ipv6=underlay.public.get(6),  # type: ignore[arg-type]
            node=identity,
        )
        request = LeaseRequest(identity, bare, self._previous_for(config), avoid=underlay.prefixes)
        own = self._store.find_own(request)
        self._learn_facts(config, backend, underlay, identity, view, own)
        attrs = self._attrs(config, backend, underlay, identity)
        self._base = self._board.snapshot
        lease = self._store.acquire(config, replace(request, attrs=attrs))
        log.info(
            "lease acquired",
            subnet=str(lease.subnet or lease.ipv6_subnet),
            **({"ipv6_subnet": str(lease.ipv6_subnet)} if lease.subnet and lease.ipv6_subnet else {}),
            public_ip=str(attrs.public_ip or attrs.public_ipv6),
            backend=backend.name,
            interface=underlay.name,
        )
        self._board.lease = lease
        self._stand(config, backend, underlay, lease)
        return lease

    def _follow_lease(
        self, config: NetworkConfig, backend: Backend, underlay: Underlay, identity: NodeIdentity, lease: Lease
    ) -> Lease:
        """The kernel first, then the store: a changed underlay must work also while the store is away."""
        view = self._board.view
        assert view is not None
        if not self._facts:
            self._learn_facts(config, backend, underlay, identity, view, lease)
        # Whose lease it is does not change with the interface that carries it today.
        identity = lease.attrs.node or identity
        attrs = self._attrs(config, backend, underlay, identity)
        if not self._fits(config, lease):
            raise ConfigInvalid(
                f"this node's subnet {lease.subnet or lease.ipv6_subnet} lies outside the configured network; the old"
                " network keeps running here: drain the node and restart flanneld, which takes a subnet of the new one"
            )
        standing = self._board.standing
        moved = standing is not None and standing.host.underlay.local != underlay.local
        self._stand(config, backend, underlay, lease)
        if moved:
            self._store.reconnect()
        seen = self._seen(lease)
        gone, families = self._lost or seen is None, _families(config)
        if gone or families != lease.families:
            self._base = self._board.snapshot
            keep = tuple(lease.subnet_of(f) if f in families else None for f in FAMILIES)
            lease = self._store.acquire(
                config,
                LeaseRequest(identity, attrs, keep, keep=True, avoid=underlay.prefixes),  # type: ignore[arg-type]
            )
            if gone:
                log.warning("lease was gone; claimed the same subnet again", lease=lease.key)
            else:
                log.info("lease follows the address families of the network", lease=lease.key)
            self._lost = False
            self._renew_at = 0.0
            self._stand(config, backend, underlay, lease)
        elif seen is not None and attrs != seen.attrs:
            self._base = self._board.snapshot
            lease = self._store.publish(seen, attrs)
            log.info("published", public_ip=str(attrs.public_ip or attrs.public_ipv6), backend=backend.name)
        elif seen is not None:
            lease = seen  # an operator may have made it a reservation, or an ordinary lease again
        self._board.lease = lease
        return lease

    def _look_at_range(self, config: NetworkConfig, lease: Lease) -> None:
        """Warn of a subnet that a changed configuration would not hand out any more. Kubernetes hands out its own."""
        text = ""
        chosen = self._options.kube_subnet_mgr or lease.reservation  # by somebody who knew what they did
        if not chosen and not fits(config, (lease.subnet, lease.ipv6_subnet)):
            text = (
                f"this node keeps {lease.key}, which the network configuration would not hand out any more (SubnetLen,"
                f" SubnetMin, SubnetMax): containers live there. To move it: drain the node, stop flanneld, flannelctl"
                f" release {lease.key}, start flanneld"
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

    def _stand(self, config: NetworkConfig, backend: Backend, underlay: Underlay, lease: Lease) -> None:
        subnets: dict[Family, IPNetwork] = {}
        for family in FAMILIES:
            subnet = lease.subnet_of(family)
            if subnet is not None and config.network_of(family) is not None:
                subnets[family] = subnet
        standing = Standing(
            backend=backend,
            host=Host(underlay, config, subnets, self._facts),
            lease=lease,
            firewalls=firewalls(
                config,
                subnets,
                ip_masq=self._options.ip_masq,
                forward_rules=self._options.iptables_forward_rules,
                random_fully=not self._options.ip_masq_fully_random_disable,
                instance=self._options.instance,
                others=self._board.other_networks,
            ),
            blackhole=self._options.ip_blackhole_route,
            former_networks=self._former_networks(config),
            instance=self._options.instance,
        )
        old = self._board.standing
        if old is None or old.lease.key != lease.key or replace(old, lease=lease) != standing:
            self._board.standing = standing
            self._board.wake_reconciler()

    def _learn_facts(
        self,
        config: NetworkConfig,
        backend: Backend,
        underlay: Underlay,
        identity: NodeIdentity,
        view: View,
        own: Lease | None,
    ) -> None:
        self._facts = find_facts(backend, self._options, config, underlay, identity, view.interfaces, own)

    def _attrs(self, config: NetworkConfig, backend: Backend, underlay: Underlay, identity: NodeIdentity) -> LeaseAttrs:
        published = backend.published(Host(underlay, config, {}, self._facts))
        return LeaseAttrs(
            public_ip=underlay.public.get(4),  # type: ignore[arg-type]
            public_ipv6=underlay.public.get(6),  # type: ignore[arg-type]
            backend_type=published.backend_type,
            backend_data=published.data,
            backend_v6_data=published.v6_data,
            node=identity,
            behind_nat=underlay.public != underlay.local,
        )

    def _previous_for(self, config: NetworkConfig) -> tuple[IPv4Network | None, IPv6Network | None]:
        """The subnets of subnet.env that lie in today's network."""
        v4, v6 = self._previous.subnet, self._previous.ipv6_subnet
        net4, net6 = config.network_of(4), config.network_of(6)
        return (
            v4 if v4 is not None and isinstance(net4, IPv4Network) and v4.subnet_of(net4) else None,
            v6 if v6 is not None and isinstance(net6, IPv6Network) and v6.subnet_of(net6) else None,
        )

    def _former_networks(self, config: NetworkConfig) -> tuple[IPNetwork, ...]:
        now = [network for family in FAMILIES if (network := config.network_of(family)) is not None]
        self._networks += [network for network in now if network not in self._networks]
        return tuple(network for network in self._networks if network not in now)

    @staticmethod
    def _fits(config: NetworkConfig, lease: Lease) -> bool:
        for family in FAMILIES:
            subnet, network = lease.subnet_of(family), config.network_of(family)
            if subnet is not None and network is not None and not subnet.subnet_of(network):  # type: ignore[arg-type]
                return False
        return True


def _families(config: NetworkConfig) -> tuple[Family, ...]:
    return tuple(family for family in FAMILIES if config.network_of(family) is not None)


def read_previous(path: Path) -> subnet_file.SubnetFile:
    """What this node had before, from subnet.env; a file that cannot be read is as good as none."""
    try:
        return subnet_file.read(path) or subnet_file.SubnetFile()
    except (ValueError, OSError) as error:
        log.warning("the old subnet file is unusable; going on without it", problem=str(error))
        return subnet_file.SubnetFile()


def make_choice(options: Options, config: NetworkConfig, hints: NodeHints, current: str = "") -> Choice:
    """What the operator asked for; the store's node-public-ip annotations come before the flags, as in flannel."""
    public: dict[Family, IPAddress] = {}
    if hints.public_ip is not None:
        public[4] = hints.public_ip
    elif options.public_ip:
        public[4] = ip_address(options.public_ip)
    if hints.public_ipv6 is not None:
        public[6] = hints.public_ipv6
    elif options.public_ipv6:
        public[6] = ip_address(options.public_ipv6)
    families = _families(config)
    return Choice(
        families=families,
        iface=options.iface,
        iface_regex=options.iface_regex,
        can_reach=options.iface_can_reach,
        public={f: a for f, a in public.items() if f in families},
        current=current,
    )
