"""``flannelctl release``: take a subnet back from a node that is gone."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from flanneld.ctl.output import OK, Problem, duration, put

if TYPE_CHECKING:
    from flanneld.ctl.access import Access
    from subnet_lease.lease import Lease


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    from flanneld.ctl.access import add_connection

    parser = commands.add_parser(
        "release",
        help="free the subnet of a node that is gone",
        description="Delete a lease. Refused without --force while its node shows that it runs, and for a lease that a "
        "plain flannel wrote, whose nodes never show it.",
        allow_abbrev=False,
    )
    parser.add_argument("subnet", metavar="SUBNET", help="as flannelctl leases shows it: 10.5.52.0/24")
    parser.add_argument("--force", action="store_true", help="also if its node runs, or may run")
    add_connection(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from flanneld.ctl.access import open_access
    from flanneld.ctl.reserve import owner, parse_subnets
    from subnet_lease.lease import cidr

    v4, v6 = parse_subnets(arguments.subnet)
    with open_access(arguments) as access:
        found = [
            lease
            for lease in access.leases()
            if (v4 is not None and lease.subnet == v4) or (v6 is not None and lease.ipv6_subnet == v6)
        ]
        if not found:
            raise Problem(f"nobody leases {cidr(v4, v6)}", "see who has what: flannelctl leases")
        for lease in found:
            if not arguments.force:
                check(access, lease, lease.cidr)
            access.remove(lease)
            put(f"released {lease.cidr}, which was leased to {owner(lease)}")
    return OK


def check(access: Access, lease: Lease, subnet: str) -> None:
    """Whether the lease's node is known not to run; Problem says why not. Two nodes must not get one subnet."""
    from flanneld.ctl.reserve import owner
    from subnet_lease.store import AccessDenied

    try:
        alive = access.lives(lease)
    except AccessDenied as error:
        raise Problem(
            f"nobody can tell whether {owner(lease)}, which leases {subnet}, still runs: {error}",
            "grant this etcd user that key, or stop flanneld there and run this again with --force",
        ) from None
    if alive:
        raise Problem(
            f"{subnet} is leased to {owner(lease)}, which runs: it gave a sign of life within the last 30 s",
            "stop flanneld there, then run this again (after a crash, half a minute later)",
        )
    # A reservation that no node ever took has no backend: a node's daemon fills that in.
    if lease.attrs.node is not None or lease.unreadable or (lease.reservation and not lease.attrs.backend_type):
        return
    ttl = access.ttl(lease)
    until = f"for another {duration(ttl)}" if ttl is not None else "without expiry"
    raise Problem(
        f"{subnet} is leased to {owner(lease)} {until}. A plain flannel wrote that lease and gives no sign of life, so"
        " that node may run, and two nodes could get the same subnet",
        "make sure that flanneld has stopped there, then run this again with --force",
    )
