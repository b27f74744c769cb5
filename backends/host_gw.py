"""host-gw: no tunnel; every peer's subnet is a plain route through that peer's own address.

A packet for 10.5.52.7 leaves this host unchanged, addressed on the wire to the peer that holds 10.5.52.0/24, and that
peer forwards it to its container. So each peer must be on our link: a router in between would not know the way.

The routes stand on a device that is not ours, so they carry our reserved protocol number: by it a restarted daemon
knows its own from everybody else's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Final

from backends.backend import BackendError, Host, PeerRefused, Published, Underlay, by_family, on_link, peer_address
from backends.kernel_state import ROUTE_PROTOCOL, Record, Route
from subnet_lease.lease import FAMILIES, Family, Lease


class HostGw:
    """Routes on the underlay interface, one a peer and family."""

    name: ClassVar[str] = "host-gw"
    needs: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.unknown_options: Final = tuple(options)

    def mtu(self, underlay: Underlay, families: tuple[Family, ...]) -> int:
        return underlay.mtu

    def published(self, host: Host) -> Published:
        """Nothing but the type: a peer needs only our public address, which every lease has."""
        _refuse_translation(host)
        return Published(self.name)

    def accepts(self, peer: Lease) -> bool:
        return peer.attrs.backend_type == self.name

    def host_state(self, host: Host) -> tuple[Route, ...]:
        _refuse_translation(host)
        return ()

    def peer_state(self, host: Host, peer: Lease) -> tuple[Record, ...]:
        return by_family(host, peer, lambda family: (_route(host, peer, family),))


def _route(host: Host, peer: Lease, family: Family) -> Route:
    gateway = peer_address(host, peer, family)
    if not on_link(host, gateway):
        ours = ", ".join(str(prefix) for prefix in host.underlay.prefixes if prefix.version == family) or "nothing"
        raise PeerRefused(
            f"lease {peer.cidr}: its address {gateway} is not on the link of {host.underlay.name} ({ours}), and host-gw "
            "cannot route through a router; use vxlan (with DirectRouting for the peers that are on the link)"
        )
    return Route(dst=str(peer.subnet_of(family)), dev=host.underlay.name, via=str(gateway), protocol=ROUTE_PROTOCOL)


def _refuse_translation(host: Host) -> None:
    """Peers would route to an address that no interface of ours answers for."""
    for family in FAMILIES:
        local, public = host.underlay.local.get(family), host.underlay.public.get(family)
        if host.config.network_of(family) is not None and public != local:
            raise BackendError(
                f"the public IPv{family} address {public} is not the address {local} of {host.underlay.name} (NAT?), "
                "and host-gw sends to hosts on the same link only; drop --public-ip or use another backend, such as vxlan"
            )
