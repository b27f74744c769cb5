"""TCP throughput and round trips of each backend, beside the plain underlay and a VXLAN device made by hand.

    sudo .venv/bin/python -m flanneld.lab.bench_throughput [SECONDS] [ROUNDS]

Two hosts on one machine; all variants are measured in turns in one run, so that their ratios mean something.
"""

from __future__ import annotations

import random
import statistics
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

from flanneld.lab.containers import Container
from flanneld.lab.hosts import Lab
from flanneld.lab.netns import Namespace
from flanneld.lab.ping import ping
from flanneld.lab.throughput import iperf3
from flanneld.lab.wait import wait_until

BACKENDS: dict[str, dict[str, Any]] = {
    "vxlan": {"Type": "vxlan"},
    "vxlan DirectRouting": {"Type": "vxlan", "DirectRouting": True},
    "host-gw": {"Type": "host-gw"},
    "udp": {"Type": "udp"},
    "wireguard": {"Type": "wireguard"},
}


@dataclass(frozen=True, slots=True)
class Row:
    """Median TCP throughput in bit/s and median round trip in microseconds."""

    what: str
    rate: float
    rtt: float


@dataclass(frozen=True, slots=True)
class Path:
    """From where to where; both ends answer pings and run iperf3."""

    what: str
    client: Namespace
    server: Namespace
    address: str


def manual_vxlan(lab: Lab) -> Path:
    """The kernel's own VXLAN between the same two hosts, set up by ip(8), with a routed address at each end."""
    macs = ("02:11:00:00:00:01", "02:11:00:00:00:02")
    for number, host in enumerate(lab.hosts):
        other = 1 - number
        peer = lab.hosts[other]
        lines = (
            f"link add manual0 type vxlan id 4000 dstport 4790 local {host.address} dev eth0 nolearning",
            f"link set manual0 address {macs[number]} mtu 1450 up",
            f"addr add 10.99.{number}.0/32 dev manual0",
            f"neigh add 10.99.{other}.0 lladdr {macs[other]} dev manual0 nud permanent",
            f"route add 10.99.{other}.0/24 via 10.99.{other}.0 dev manual0 onlink",
        )
        host.run("ip -batch -", stdin="\n".join(lines))
        host.run(f"bridge fdb add {macs[other]} dev manual0 dst {peer.address} self permanent")
    return Path("VXLAN device by hand", lab.hosts[0].ns, lab.hosts[1].ns, "10.99.1.0")


def measure_paths(paths: list[Path], seconds: float, rounds: int) -> list[Row]:
    """In turns and in another order each time, so that what disturbs the machine disturbs all."""
    rates: dict[str, list[float]] = {path.what: [] for path in paths}
    for _ in range(rounds):
        for path in random.sample(paths, len(paths)):
            rates[path.what].append(iperf3(path.client, path.server, path.address, seconds=seconds))
    rows = []
    for path in paths:
        answer = ping(path.client, path.address, count=200, interval=0.005)
        assert answer.rtt_avg is not None, f"{path.what}: no answer"
        rows.append(Row(path.what, statistics.median(rates[path.what]), answer.rtt_avg * 1000))
    return rows


def between_hosts(seconds: float = 1.5, rounds: int = 15) -> list[Row]:
    """The overlay from host to host beside a VXLAN device made by hand, on the same two hosts."""
    with Lab(hosts=2) as lab:
        lab.set_config({"Network": "10.5.0.0/16", "Backend": {"Type": "vxlan"}})
        lab.start_daemons()
        lab.wait_peers()
        base = lab.hosts[1].daemon.subnet_env()["FLANNEL_SUBNET"].rsplit(".", 1)[0] + ".0"
        paths = [
            Path("underlay", lab.hosts[0].ns, lab.hosts[1].ns, lab.hosts[1].address),
            manual_vxlan(lab),
            Path("flanneld, vxlan", lab.hosts[0].ns, lab.hosts[1].ns, base),
        ]
        return measure_paths(paths, seconds, rounds)


def between_containers(seconds: float = 3, rounds: int = 3) -> list[Row]:
    """Container to container through each backend, one lab after the other, each beside its own underlay."""
    rows: list[Row] = []
    for name, backend in BACKENDS.items():
        with ExitStack() as stack:
            lab = stack.enter_context(Lab(hosts=2))
            lab.set_config({"Network": "10.5.0.0/16", "Backend": backend})
            lab.start_daemons()
            here, there = (host.container("c") for host in lab.hosts)
            wait_until(partial(_answers, here, there), 20, f"{name}: a ping")
            paths = [
                Path(f"underlay (beside {name})", lab.hosts[0].ns, lab.hosts[1].ns, lab.hosts[1].address),
                Path(name, here.ns, there.ns, there.address),
            ]
            rows += measure_paths(paths, seconds, rounds)
    return rows


def _answers(here: Container, there: Container) -> bool:
    return here.ping(there).ok


def show(rows: list[Row]) -> str:
    width = max(len(row.what) for row in rows)
    return "\n".join(f"{r.what:<{width}}  {r.rate / 1e9:6.2f} Gbit/s  {r.rtt:7.0f} µs" for r in rows)


def main() -> None:
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 3
    rounds = int(sys.argv[2]) if len(sys.argv) > 2 else 3
    print(show(between_hosts(seconds, rounds)))
    print(show(between_containers(seconds, rounds)))


if __name__ == "__main__":
    main()
