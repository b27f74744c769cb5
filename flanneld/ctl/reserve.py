"""``flannelctl reserve``: a subnet that stays its node's for ever."""

from __future__ import annotations

import argparse
import dataclasses
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import TYPE_CHECKING

from flanneld.ctl.output import OK, USAGE, Problem, note, put

if TYPE_CHECKING:
    from subnet_lease.lease import Lease
    from subnet_lease.network_config import NetworkConfig


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    from flanneld.ctl.access import add_connection

    parser = commands.add_parser(
        "reserve",
        help="give a node a subnet that never expires",
        description="Write a lease without expiry. The node that it names gets this subnet when flanneld starts there "
        "and has no other lease, and keeps it. It may be larger or smaller than SubnetLen. A subnet that the node already "
        "leases becomes a reservation as it is.",
        allow_abbrev=False,
    )
    parser.add_argument("subnet", metavar="SUBNET", help="10.5.52.0/24; dual-stack: 10.5.52.0/24,fc00:0:0:34::/64")
    parser.add_argument("--public-ip", metavar="IP", dest="for_ip", help="the node's public IP address")
    parser.add_argument("--node", metavar="NAME", help="the node's name")
    add_connection(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from flanneld.ctl.access import open_access
    from subnet_lease.allocation import overlapping
    from subnet_lease.lease import Lease, LeaseAttrs, NodeIdentity

    subnets = parse_subnets(arguments.subnet)
    if not arguments.for_ip and not arguments.node:
        raise Problem("for whom?", "add --public-ip IP or --node NAME, or both", USAGE)
    address = _address(arguments.for_ip) if arguments.for_ip else None
    with open_access(arguments) as access:
        from flanneld.ctl.config import understood

        text, _ = access.config_text()
        check(subnets, understood(text, access.config_name))
        attrs = LeaseAttrs(
            public_ip=address if isinstance(address, IPv4Address) else None,
            public_ipv6=address if isinstance(address, IPv6Address) else None,
            node=NodeIdentity(arguments.node) if arguments.node else None,
        )
        lease = Lease(*subnets, attrs, reservation=True)
        leases = access.leases()
        for other in overlapping(leases, subnets):
            lease = adopt(lease, other)
        access.reserve(lease)
        put(f"reserved {lease.cidr} for {owner(lease)}")
        for other in leases:
            if other.key != lease.key and same_node(lease, other):
                note(
                    "note",
                    f"{owner(other)} has {other.cidr} already and keeps that; to move it, drain"
                    " the node, stop flanneld there, release that subnet, and start flanneld",
                )
    return OK


def parse_subnets(text: str) -> tuple[IPv4Network | None, IPv6Network | None]:
    """One subnet of a family, or one of each, separated by a comma. Problem (usage) otherwise."""
    found: dict[int, IPv4Network | IPv6Network] = {}
    for part in text.replace("&", ",").split(","):
        # The store's own spelling of a key is understood, too.
        spelled = part.strip() if "/" in part else "/".join(part.strip().rsplit("-", 1))
        try:
            network = ip_network(spelled)
            if "/" not in spelled:  # ip_network takes it for one address
                raise ValueError("it has no prefix length")
        except ValueError as error:
            raise Problem(f"{part!r}: {error}", "write a subnet such as 10.5.52.0/24", USAGE) from None
        if network.version in found:
            raise Problem(f"{text!r} has two IPv{network.version} subnets", "a lease has one of each family", USAGE)
        found[network.version] = network
    v4, v6 = found.get(4), found.get(6)
    return v4 if isinstance(v4, IPv4Network) else None, v6 if isinstance(v6, IPv6Network) else None


def check(subnets: tuple[IPv4Network | None, IPv6Network | None], config: NetworkConfig) -> None:
    """Whether they may be leased here, of whatever size; Problem says why not."""
    for family, subnet, longest in ((4, subnets[0], 30), (6, subnets[1], 126)):
        network = config.network_of(family)
        if subnet is None and network is not None:
            raise Problem(f"the network has IPv{family} ({network}), but no IPv{family} subnet is given")
        if subnet is None:
            continue
        if network is None:
            raise Problem(f"the network has no IPv{family}", "leave that subnet out")
        if subnet.version != network.version or not subnet.subnet_of(network):  # type: ignore[arg-type]
            raise Problem(f"{subnet} lies outside the network {network}", "choose one inside it")
        if subnet.prefixlen > longest:
            raise Problem(f"{subnet} has no room for containers", f"choose one of at most /{longest}")
        low, high = config.subnet_range_of(family)
        if low is None or high is None:
            continue
        first, last = subnet.network_address, subnet.broadcast_address
        if first < low.network_address or last > high.broadcast_address:  # type: ignore[operator]
            raise Problem(
                f"{subnet} lies outside what this network hands out: {low} to {high}",
                "choose one inside it, or change SubnetMin and SubnetMax (flannelctl config set)",
            )


def same_node(wanted: Lease, other: Lease) -> bool:
    """Whether both are one node's by what is known of it, name or address, and nothing contradicts."""
    same_name = wanted.attrs.node and other.attrs.node and wanted.attrs.node.name == other.attrs.node.name
    mine = wanted.attrs.public_ip or wanted.attrs.public_ipv6
    same_ip = mine is not None and mine in (other.attrs.public_ip, other.attrs.public_ipv6)
    contradicts = (mine is not None and not same_ip) or (wanted.attrs.node and other.attrs.node and not same_name)
    return bool(same_name or same_ip) and not contradicts


def adopt(wanted: Lease, other: Lease) -> Lease:
    """The lease to write where ``other`` stands: its own, made permanent, if it is the same node's. Problem if not."""
    if other.key != wanted.key or not same_node(wanted, other):
        raise Problem(
            f"{other.cidr} belongs to {owner(other)}",
            f"choose another subnet, or free it: flannelctl release {other.cidr}",
        )
    return dataclasses.replace(other, reservation=True)


def owner(lease: Lease) -> str:
    """The node in words: name and address, as far as they are known."""
    if lease.unreadable:
        return "an unknown node (its value cannot be read)"
    name = f"node {lease.attrs.node.name}" if lease.attrs.node and lease.attrs.node.name else ""
    address = lease.attrs.public_ip or lease.attrs.public_ipv6
    if name and address:
        return f"{name} ({address})"
    return name or (f"the node at {address}" if address else "a node without name and address")


def _address(text: str) -> IPv4Address | IPv6Address:
    try:
        return ip_address(text)
    except ValueError:
        raise Problem(f"--public-ip {text}: not an IP address", "write one such as 192.0.2.10", USAGE) from None
