"""What this node is at the moment, apart from its lease: configuration, backend, interface, identity.

Everything is followed live. What cannot be had raises (ConfigInvalid, ConfigMissing, UnderlayError, BackendError), and
what ran before goes on.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from ipaddress import IPv4Network, IPv6Network, ip_address
from pathlib import Path
from typing import Any

import structlog

from backends.backend import Backend, Host, Underlay
from backends.registry import backend_class
from flanneld.board import Board
from flanneld.desired import Standing
from flanneld.facts import find_facts
from flanneld.identity import node_identity
from flanneld.options import Options
from flanneld.status import Health
from flanneld.traffic_rules import firewalls
from flanneld.underlay import Choice, View, choose_underlay
from subnet_lease import subnet_file
from subnet_lease.lease import FAMILIES, Family, IPAddress, IPNetwork, Lease, LeaseAttrs, NodeHints, NodeIdentity
from subnet_lease.network_config import NetworkConfig
from subnet_lease.store import LeaseStore, StoreError

log = structlog.get_logger("flanneld")


@dataclass(frozen=True, slots=True)
class Setup:
    """One answer of ``NodeSetup.follow``."""

    config: NetworkConfig
    backend: Backend
    underlay: Underlay
    identity: NodeIdentity
    view: View
    problem: StoreError | None = None
    """Why something is not as new as it should be; to be told once what there is has been followed."""

    @property
    def families(self) -> tuple[Family, ...]:
        return families_of(self.config)

    @property
    def bare_attrs(self) -> dict[str, Any]:
        """What every lease says, whatever the backend: arguments of LeaseAttrs."""
        public, local = self.underlay.public, self.underlay.local
        return {
            "public_ip": public.get(4),
            "public_ipv6": public.get(6),
            "node": self.identity,
            "behind_nat": tuple(f for f in FAMILIES if public.get(f) != local.get(f)),
        }


@dataclass(slots=True)
class _MadeBackend:
    """A backend, what it was made of, and the facts that were found for it."""

    backend: Backend
    made_of: tuple[object, ...]
    facts: dict[str, str] = field(default_factory=dict)


class NodeSetup:
    """Used by the keeper's thread alone."""

    def __init__(self, options: Options, store: LeaseStore, board: Board, health: Health) -> None:
        self._options = options
        self._store = store
        self._board = board
        self._health = health
        self._config: NetworkConfig | None = None
        self._hints: NodeHints | None = None
        self._made: _MadeBackend | None = None
        self._reread = True
        """At the start and after ``reload``: ask the store itself, until it has answered."""
        self._choose_anew = False
        """After ``reload``: look at the default route as at a start."""
        self._previous = read_previous(Path(options.subnet_file))
        previous = (self._previous.network, self._previous.ipv6_network)
        self._networks: list[IPNetwork] = [network for network in previous if network is not None]
        """All that this node was part of; what is left of those that it is not any more is ours to remove."""

    def reload(self) -> None:
        """Read everything again at the next ``follow``."""
        self._choose_anew = self._reread = True

    def follow(self, view: View) -> Setup:
        """What this node is now. Raises what the module's docstring says."""
        problem = self._follow_store()
        assert self._config is not None and self._hints is not None
        config = self._config
        underlay = self._choose_underlay(view, config, self._hints)
        self._health.set("underlay", None)
        backend = self._follow_backend(config)
        # Raises where nothing would fit into the underlay's packets.
        backend.mtu(underlay, families_of(config))
        identity = node_identity(self._options.node_name, view.interfaces, underlay)
        return Setup(config, backend, underlay, identity, view, problem)

    def _follow_store(self) -> StoreError | None:
        """The newest configuration and hints: at first and after ``reload`` read directly, else from the snapshots.

        A store that cannot be asked is raised where nothing is known yet; later what is known goes on.
        """
        snapshot = self._board.snapshot
        if self._reread:
            try:
                self._config, self._hints = self._store.read_config(), self._store.hints()
            except StoreError as error:
                if self._config is None:
                    raise
                return error
            self._reread = False
        elif snapshot is not None:
            if snapshot.config != self._config:
                log.info("network configuration changed")
            self._config, self._hints = snapshot.config, snapshot.hints
        return None

    def _choose_underlay(self, view: View, config: NetworkConfig, hints: NodeHints) -> Underlay:
        standing = self._board.standing
        current = standing.host.underlay.name if standing is not None and not self._choose_anew else ""
        underlay = choose_underlay(view, make_choice(self._options, config, hints, current))
        self._choose_anew = False
        return underlay

    def _follow_backend(self, config: NetworkConfig) -> Backend:
        """The backend of this configuration, made anew only when its part of the configuration changed."""
        made_of = (config.backend_type, config.backend_options, families_of(config))
        if self._made is None or made_of != self._made.made_of:
            backend = backend_class(config.backend_type)(config.backend_options)
            for key in (*config.unknown_keys, *(f"Backend.{k}" for k in backend.unknown_options)):
                log.warning("the network configuration has a key that nothing reads; is it misspelt?", key=key)
            self._made = _MadeBackend(backend, made_of)
        return self._made.backend

    def attrs(self, setup: Setup, own: Lease | None) -> LeaseAttrs:
        """What to publish. ``own`` is our lease, or the one that we would be given back: our MAC may stand there."""
        made = self._made
        assert made is not None and made.backend is setup.backend
        if not made.facts:
            made.facts = find_facts(
                setup.backend, self._options, setup.config, setup.underlay, setup.identity, setup.view.interfaces, own
            )
        published = setup.backend.published(Host(setup.underlay, setup.config, {}, made.facts))
        return LeaseAttrs(
            **setup.bare_attrs,
            backend_type=published.backend_type,
            backend_data=published.data,
            backend_v6_data=published.v6_data,
        )

    def standing(self, setup: Setup, lease: Lease) -> Standing:
        """Everything that the desired state depends on, with this lease. ``attrs`` comes first."""
        assert self._made is not None
        config, options = setup.config, self._options
        subnets: dict[Family, IPNetwork] = {}
        for family in setup.families:
            subnet = lease.subnet_of(family)
            if subnet is not None:
                subnets[family] = subnet
        return Standing(
            backend=setup.backend,
            host=Host(setup.underlay, config, subnets, self._made.facts),
            lease=lease,
            firewalls=firewalls(
                config,
                subnets,
                ip_masq=options.ip_masq,
                forward_rules=options.iptables_forward_rules,
                random_fully=not options.ip_masq_fully_random_disable,
                instance=options.instance,
                others=self._board.other_networks,
            ),
            blackhole=options.ip_blackhole_route,
            former_networks=self._former_networks(config),
            instance=options.instance,
        )

    def previous_subnets(self, config: NetworkConfig) -> tuple[IPv4Network | None, IPv6Network | None]:
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


def families_of(config: NetworkConfig) -> tuple[Family, ...]:
    """The families that the network runs."""
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
    families = families_of(config)
    return Choice(
        families=families,
        iface=options.iface,
        iface_regex=options.iface_regex,
        can_reach=options.iface_can_reach,
        public={f: a for f, a in public.items() if f in families},
        current=current,
    )
