"""The records that describe kernel networking state, as frozen values.

A record says what *is* or what *should be*; it never says how to get there. Devices are named, never indexed.
Addresses are text in the kernel's canonical spelling (what ``inet_ntop`` prints), because that is what both sides of
a comparison are made of; the address family follows from the text and is never a second code path.

Every record has a ``key``: the identity under which the kernel holds at most one such object. Two states are compared
key by key; a record with the same key and other contents is a *change*, not a removal and an addition.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Final, Literal

ROUTE_PROTOCOL: Final = 241
"""rtm_protocol of the routes that we put on devices that are not ours (host-gw, DirectRouting, blackhole).

Unassigned in the kernel's include/uapi/linux/rtnetlink.h and in iproute2's rt_protos: it says who wrote the route.
"""

UPLINKS: Final[Mapping[str, int]] = {"flannel-wg": 2410, "flannel-wg-v6": 2420}
"""The number of a tunnel's ``Uplink``, by device: that of its table, and of the first of its rules (by priority)."""

BLACKHOLE_METRIC: Final = 4096
"""Behind every route that leads somewhere (0 for IPv4, 1024 for IPv6), which must win while it is there."""

BOOT_PROTOCOL: Final = 3
"""RTPROT_BOOT, what flanneld's routes on its own device carry; kept, so that takeover and hand-back write nothing."""


class Kind(enum.IntEnum):
    """What a record describes. The value is the order in which additions are applied; removals go in reverse.

    FDB before neighbour: when a peer's MAC changes, no neighbour ever names a MAC that the FDB lacks.
    """

    LINK = 1
    SYSCTL = 2
    ADDRESS = 3
    UPLINK = 4
    FDB = 5
    NEIGHBOUR = 6
    TUNNEL_PEER = 7
    ROUTE = 8
    FIREWALL = 9
    HOOK = 10

    # An Enum hashes its name, in Python; keys are hashed by the ten thousand.
    __hash__ = int.__hash__


Key = tuple[int | str | None, ...]

_FLANNEL_DEVICE = re.compile(r"flannel(\.\d+|-v6\.\d+|-wg|-wg-v6|\.ipip|\d+)")


def is_flannel_device(name: str) -> bool:
    """Whether flannel, or we, would give a device of any backend this name."""
    return _FLANNEL_DEVICE.fullmatch(name) is not None


@dataclass(frozen=True, slots=True)
class Vxlan:
    """Settings of a vxlan device that iproute2 calls ``id``, ``local``, ``dev``, ``dstport``, ``learning``, ``gbp``."""

    vni: int
    local: str
    underlay: str
    port: int = 8472
    learning: bool = False
    gbp: bool = False


@dataclass(frozen=True, slots=True)
class Wireguard:
    """Settings of a WireGuard device; the key never appears in a repr, a log or a diff."""

    listen_port: int
    private_key: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class Ipip:
    """An ipip device: fixed local address, any remote; ``underlay`` "" leaves the way out to the routing table."""

    local: str
    underlay: str


@dataclass(frozen=True, slots=True)
class Tun:
    """A TUN device whose packets our udp tunnel carries; ``local`` and ``port`` are its UDP socket's.

    ``network`` is the cluster network in CIDR form; a packet to an address in it without a peer is unreachable.
    """

    local: str
    port: int
    underlay: str
    network: str


@dataclass(frozen=True, slots=True)
class Foreign:
    """Observed only: a device of that name whose kind is another one, or whose settings no record can express.

    ``kind`` is what ``ip -details link`` calls it: "dummy", "bridge", "wireguard", "tun", or "" for hardware.
    """

    kind: str


LinkSettings = Vxlan | Wireguard | Ipip | Tun | Foreign


@dataclass(frozen=True, slots=True)
class Link:
    """A device of ours, up, with its settings. ``mac`` and ``tx_checksum`` are None where we do not care."""

    kind: ClassVar[Kind] = Kind.LINK
    name: str
    settings: LinkSettings
    mtu: int
    mac: str | None = None
    up: bool = True
    tx_checksum: bool | None = None

    @property
    def key(self) -> Key:
        return (Kind.LINK, self.name)


@dataclass(frozen=True, slots=True)
class Sysctl:
    """``path`` is relative to /proc/sys, with slashes: net/ipv6/conf/flannel.1/accept_ra."""

    kind: ClassVar[Kind] = Kind.SYSCTL
    path: str
    value: str

    @property
    def key(self) -> Key:
        return (Kind.SYSCTL, self.path)


@dataclass(frozen=True, slots=True)
class Address:
    """``address`` is in CIDR form: 10.5.52.0/32."""

    kind: ClassVar[Kind] = Kind.ADDRESS
    dev: str
    address: str

    @property
    def key(self) -> Key:
        return (Kind.ADDRESS, self.dev, self.address)


@dataclass(frozen=True, slots=True)
class FdbEntry:
    """A permanent forwarding entry of a vxlan device: frames for ``mac`` go to the VTEP at ``dst``.

    ``via`` is the interface that the outer packets leave by, None for the one that the routing table names.
    """

    kind: ClassVar[Kind] = Kind.FDB
    dev: str
    mac: str
    dst: str
    via: str | None = None

    @property
    def key(self) -> Key:
        return (Kind.FDB, self.dev, self.mac)


@dataclass(frozen=True, slots=True)
class Neighbour:
    """A permanent neighbour (ARP or ND) entry."""

    kind: ClassVar[Kind] = Kind.NEIGHBOUR
    dev: str
    dst: str
    mac: str

    @property
    def key(self) -> Key:
        return (Kind.NEIGHBOUR, self.dev, self.dst)


@dataclass(frozen=True, slots=True)
class Route:
    """A route of the main table. ``dst`` is in CIDR form; ``dev`` is None for a blackhole.

    ``metric`` None means the kernel's default (0 for IPv4, 1024 for IPv6).
    """

    kind: ClassVar[Kind] = Kind.ROUTE
    dst: str
    dev: str | None
    via: str | None = None
    onlink: bool = False
    src: str | None = None
    link_scope: bool = False
    protocol: int = BOOT_PROTOCOL
    metric: int | None = None
    type: Literal["unicast", "blackhole", "other"] = "unicast"

    @property
    def key(self) -> Key:
        return (Kind.ROUTE, self.dst, self.metric)


@dataclass(frozen=True, slots=True)
class Uplink:
    """Routes of their own for what one UDP port of this host sends, by policy rules and a table.

    For ``tunnel``, one of ``UPLINKS``, which cannot be told interface and source address of its packets. ``routes`` are
    as in the main table, sorted by ``dst``. What is wrong with the rules of an observed Uplink is in ``defects``, empty
    in a desired one.
    """

    kind: ClassVar[Kind] = Kind.UPLINK
    tunnel: str
    family: Literal[4, 6]
    port: int
    routes: tuple[Route, ...]
    defects: tuple[str, ...] = ()

    @property
    def key(self) -> Key:
        return (Kind.UPLINK, self.tunnel, self.family)


@dataclass(frozen=True, slots=True)
class WireguardPeer:
    """A peer of a WireGuard device. ``endpoint`` is host:port or [host]:port; ``preshared_key`` stays out of reprs."""

    kind: ClassVar[Kind] = Kind.TUNNEL_PEER
    dev: str
    public_key: str
    endpoint: str
    allowed_ips: tuple[str, ...]
    keepalive: int = 0
    preshared_key: str | None = field(default=None, repr=False)

    @property
    def key(self) -> Key:
        return (Kind.TUNNEL_PEER, self.dev, self.public_key)


@dataclass(frozen=True, slots=True)
class UdpPeer:
    """A peer of the udp tunnel: packets for ``subnet`` (CIDR) go to ``address``:``port``."""

    kind: ClassVar[Kind] = Kind.TUNNEL_PEER
    dev: str
    subnet: str
    address: str
    port: int

    @property
    def key(self) -> Key:
        return (Kind.TUNNEL_PEER, self.dev, self.subnet)


@dataclass(frozen=True, slots=True)
class Rule:
    """One masquerade or forward rule, in no firewall's own language.

    ``src``/``dst`` are CIDR; a leading ``!`` negates. ``mark`` is value/mask in hexadecimal.
    """

    chain: Literal["postrouting", "forward"]
    verdict: Literal["return", "accept", "masquerade", "drop"]
    src: str | None = None
    dst: str | None = None
    mark: str | None = None
    random_fully: bool = False


@dataclass(frozen=True, slots=True)
class Firewall:
    """All of our rules of one family in one mode, in order. ``instance`` is "" or the name of a second daemon.

    An observed Firewall with rules other than the desired ones (order, count, a missing jump) is simply unequal; what
    cannot be expressed as a Rule appears in ``defects`` (such as "no jump from FORWARD"), which is always empty in a
    desired record.
    """

    kind: ClassVar[Kind] = Kind.FIREWALL
    family: Literal[4, 6]
    mode: Literal["iptables", "nftables"]
    rules: tuple[Rule, ...]
    instance: str = ""
    defects: tuple[str, ...] = ()

    @property
    def key(self) -> Key:
        return (Kind.FIREWALL, self.mode, self.family, self.instance)


@dataclass(frozen=True, slots=True)
class Hook:
    """A command that runs once when it appears and another when it goes (the extension backend's)."""

    kind: ClassVar[Kind] = Kind.HOOK
    name: str
    add: str
    remove: str
    environment: tuple[tuple[str, str], ...] = ()
    stdin: str = ""

    @property
    def key(self) -> Key:
        return (Kind.HOOK, self.name)


Record = Link | Sysctl | Address | Uplink | FdbEntry | Neighbour | Route | WireguardPeer | UdpPeer | Firewall | Hook
KernelState = Mapping[Key, Record]


def state_of(*records: Record) -> dict[Key, Record]:
    """The records as a state, by key."""
    return {record.key: record for record in records}


@dataclass(frozen=True, slots=True)
class Change:
    """One step: make ``record`` true (``put``) or make it gone (``remove``). ``previous`` is what was observed."""

    op: Literal["put", "remove"]
    record: Record
    previous: Record | None = None


@dataclass(frozen=True, slots=True)
class Failure:
    """A change that the kernel refused. ``cause`` is one short word for the metric, ``message`` the whole sentence."""

    change: Change
    cause: str
    message: str


@dataclass(frozen=True, slots=True)
class InterfaceAddress:
    """An address of an interface: ``address`` in CIDR form, scope as the kernel's number (0 global, 253 link)."""

    address: str
    scope: int = 0
    permanent: bool = True
    temporary: bool = False
    deprecated: bool = False
    secondary: bool = False


@dataclass(frozen=True, slots=True)
class Interface:
    """A link as observed, whoever made it."""

    name: str
    index: int
    mtu: int
    up: bool
    mac: str | None = None
    kind: str | None = None
    loopback: bool = False
    addresses: tuple[InterfaceAddress, ...] = ()


@dataclass(frozen=True, slots=True)
class RouteLookup:
    """The kernel's answer to "how would you reach this address?" (``ip route get``)."""

    dev: str
    via: str | None
    src: str | None


@dataclass(frozen=True, slots=True)
class Scope:
    """What the dataplane is to look at.

    ``devices`` are the devices that we want, by name; devices that a flannel of any backend names its own
    (``is_flannel_device``) are observed, too, so that a backend switch can remove them. ``networks`` are the CIDRs
    inside which main-table routes concern us. ``firewall`` and ``sysctls`` are what we want, since those are read by
    name; ``instance`` is the name of a second daemon on this host, "" for the first. ``sources`` are the addresses that
    our tunnels start at, each with the index of its interface (192.0.2.1%2). With ``marked_routes``, every
    main-table route with our protocol number concerns us, too.
    """

    devices: frozenset[str] = frozenset()
    networks: tuple[str, ...] = ()
    instance: str = ""
    firewall: tuple[Firewall, ...] = ()
    sysctls: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()
    marked_routes: bool = False


@dataclass(frozen=True, slots=True)
class Observation:
    """What the dataplane sees now.

    ``changed`` holds the keys that may differ from the last observation, None after a fresh look at everything.
    ``interfaces`` is the same tuple object as long as no link or address has changed.
    """

    state: KernelState
    changed: frozenset[Key] | None
    interfaces: tuple[Interface, ...]
