"""``flannelctl cleanup``: leave this host as if flanneld had never run here."""

from __future__ import annotations

import argparse
import os

from flanneld.ctl.output import FAILED, OK, Problem, put, put_json


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    from flanneld.ctl.access import add_connection
    from flanneld.ctl.node import add_node_arguments

    parser = commands.add_parser(
        "cleanup",
        help="remove what flanneld made on this host: devices, routes, rules, files (needs root)",
        description="Remove flanneld's devices, addresses, routes, firewall rules, subnet.env and status file from this "
        "host. Bridges and containers (cni0) belong to the container runtime and stay, and so do the empty chains that "
        "iptables makes when first used. The lease stays, too: flannelctl release.",
        allow_abbrev=False,
    )
    parser.add_argument("--force", action="store_true", help="also while flanneld runs (it will put all of it back)")
    parser.add_argument("--json", action="store_true", help="what was removed, as JSON")
    add_node_arguments(parser)
    add_connection(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from flanneld.ctl.access import options_of
    from flanneld.ctl.node import read_status

    if os.geteuid() != 0:
        raise Problem("cleanup needs root: it removes network devices", "run it with sudo")
    if not arguments.force:
        try:
            alive = bool(read_status(arguments).get("running"))
        except Problem:
            alive = False
        if alive:
            raise Problem(
                "flanneld runs on this host and would put everything back",
                "stop it first (systemctl stop flanneld), or use --force",
            )
    from flanneld.cleanup import CleanupError, cleanup
    from flanneld.dataplane.write import describe as in_words
    from flanneld.wanted import describe

    try:
        changes = cleanup(options_of(arguments))
    except CleanupError as error:
        raise Problem(f"something stays: {error}", "run it again; what was removed is gone already") from None
    if arguments.json:
        put_json([describe(change.record) for change in changes])
    else:
        for change in changes:
            put(in_words(change).replace("remove ", "removed ", 1))
        put(f"{len(changes)} things removed" if changes else "nothing of flanneld is on this host")
    return OK if all(change.op == "remove" for change in changes) else FAILED
