"""``flannelctl release``: take a subnet back from a node that is gone."""

from __future__ import annotations

import argparse

from flanneld.ctl.output import OK, Problem, duration, put


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    from flanneld.ctl.access import add_connection

    parser = commands.add_parser(
        "release",
        help="free the subnet of a node that is gone",
        description="Delete a lease. A lease that has not expired may belong to a node that runs: its deletion is "
        "refused without --force.",
        allow_abbrev=False,
    )
    parser.add_argument("subnet", metavar="SUBNET", help="as flannelctl leases shows it: 10.5.52.0/24")
    parser.add_argument("--force", action="store_true", help="also while the lease has not expired")
    add_connection(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from flanneld.ctl.access import open_access
    from flanneld.ctl.reserve import owner, parse_subnets

    v4, v6 = parse_subnets(arguments.subnet)
    with open_access(arguments) as access:
        found = [
            lease
            for lease in access.leases()
            if (v4 is not None and lease.subnet == v4) or (v6 is not None and lease.ipv6_subnet == v6)
        ]
        if not found:
            raise Problem(f"nobody leases {arguments.subnet}", "see who has what: flannelctl leases")
        for lease in found:
            # A node's daemon fills in its backend; a reservation that no node ever took has none.
            taken = not lease.reservation or lease.attrs.backend_type
            if taken and not lease.unreadable and not arguments.force:
                ttl = access.ttl(lease)
                until = f"for another {duration(ttl)}" if ttl is not None else "without expiry"
                raise Problem(
                    f"{arguments.subnet} is leased to {owner(lease)} {until}; if that node still runs, two nodes could"
                    " get the same subnet",
                    "stop flanneld there, then run this again with --force",
                )
            access.remove(lease)
            put(f"released {arguments.subnet}, which was leased to {owner(lease)}")
    return OK
