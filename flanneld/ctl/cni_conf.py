"""``flannelctl cni-conf``: a CNI conflist with this node's subnet in it, for hosts that go without the plugin."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from cni import conflist
from flanneld.ctl.output import OK, Problem, put


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    from flanneld.options import DEFAULT_SUBNET_FILE

    parser = commands.add_parser(
        "cni-conf",
        help="render a CNI conflist with this node's subnet (no flannel plugin needed)",
        description="Render a CNI network configuration in which the bridge plugin gets this node's subnet directly, so "
        "that the runtime needs no flannel plugin. Run it again when the subnet changes, or let flanneld do it: "
        "flanneld --cni-conf=PATH.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--subnet-file",
        default=os.environ.get("FLANNELD_SUBNET_FILE") or DEFAULT_SUBNET_FILE,
        metavar="FILE",
        help=f"the daemon's subnet file (default: {DEFAULT_SUBNET_FILE})",
    )
    parser.add_argument(
        "--template",
        metavar="FILE",
        help="a conflist that has a plugin of type flannel, e.g. /etc/cni/net.d/10-flannel.conflist "
        "(default: the one of kube-flannel)",
    )
    parser.add_argument(
        "--output", metavar="FILE", help="put it there, atomically, and only if it changed (default: standard output)"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    try:
        Path(arguments.subnet_file).read_bytes()  # in fewer words than the plugin's, which are flannel's
        template = Path(arguments.template).read_text(encoding="utf-8") if arguments.template else None
        text = conflist.render_conflist(arguments.subnet_file, template)
    except OSError as error:
        if isinstance(error, PermissionError):
            remedy = "run it with sudo"
        else:
            remedy = (
                "start flanneld first, or name its --subnet-file" if error.filename == arguments.subnet_file else ""
            )
        raise Problem(f"cannot read {error.filename}: {error.strerror}", remedy) from None
    except ValueError as error:
        raise Problem(str(error), "start flanneld first, or name its --subnet-file") from None
    if not arguments.output:
        put(text.rstrip("\n"))
        return OK
    try:
        written = conflist.write_conflist(arguments.output, text)
    except OSError as error:
        raise Problem(f"cannot write {arguments.output}: {error.strerror}", "run it with sudo") from None
    put(f"{arguments.output}: {'written' if written else 'unchanged'}")
    return OK


def write_conflist(path: Path, subnet_file: Path) -> bool:
    """For the daemon: render from the subnet file, put it in place; false where nothing changed."""
    return conflist.write_conflist(path, conflist.render_conflist(subnet_file))
