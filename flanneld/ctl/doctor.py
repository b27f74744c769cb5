"""``flannelctl doctor``: which peers can be reached, and where the path to the others ends.

For each peer two questions: does its underlay address answer a ping, and does the address of its overlay device,
through the tunnel? An underlay that works and a tunnel that does not is nearly always a firewall in between that drops
the tunnel's UDP port (field problem 46).
"""

from __future__ import annotations

import argparse
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from flanneld.ctl.output import FAILED, OK, console, put, put_json, table

if TYPE_CHECKING:
    from subnet_lease.lease import Lease
    from subnet_lease.network_config import NetworkConfig

PORTS = {"vxlan": ("Port", 8472), "udp": ("Port", 8285), "wireguard": ("ListenPort", 51820)}
"""Backends whose device carries the first address of the subnet, the option that names their UDP port, its default."""


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
        "node. Exit code 1 if a peer cannot be reached.",
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
    with open_access(arguments) as access:
        text, _ = access.config_text()
        config = understood(text, access.config_name, etcd=access.allocates)
        leases = sorted(access.leases(), key=order)
    # A reservation that no node has taken yet has no address, and nobody to be reached.
    peers = [
        lease for lease in leases if not _own(lease, status) and (lease.attrs.public_ip or lease.attrs.public_ipv6)
    ]
    with ThreadPoolExecutor(16) as pool:
        findings = list(pool.map(lambda lease: examine(lease, config, answers_ping), peers))
    if arguments.json:
        put_json([asdict(finding) for finding in findings])
    elif findings:
        columns = ("NODE", "SUBNET", "PUBLIC IP", "VERDICT")
        console().print(table(columns, [(f.node, f.subnet, f.public_ip, f.verdict) for f in findings]))
    else:
        put("no peers: no other node has a lease")
    return OK if all(finding.good for finding in findings) else FAILED


def examine(lease: Lease, config: NetworkConfig, answers: Callable[[str], bool]) -> Finding:
    """Both questions about one peer, and what the answers mean. ``answers`` pings an address."""
    address = str(lease.attrs.public_ip or lease.attrs.public_ipv6)
    node = lease.attrs.node.name if lease.attrs.node and lease.attrs.node.name else address
    subnet = lease.subnet or lease.ipv6_subnet
    assert subnet is not None
    underlay = answers(address)
    overlay: bool | None = None
    tunnel = PORTS.get(config.backend_type)
    if tunnel is not None:
        overlay = answers(str(subnet.network_address))
    return Finding(node, str(subnet), address, underlay, overlay, _verdict(node, address, underlay, overlay, config))


def _verdict(node: str, address: str, underlay: bool, overlay: bool | None, config: NetworkConfig) -> str:
    if overlay or (overlay is None and underlay):
        return "good" if underlay else "good (its underlay address does not answer pings)"
    if not underlay:
        return f"underlay dead: {address} does not answer; is {node} up, and is there a route to it?"
    option, default = PORTS[config.backend_type]
    port = config.backend_options.get(option) or default
    return (
        f"underlay good, UDP {port} dead to {node}: let UDP {port} pass in both directions, "
        f"and see flannelctl status on {node}"
    )


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
