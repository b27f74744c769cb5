"""``flannelctl cleanup``: leave this host as if flanneld had never run here."""

from __future__ import annotations

import argparse
import contextlib
import os
from pathlib import Path

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

    if os.geteuid() != 0:
        raise Problem("cleanup needs root: it removes network devices", "run it with sudo")
    if not arguments.force:
        _refuse_while_running(arguments)
    options = options_of(arguments)
    # A person in a pod need not repeat the daemon's --kube-subnet-mgr.
    kubernetes = options.kube_subnet_mgr or "KUBERNETES_SERVICE_HOST" in os.environ
    kept = "" if kubernetes else _lease(options.subnet_file)
    from flanneld.cleanup import CleanupError, cleanup
    from flanneld.dataplane.write import describe as in_words
    from flanneld.options import DEFAULT_PREFIX
    from flanneld.wanted import describe

    try:
        changes = cleanup(options)
    except CleanupError as error:
        raise Problem(f"something stays: {error}", "run it again; what was removed is gone already") from None
    if arguments.json:
        put_json([describe(change.record) for change in changes])
    else:
        for change in changes:
            put(in_words(change).replace("remove ", "removed ", 1))
        put(f"{len(changes)} things removed" if changes else "nothing of this flanneld was left on this host")
        if kept:
            prefix = "" if options.etcd_prefix == DEFAULT_PREFIX else f" --etcd-prefix={options.etcd_prefix}"
            put(f"the lease {kept} stays in etcd: flannelctl release{prefix} {kept}")
    return OK if all(change.op == "remove" for change in changes) else FAILED


def _refuse_while_running(arguments: argparse.Namespace) -> None:
    """Problem if the daemon of this subnet file lives; without a file that was asked for, if any answers."""
    from flanneld.ctl.node import alive, other_daemon, read_status, subnet_file

    file = subnet_file(arguments)
    try:
        status = read_status(arguments)
    except Problem:
        status = {"subnet_file": file}
    if status.get("running") or alive(file, status):
        pid = f"pid {status['pid']}, " if status.get("pid") else ""
        raise Problem(
            f"flanneld runs on this host ({pid}{status.get('subnet_file') or file}) and would put everything back",
            "stop it first (systemctl stop flanneld), or use --force",
        )
    if not Path(file).exists() and (other := other_daemon(arguments)):
        raise Problem(
            f"there is no {file}, so nobody can tell this network's devices from those of another daemon ({other}) that"
            " runs on this host",
            "stop that one first, or use --force: it puts its own back",
        )


def _lease(file: str) -> str:
    """The subnets that this node leases, as ``flannelctl release`` takes them; "" where nothing tells."""
    from flanneld.ctl.node import read_file
    from flanneld.outputs import STATUS_FILE
    from subnet_lease import subnet_file

    status = read_file(Path(file).with_name(STATUS_FILE), file) or {}
    found = [status.get("subnet"), status.get("ipv6_subnet")]
    if not any(found):
        with contextlib.suppress(OSError, ValueError):
            content = subnet_file.read(Path(file))
            found = [content.subnet, content.ipv6_subnet] if content else []
    return ",".join(str(subnet) for subnet in found if subnet)
