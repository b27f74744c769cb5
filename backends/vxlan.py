"""vxlan: one device per family, and for each peer one neighbour, one FDB entry and one route (RFC 7348).

The walk of a packet from a container here to 10.5.7.9 on a peer whose subnet is 10.5.7.0/24:

1. Route ``10.5.7.0/24 via 10.5.7.0 dev flannel.1 onlink``: the next hop is the peer's subnet base, an address that
   stands for the peer's VTEP and is on no wire.
2. Neighbour ``10.5.7.0 lladdr <VtepMAC> dev flannel.1 PERMANENT``: so nobody ever asks by ARP.
3. FDB ``<VtepMAC> dev flannel.1 dst <PublicIP> self permanent``: the kernel wraps the frame in UDP and sends it from
   the device's local address to the peer's public one.
4. The peer's kernel unwraps it, finds its own VTEP MAC inside, and routes the packet to the container.

Records and settings are those of flannel's pkg/backend/vxlan, so both can share a network.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar, Final, Literal

from pydantic import BaseModel, ConfigDict, Field

from backends.backend import BackendError, Host, PeerRefused, Published, Underlay, by_family, direct, peer_address
from backends.kernel_state import (
    ROUTE_PROTOCOL,
    Address,
    FdbEntry,
    Link,
    Neighbour,
    Record,
    Route,
    Sysctl,
)
from backends.kernel_state import Vxlan as VxlanSettings
from subnet_lease.go_json import decode_options
from subnet_lease.lease import Family, Lease

OVERHEAD: Final[Mapping[Family, int]] = {4: 50, 6: 70}
"""Bytes that encapsulation adds: inner Ethernet 14, VXLAN 8, UDP 8, and an outer IPv4 (20) or IPv6 (40) header."""

MINIMUM_MTU: Final[Mapping[Family, int]] = {4: 68, 6: 1280}
"""Bytes that every link must carry (RFC 791, RFC 8200)."""

KERNEL_PORT: Final = 8472
"""What the kernel uses when no port is given (drivers/net/vxlan: vxlan_port), and so what flannel uses on Linux."""

_MAC = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}")


class VxlanOptions(BaseModel):
    """The configuration's Backend object, with flannel's keys and one of our own (TxChecksumOffload)."""

    model_config = ConfigDict(frozen=True)

    VNI: int = Field(1, ge=1, le=0xFFFFFF)
    Port: int = Field(0, ge=0, le=0xFFFF)
    MTU: int = Field(0, ge=0, le=65535)
    GBP: bool = False
    Learning: bool = False
    DirectRouting: bool = False
    TxChecksumOffload: Literal["auto", "on", "off"] = "auto"


class Vxlan:
    """flannel's default backend."""

    name: ClassVar[str] = "vxlan"
    needs: ClassVar[frozenset[str]] = frozenset({"vtep_mac"})

    def __init__(self, options: Mapping[str, Any]) -> None:
        try:
            self.options, self.unknown_options = decode_options(VxlanOptions, options)
        except ValueError as error:
            raise BackendError(f"vxlan backend: {error}") from error

    def device(self, family: Family) -> str:
        """flannel's device name: flannel.1 or flannel-v6.1."""
        return f"flannel.{self.options.VNI}" if family == 4 else f"flannel-v6.{self.options.VNI}"

    def mtu(self, underlay: Underlay, families: tuple[Family, ...]) -> int:
        overhead = max((OVERHEAD[family] for family in families), default=OVERHEAD[4])
        base = self.options.MTU or underlay.mtu
        if base > underlay.mtu:
            raise BackendError(
                f"vxlan backend: MTU {base} is more than {underlay.name}'s {underlay.mtu}, and the kernel makes no such"
                f" device; lower it, leave it out, or raise that of {underlay.name} on every node"
            )
        smallest = max((MINIMUM_MTU[family] for family in families), default=MINIMUM_MTU[4])
        if base - overhead < smallest:
            raise BackendError(
                f"an MTU of {base} leaves {base - overhead} inside VXLAN, less than the {smallest} that "
                f"IPv{max(families)} needs; raise the MTU of {underlay.name} or of the backend to {smallest + overhead}"
            )
        return base - overhead

    def published(self, host: Host) -> Published:
        # flanneld finds its own MAC by splitting this text, so the keys stand in this order and no other joins them.
        data = {
            family: {"VNI": self.options.VNI, "VtepMAC": _own_mac(host, family)}
            for family in (4, 6)
            if host.config.network_of(family)
        }
        return Published("vxlan", data.get(4), data.get(6))

    def accepts(self, peer: Lease) -> bool:
        return peer.attrs.backend_type == self.name

    def host_state(self, host: Host) -> Iterator[Record]:
        for family in host.families:
            device = self.device(family)
            yield Link(
                name=device,
                settings=VxlanSettings(
                    vni=self.options.VNI,
                    local=str(_local_address(host, family)),
                    underlay=host.underlay.name,
                    port=self.options.Port or KERNEL_PORT,
                    learning=self.options.Learning,
                    gbp=self.options.GBP,
                ),
                mtu=(self.options.MTU or host.underlay.mtu) - OVERHEAD[family],
                mac=_own_mac(host, family),
                tx_checksum={"auto": None, "on": True, "off": False}[self.options.TxChecksumOffload],
            )
            yield Sysctl(f"net/ipv6/conf/{device}/accept_ra", "0")
            subnet = host.subnets[family]
            yield Address(device, f"{subnet.network_address}/{subnet.max_prefixlen}")

    def peer_state(self, host: Host, peer: Lease) -> Iterable[Record]:
        return by_family(host, peer, lambda family: self._way_to(host, peer, family))

    def _way_to(self, host: Host, peer: Lease, family: Family) -> tuple[Record, ...]:
        subnet, public = peer.subnet_of(family), peer_address(host, peer, family)
        assert subnet is not None
        if self.options.DirectRouting and direct(host, peer, public):
            return (Route(str(subnet), host.underlay.name, via=str(public), protocol=ROUTE_PROTOCOL),)
        device, gateway = self.device(family), str(subnet.network_address)
        mac = self._peer_mac(host, peer, family)
        return (
            FdbEntry(device, mac, str(public), host.underlay.name if family in host.underlay.pinned else None),
            Neighbour(device, gateway, mac),
            Route(f"{gateway}/{subnet.prefixlen}", device, via=gateway, onlink=True),
        )

    def _peer_mac(self, host: Host, peer: Lease, family: Family) -> str:
        data = peer.attrs.backend_data_of(family)
        fields = {str(k).lower(): v for k, v in data.items()} if isinstance(data, dict) else {}
        vni, mac = fields.get("vni", self.options.VNI), fields.get("vtepmac")
        if vni != self.options.VNI:
            raise PeerRefused(f"lease {peer.cidr} is on VNI {vni}, this node on {self.options.VNI}")
        if not isinstance(mac, str) or not _MAC.fullmatch(mac.lower()):
            raise PeerRefused(f"lease {peer.cidr} publishes VtepMAC {mac!r}, which is not a MAC address")
        mac = mac.lower()
        if int(mac[:2], 16) & 1 or mac == "00:00:00:00:00:00":
            raise PeerRefused(f"lease {peer.cidr} publishes VtepMAC {mac}, which is no single device's address")
        if mac == _own_mac(host, family):
            raise PeerRefused(f"lease {peer.cidr} publishes VtepMAC {mac}, which is this node's own")
        return mac


def _own_mac(host: Host, family: Family) -> str:
    return host.facts["vtep_mac" if family == 4 else "vtep_mac_v6"]


def _local_address(host: Host, family: Family) -> object:
    try:
        return host.underlay.local[family]
    except KeyError:
        raise BackendError(
            f"interface {host.underlay.name} has no IPv{family} address to send tunnels from;"
            f" give it one, choose another with --iface, or turn EnableIPv{family} off"
        ) from None
