"""``flannelctl demo``: several hosts on this machine, and what happens to them."""

from __future__ import annotations

import argparse
from pathlib import Path

from flanneld.ctl.output import OK, Problem, put


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "demo",
        help="try it here: hosts as namespaces, a real etcd, real traffic (needs root)",
        description="Start an etcd and several hosts as network namespaces with flanneld on each, show that their "
        "containers reach each other, damage one host under a running ping, and clean up.",
        allow_abbrev=False,
    )
    parser.add_argument("--hosts", type=int, default=3, metavar="N", help="how many hosts (default: 3)")
    parser.add_argument(
        "--subnet", default="10.5.0.0/16", metavar="CIDR", help="the cluster network (default: 10.5.0.0/16)"
    )
    parser.add_argument("--nftables", action="store_true", help="firewall rules by nftables instead of iptables")
    parser.add_argument("--keep", action="store_true", help="leave it running, and say how to look around in it")
    parser.add_argument("--remove", metavar="DIRECTORY", help="remove a demo that was left running by --keep")
    parser.add_argument("--save-svg", metavar="FILE", help=argparse.SUPPRESS)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    if arguments.remove:
        return _remove(Path(arguments.remove))
    from flanneld.lab.demo import CannotRun, DemoOptions, run_demo

    options = DemoOptions(
        arguments.hosts, arguments.subnet, arguments.nftables, arguments.keep, save_svg=arguments.save_svg
    )
    try:
        return run_demo(options)
    except CannotRun as error:
        raise Problem(str(error)) from None


def _remove(directory: Path) -> int:
    from flanneld.lab.leave import remove

    try:
        put(f"removed: {remove(directory)} namespaces, their processes and files")
    except OSError as error:
        raise Problem(str(error), "give the directory that the demo printed with --keep") from None
    return OK
