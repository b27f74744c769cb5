"""``flannelctl doctor``: which peers can be reached, and where the path to the others ends.

For each peer two questions: does its underlay address answer a ping, and does the address of its overlay device,
through the tunnel? An underlay that works and a tunnel that does not is nearly always a firewall in between that drops
the tunnel's UDP port (field problem 46). A node that is not ready itself blames no peer.
"""

from __future__ import annotations

import argparse
import shutil
import socket
import subprocess
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from flanneld.ctl.output import FAILED, OK, Problem, console, put, put_json, table

if TYPE_CHECKING:
    from subnet_lease.lease import Lease
    from subnet_lease.network_config import NetworkConfig

TUNNELS = {"vxlan": "Port", "udp": "Port", "wireguard": "ListenPort"}
"""Backends whose device carries the first address of the subnet, and the option that names their UDP port."""


@dataclass(frozen=True, slots=True)
class Finding:
    """``underlay`` and ``overlay`` say whether a ping was answered; None: not asked."""

    node: str
    subnet: str
    public_ip: str
    underlay: bool
    overlay: bool | None
    verdict: str

    @property
    def good(self) -> bool:
        # Some networks drop pings to hosts and let the tunnel pass.
        return self.overlay if self.overlay is not None else self.underlay


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    from flanneld.ctl.access import add_connection
    from flanneld.ctl.node import add_node_arguments

    parser = commands.add_parser(
        "doctor",
        help="try the path to every peer, underlay and tunnel",
        description="Ping every peer's address on the underlay, and its overlay device through the tunnel. Run it on a "
        "node. Exit code 1 if a peer cannot be reached, or this node is not ready.",
        allow_abbrev=False,
    )
    parser.add_argument("--json", action="store_true", help="the findings as JSON")
    add_node_arguments(parser)
    add_connection(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from flanneld.ctl.access import open_access
    from flanneld.ctl.config import understood
    from flanneld.ctl.leases import order
    from flanneld.ctl.node import read_status

    status = read_status(arguments)
    if reasons := unfit(status, {name for _, name in socket.if_nameindex()}):
        raise Problem(f"this node is not ready: {'; '.join(reasons)}", "see flannelctl status")
    if shutil.which("ping") is None:
        raise Problem(
            "there is no ping on this host, so no path can be tried", "on Debian: apt-get install iputils-ping"
        )
    with open_access(arguments) as access:
        text, _ = access.config_text()
        config = understood(text, access.config_name, etcd=access.allocates)
        leases = sorted(access.leases(), key=order)
    # A reservation that no node has taken yet has no address, and nobody to be reached.
    peers = [
        lease for lease in leases if not _own(lease, status) and (lease.attrs.public_ip or lease.attrs.public_ipv6)
    ]
    with ThreadPoolExecutor(16) as pool:
        running = status.get("backend") or config.backend_type
        port = tunnel_port(config) if running == config.backend_type else None
        findings = list(pool.map(lambda lease: examine(lease, running, port, answers_ping), peers))
    if arguments.json:
        put_json([asdict(finding) for finding in findings])
    elif findings:
        columns = ("NODE", "SUBNET", "PUBLIC IP", "VERDICT")
        console().print(table(columns, [(f.node, f.subnet, f.public_ip, f.verdict) for f in findings]))
    else:
        put("no peers: no other node has a lease")
    return OK if all(finding.good for finding in findings) else FAILED


def unfit(status: dict[str, Any], here: Collection[str]) -> list[str]:
    """Why no peer can be judged from this node, whose devices are ``here``; empty where one can."""
    if status.get("unheard") == "hangs":
        return [f"flanneld {status['problem']}"]
    if not status.get("running"):
        return ["flanneld does not run here"]
    if not status.get("ready"):
        # What follows a reason's first line, flannelctl status shows.
        reasons = [str(reason).partition("\n")[0] for reason in status.get("reasons") or ()]
        return reasons or ["flanneld has only just started"]
    return [f"device {name} is missing here" for name in status.get("devices") or () if name not in here]


def tunnel_port(config: NetworkConfig) -> int | None:
    """The UDP port of the configuration's backend; None where it has none."""
    from backends.registry import backend_class
    from backends.vxlan import KERNEL_PORT

    if config.backend_type not in TUNNELS:
        return None
    backend = backend_class(config.backend_type)(config.backend_options)
    port: int = getattr(backend.options, TUNNELS[config.backend_type])  # type: ignore[attr-defined]  # those have them
    return port or KERNEL_PORT  # only vxlan leaves the choice to the kernel


def examine(lease: Lease, backend: str, port: int | None, answers: Callable[[str], bool]) -> Finding:
    """Both questions about one peer, and what the answers mean. ``answers`` pings an address.

    ``backend`` is the one that runs; ``port`` its UDP port, None where the stored configuration speaks of another.
    """
    address = str(lease.attrs.public_ip or lease.attrs.public_ipv6)
    node = lease.attrs.node.name if lease.attrs.node and lease.attrs.node.name else address
    subnet = lease.subnet or lease.ipv6_subnet
    assert subnet is not None
    underlay = answers(address)
    overlay = answers(str(subnet.network_address)) if backend in TUNNELS else None
    if overlay:
        verdict = "good" if underlay else "good (its underlay address does not answer pings)"
    elif not underlay:
        verdict = f"underlay dead: {address} does not answer; is {node} up, and is there a route to it?"
    elif overlay is None:
        verdict = f"underlay good; {backend} {'carries no packets' if backend == 'alloc' else 'has no tunnel test'}"
    else:
        door = f"UDP {port}" if port else f"the UDP port of {backend}"
        verdict = (
            f"underlay good, {door} dead to {node}: let {door} pass in both directions, "
            f"and see flannelctl status on {node}"
        )
    return Finding(node, str(subnet), address, underlay, overlay, verdict)


def _own(lease: Lease, status: dict[str, Any]) -> bool:
    return status.get("subnet") == str(lease.subnet) or (
        lease.subnet is None and status.get("ipv6_subnet") == str(lease.ipv6_subnet)
    )


def answers_ping(address: str) -> bool:
    """Whether one of two pings is answered within a second each."""
    argv = ["ping", "-n", "-c", "2", "-i", "0.3", "-W", "1", address]
    try:
        return subprocess.run(argv, capture_output=True, timeout=10, check=False).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False
