"""udp: a TUN device whose packets a process of ours carries in UDP, for kernels that offer no other tunnel.

The walk of a packet from a container here to 10.5.7.9 on a peer whose subnet is 10.5.7.0/24:

1. Route ``10.5.0.0/16 dev flannel0``: whatever is in the cluster's network and not on this host goes to the TUN.
2. The tunnel process reads it, looks the destination up among its peers (``UdpPeer``), and sends the bare IPv4 packet
   as the payload of one UDP datagram, from our port to the same port of the peer's public address.
3. The peer's tunnel process writes it to its own TUN, and that kernel routes it to the container.

Device, port and wire format are those of flannel's pkg/backend/udp, so both can share a network. IPv4 only, as there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Final

from pydantic import BaseModel, ConfigDict, Field

from backends.backend import BackendError, Host, PeerRefused, Published, Underlay, peer_address
from backends.kernel_state import Address, Link, Record, Route, Tun, UdpPeer
from subnet_lease.go_json import decode_options
from subnet_lease.lease import Family, Lease

OVERHEAD: Final = 28
"""Bytes that encapsulation adds: an outer IPv4 header (20) and a UDP header (8)."""

DEVICE: Final = "flannel0"


class UdpOptions(BaseModel):
    """The configuration's Backend object, with flannel's one key."""

    model_config = ConfigDict(frozen=True)

    Port: int = Field(8285, ge=1, le=0xFFFF)


class Udp:
    """flannel's oldest backend."""

    name: ClassVar[str] = "udp"
    needs: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, options: Mapping[str, Any]) -> None:
        try:
            self.options, self.unknown_options = decode_options(UdpOptions, options)
        except ValueError as error:
            raise BackendError(f"udp backend: {error}") from error

    def mtu(self, underlay: Underlay, families: tuple[Family, ...]) -> int:
        return underlay.mtu - OVERHEAD

    def published(self, host: Host) -> Published:
        """Nothing, not even the type: flannel's udp leases carry no BackendType."""
        _refuse_ipv6(host)
        return Published("")

    def accepts(self, peer: Lease) -> bool:
        """A reservation that no node has taken yet has no type either, and no address."""
        untaken = peer.reservation and peer.attrs.public_ip is None
        return peer.attrs.backend_type in ("", self.name) and not untaken

    def host_state(self, host: Host) -> Iterator[Record]:
        _refuse_ipv6(host)
        network, local = host.config.network_of(4), host.underlay.local.get(4)
        if local is None:
            raise BackendError(
                f"interface {host.underlay.name} has no IPv4 address to send tunnels from; "
                "give it one, or choose another with --iface"
            )
        if network is None or 4 not in host.subnets:
            return
        yield Link(
            name=DEVICE,
            settings=Tun(local=str(local), port=self.options.Port, underlay=host.underlay.name, network=str(network)),
            mtu=self.mtu(host.underlay, (4,)),
        )
        yield Address(DEVICE, f"{host.subnets[4].network_address}/32")
        yield Route(str(network), DEVICE)

    def peer_state(self, host: Host, peer: Lease) -> tuple[UdpPeer, ...]:
        """One tunnel peer. Its port is our own: flannel's leases do not carry one."""
        if peer.subnet is None:
            raise PeerRefused(f"lease {peer.cidr} has no IPv4 subnet, and udp carries IPv4 only")
        return (UdpPeer(DEVICE, str(peer.subnet), str(peer_address(host, peer, 4)), self.options.Port),)


def _refuse_ipv6(host: Host) -> None:
    if host.config.network_of(6) is not None:
        raise BackendError(
            "the udp backend carries IPv4 only; set EnableIPv6 to false in the network configuration, "
            "or use another backend, such as vxlan"
        )
