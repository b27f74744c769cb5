"""wireguard: an encrypted tunnel to every peer (https://www.wireguard.com/papers/wireguard.pdf).

The walk of a packet from a container here to 10.5.7.9 on a peer whose subnet is 10.5.7.0/24:

1. Route ``10.5.0.0/16 dev flannel-wg scope link``: everything of the cluster network that is not our own subnet goes
   into the device. There is no route a peer. Behind it stands ``blackhole 10.5.0.0/16``, for when the device is gone.
2. AllowedIPs: the device looks for the peer that owns 10.5.7.9, encrypts for that peer's public key, and sends UDP
   from our listen port to the peer's endpoint. A packet that no peer owns is refused with an ICMP unreachable.
3. The peer's device decrypts it and drops it unless the sender owns the inner source address.

Mode "separate" keeps one device a family, each with its own port. In "auto", "ipv4" and "ipv6" one device carries both
families, and the mode says by which of a peer's addresses it is reached.

Names, ports and JSON are those of flannel's pkg/backend/wireguard, so both can share a network.
"""

from __future__ import annotations

from base64 import b64decode, b64encode
from binascii import Error as Base64Error
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Final, Literal

from pydantic import BaseModel, ConfigDict, Field

from backends.backend import BackendError, Host, PeerRefused, Published, Underlay, by_family, peer_address
from backends.kernel_state import BLACKHOLE_METRIC, ROUTE_PROTOCOL, Address, Link, Record, Route, Uplink, WireguardPeer
from backends.kernel_state import Wireguard as WireguardSettings
from subnet_lease.go_json import decode_options
from subnet_lease.lease import FAMILIES, Family, Lease

OVERHEAD: Final = 80
"""Outer IPv6 40, UDP 8, type 4, key index 4, counter 8, authentication tag 16; flannel counts it so for both families."""

MINIMUM_MTU: Final[Mapping[Family, int]] = {4: 68, 6: 1280}
"""RFC 791 and RFC 8200; below it the kernel runs no such family on a device."""

DEVICE: Final[Mapping[Family, str]] = {4: "flannel-wg", 6: "flannel-wg-v6"}


class WireguardOptions(BaseModel):
    """The configuration's Backend object, with flannel's keys."""

    model_config = ConfigDict(frozen=True)

    ListenPort: int = Field(51820, ge=1, le=0xFFFF)
    ListenPortV6: int = Field(51821, ge=1, le=0xFFFF)
    MTU: int = Field(0, ge=0, le=65535)
    PSK: str = Field("", repr=False)
    PersistentKeepaliveInterval: int = Field(0, ge=0, le=0xFFFF)
    Mode: Literal["separate", "auto", "ipv4", "ipv6"] = "separate"


class Wireguard:
    """One device a family, or one for both (Mode); one WireGuard peer for each lease and device."""

    name: ClassVar[str] = "wireguard"
    needs: ClassVar[frozenset[str]] = frozenset({"wireguard_key"})

    def __init__(self, options: Mapping[str, Any]) -> None:
        try:
            self.options, self.unknown_options = decode_options(WireguardOptions, options)
        except ValueError as error:
            raise BackendError(f"wireguard backend: {error}") from error
        if self.options.PSK and not is_key(self.options.PSK):
            # The text itself stays out of the message: a key with one wrong character is still nearly a key.
            raise BackendError("wireguard backend: PSK is not 32 bytes in base64; make one with: wg genpsk")

    def mtu(self, underlay: Underlay, families: tuple[Family, ...]) -> int:
        base = self.options.MTU or underlay.mtu
        smallest = max((MINIMUM_MTU[family] for family in families), default=0)
        if base - OVERHEAD < smallest:
            raise BackendError(
                f"an MTU of {base} leaves {base - OVERHEAD} inside WireGuard, less than the {smallest} that "
                f"IPv{max(families)} needs; raise the MTU of {underlay.name} or of the backend to {smallest + OVERHEAD}"
            )
        return base - OVERHEAD

    def published(self, host: Host) -> Published:
        """{"PublicKey":…,"Port":…} for each family that the network runs."""
        self._check_transport(host)
        data = {
            family: {"PublicKey": host.facts["wireguard_public_key"], "Port": self._port(family)}
            for family in FAMILIES
            if host.config.network_of(family)
        }
        return Published(self.name, data.get(4), data.get(6))

    def accepts(self, peer: Lease) -> bool:
        return peer.attrs.backend_type == self.name

    def host_state(self, host: Host) -> Iterator[Record]:
        self._check_transport(host)
        mtu = self.mtu(host.underlay, host.families)
        for device in sorted({self._device(family) for family in host.families}):
            settings = WireguardSettings(self._device_port(device), host.facts["wireguard_key"])
            yield Link(name=device, settings=settings, mtu=mtu)
            yield from self._uplinks(host.underlay, device)
        for family in host.families:
            subnet = host.subnets[family]
            yield Address(self._device(family), f"{subnet.network_address}/{subnet.max_prefixlen}")
            # IPv6 routes have no scope: the kernel reads every one of them back as global.
            network = str(host.config.network_of(family))
            yield Route(network, self._device(family), link_scope=family == 4)
            # While the device is not there, its packets go nowhere, rather than to the default gateway in the clear.
            yield Route(network, None, type="blackhole", metric=BLACKHOLE_METRIC, protocol=ROUTE_PROTOCOL)

    def _uplinks(self, underlay: Underlay, device: str) -> Iterator[Uplink]:
        """WireGuard sends as the routing table says; a table of its own says the chosen interface and address."""
        for family in underlay.ways_out:
            if self.options.Mode == "separate":
                carried = self._device(family) == device
            else:
                carried = self.options.Mode in ("auto", f"ipv{family}")
            if carried:
                yield Uplink(device, family, self._device_port(device), _ways(underlay, family))

    def peer_state(self, host: Host, peer: Lease) -> tuple[Record, ...]:
        if self.options.Mode == "separate":
            return by_family(host, peer, lambda family: (self._peer(host, peer, family, [family]),))
        shared = [family for family in host.families if peer.subnet_of(family) is not None]
        if not shared:
            return ()
        return (self._peer(host, peer, self._transport(host, peer), shared),)

    def _peer(self, host: Host, peer: Lease, transport: Family, inner: list[Family]) -> WireguardPeer:
        """The peer as reached over ``transport``, owning its subnets of the ``inner`` families."""
        data = peer.attrs.backend_data_of(transport)
        if data is None and self.options.Mode != "separate":
            # One device has one key and one port, so what the peer says of the other family is as good.
            data = peer.attrs.backend_data_of(6 if transport == 4 else 4)
        public_key, port = _peer_data(peer, data, self._port(transport))
        if public_key == host.facts["wireguard_public_key"]:
            raise PeerRefused(
                f"lease {peer.cidr} publishes this node's own WireGuard key (a cloned machine?); "
                "delete the key file on one of the two and restart its daemon"
            )
        address = peer_address(host, peer, transport)
        return WireguardPeer(
            dev=self._device(inner[0]),
            public_key=public_key,
            endpoint=f"{address}:{port}" if transport == 4 else f"[{address}]:{port}",
            allowed_ips=tuple(str(peer.subnet_of(family)) for family in inner),
            keepalive=self.options.PersistentKeepaliveInterval,
            preshared_key=self.options.PSK or None,
        )

    def _transport(self, host: Host, peer: Lease) -> Family:
        """Which of a peer's addresses the one device uses; "auto" decides as flannel does (selectMode).

        IPv4 if the peer's is public, since nearly everything reaches IPv4; IPv6 if both ends' are public; else IPv4.
        """
        if self.options.Mode in ("ipv4", "ipv6"):
            return 4 if self.options.Mode == "ipv4" else 6
        v4, v6 = peer.attrs.public_ip, peer.attrs.public_ipv6
        if v4 is None or v6 is None:
            return 4 if v6 is None else 6
        if not v4.is_private and host.underlay.public.get(4) is not None:
            return 4
        own = host.underlay.public.get(6)
        return 6 if own is not None and not own.is_private and not v6.is_private else 4

    def _check_transport(self, host: Host) -> None:
        for family in FAMILIES:
            if self.options.Mode == f"ipv{family}" and family not in host.underlay.public:
                raise BackendError(
                    f"wireguard backend: Mode {self.options.Mode} needs an IPv{family} address on {host.underlay.name}; "
                    "give it one, or choose another Mode"
                )

    def _device(self, family: Family) -> str:
        return DEVICE[family] if self.options.Mode == "separate" else DEVICE[4]

    def _device_port(self, device: str) -> int:
        return self.options.ListenPort if device == DEVICE[4] else self.options.ListenPortV6

    def _port(self, family: Family) -> int:
        return self._device_port(self._device(family))


def _ways(underlay: Underlay, family: Family) -> tuple[Route, ...]:
    """The routes of the chosen interface's own networks, and of all others, with the chosen address as source."""
    src = str(underlay.local[family])
    networks = {str(prefix) for prefix in underlay.prefixes if prefix.version == family}
    routes = [
        Route(network, underlay.name, src=src, link_scope=family == 4, protocol=ROUTE_PROTOCOL) for network in networks
    ]
    way = underlay.ways_out[family]
    if way is not None:
        everything = "0.0.0.0/0" if family == 4 else "::/0"
        gateway, scoped = way.via is not None, family == 4 and way.via is None
        routes.append(
            Route(everything, way.dev, way.via, onlink=gateway, src=src, link_scope=scoped, protocol=ROUTE_PROTOCOL)
        )
    return tuple(sorted(routes, key=lambda route: route.dst))


def is_key(text: str) -> bool:
    """Whether ``text`` is 32 bytes in base64, in the one spelling that the kernel gives back."""
    try:
        raw = b64decode(text, validate=True)
    except (Base64Error, ValueError):
        return False
    return len(raw) == 32 and b64encode(raw).decode() == text


def _peer_data(peer: Lease, data: Any, own_port: int) -> tuple[str, int]:
    """A peer's public key and port; older flannels publish no port and rely on all nodes having the same."""
    fields = {str(key).lower(): value for key, value in data.items()} if isinstance(data, dict) else {}
    key, port = fields.get("publickey"), fields.get("port") or own_port
    if not isinstance(key, str) or not is_key(key):
        raise PeerRefused(f"lease {peer.cidr} publishes PublicKey {key!r}, which is not a WireGuard key")
    if not isinstance(port, int) or isinstance(port, bool) or not 0 < port <= 0xFFFF:
        raise PeerRefused(f"lease {peer.cidr} publishes Port {port!r}, which is no UDP port")
    return key, port
