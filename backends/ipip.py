"""ipip: each packet wrapped in one more IPv4 header (RFC 2003), the cheapest tunnel there is; IPv4 only.

The walk of a packet from a container here to 10.5.7.9 on a peer whose subnet is 10.5.7.0/24:

1. Route ``10.5.7.0/24 via <PublicIP> dev flannel.ipip onlink``: the next hop is the peer's own address, though no
   such address lies on the device's link (hence onlink).
2. The device has no remote of its own, so it takes the route's next hop as the outer destination and its fixed local
   address as the outer source.
3. The peer's kernel finds its device by the outer addresses, unwraps the packet and routes it to the container.

Step 3 is why the device has a fixed local address: when the module is loaded, the kernel makes ``tunl0`` in every
network namespace, with neither local nor remote, and a second such device could not be made. The kernel prefers the
more precise match, so ``tunl0`` is left to whoever uses it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from ipaddress import IPv4Address
from typing import Any, ClassVar, Final

from pydantic import BaseModel, ConfigDict

from backends.backend import BackendError, Host, PeerRefused, Published, Underlay, direct, peer_address
from backends.kernel_state import ROUTE_PROTOCOL, Address, Link, Record, Route
from backends.kernel_state import Ipip as IpipSettings
from subnet_lease.go_json import decode_options
from subnet_lease.lease import Family, Lease

DEVICE: Final = "flannel.ipip"

OVERHEAD: Final = 20
"""Bytes of an IPv4 header without options."""

MINIMUM_MTU: Final = 68
"""RFC 791."""


class IpipOptions(BaseModel):
    """The configuration's Backend object, with flannel's key."""

    model_config = ConfigDict(frozen=True)

    DirectRouting: bool = False


class Ipip:
    """One device; one route a peer, through it or (DirectRouting, peer on the link) past it."""

    name: ClassVar[str] = "ipip"
    needs: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, options: Mapping[str, Any]) -> None:
        try:
            self.options, self.unknown_options = decode_options(IpipOptions, options)
        except ValueError as error:
            raise BackendError(f"ipip backend: {error}") from error

    def mtu(self, underlay: Underlay, families: tuple[Family, ...]) -> int:
        if underlay.mtu - OVERHEAD < MINIMUM_MTU:
            raise BackendError(
                f"the MTU {underlay.mtu} of {underlay.name} leaves {underlay.mtu - OVERHEAD} inside ipip, less than "
                f"the {MINIMUM_MTU} that IPv4 needs; raise it to {MINIMUM_MTU + OVERHEAD} or more"
            )
        return underlay.mtu - OVERHEAD

    def published(self, host: Host) -> Published:
        """Nothing but the type: a peer needs only our public address, which every lease has."""
        _local(host)
        return Published(self.name)

    def accepts(self, peer: Lease) -> bool:
        return peer.attrs.backend_type == self.name

    def host_state(self, host: Host) -> Iterator[Record]:
        # The kernel looks for routes over the underlay alone (ip_tunnel.c: flowi4_oif), and none leads out of loopback.
        settings = IpipSettings(str(_local(host)), "" if host.underlay.loopback else host.underlay.name)
        yield Link(name=DEVICE, settings=settings, mtu=self.mtu(host.underlay, host.families))
        if 4 in host.subnets:
            yield Address(DEVICE, f"{host.subnets[4].network_address}/32")

    def peer_state(self, host: Host, peer: Lease) -> tuple[Route, ...]:
        if peer.subnet is None:
            raise PeerRefused(f"lease {peer.cidr} has no IPv4 subnet, and ipip carries IPv4 only")
        public = peer_address(host, peer, 4)
        if self.options.DirectRouting and direct(host, peer, public):
            return (Route(str(peer.subnet), host.underlay.name, via=str(public), protocol=ROUTE_PROTOCOL),)
        return (Route(str(peer.subnet), DEVICE, via=str(public), onlink=True),)


def _local(host: Host) -> IPv4Address:
    if host.config.network_of(4) is None or host.config.network_of(6) is not None:
        raise BackendError("ipip carries IPv4 only; turn EnableIPv6 off and EnableIPv4 on, or use vxlan or wireguard")
    local = host.underlay.local.get(4)
    if not isinstance(local, IPv4Address):
        raise BackendError(
            f"interface {host.underlay.name} has no IPv4 address to send tunnels from; "
            "give it one, or choose another with --iface"
        )
    return local
