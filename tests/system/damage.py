"""What people, programs and mishaps do to a host's overlay: one of each kind of record removed, altered, or too many.

A damage is a name and what is done to a host. Shell commands are written for one family; words in braces are filled in.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterable, Iterator
from functools import partial

from flanneld.lab.hosts import Host
from flanneld.lab.netns import run
from tests.system.backend_cases import GATEWAYS, Case

Damage = Callable[[Host], object]

STRAY = {
    4: {"address": "10.5.251.1/32", "subnet": "10.5.250.0/24", "vtep": "10.5.250.0", "remote": "172.30.0.77"},
    6: {
        "address": "fd05:0:0:251::1/128",
        "subnet": "fd05:0:0:250::/64",
        "vtep": "fd05:0:0:250::",
        "remote": "fd30::77",
    },
}

DEVICE = {
    "the device deleted": "ip link del {dev}",
    "the device set down": "ip link set {dev} down",
    "the device down and up": "ip link set {dev} down; ip link set {dev} up",
    "its MTU changed": "ip link set {dev} mtu 1300",
    "its address removed": "ip -{family} addr flush dev {dev} scope global",
    "a stray address": "ip addr add {address} dev {dev}",
    "a route removed": "ip route del $({routes}) dev {dev}",
    "a route sent elsewhere": "ip route replace $({routes}) via {gateway} dev eth0",
    "a stray route": "ip route add {subnet} dev {dev}",
}
ROUTES = "ip -{family} route show dev {dev} | awk '!/proto kernel/ {{print $1; exit}}'"

DIRECT = {
    "a direct route removed": "ip route del $({direct_routes})",
    "a direct route altered": "ip route replace $({direct_routes}) via {gateway} dev eth0 proto 241",
    "a direct route taken over": "ip route replace $({direct_routes}) via {gateway} dev eth0 proto static",
    "a stray direct route": "ip route add {subnet} via {gateway} dev eth0 proto 241",
}
DIRECT_ROUTES = "ip -{family} route show proto 241 | awk '{{print $1; exit}}'"

VTEP = {
    "its MAC changed": "ip link set {dev} address 02:00:00:00:55:55",
    "a stray neighbour": "ip neigh add {vtep} lladdr 02:00:00:00:77:77 dev {dev} nud permanent",
    "a stray FDB entry": "bridge fdb add 02:00:00:00:77:77 dev {dev} dst {remote} self permanent",
}
PEERS = {
    "a neighbour removed": "ip neigh del $({neighbours}) dev {dev}",
    "a neighbour altered": "ip neigh replace $({neighbours}) lladdr 02:00:00:00:99:99 dev {dev} nud permanent",
    "an FDB entry removed": "bridge fdb del $({macs}) dev {dev}",
    "an FDB entry altered": "bridge fdb replace $({macs}) dev {dev} dst {remote} self permanent",
}
NEIGHBOURS = "ip neigh show dev {dev} nud permanent | awk '{{print $1; exit}}'"
MACS = "bridge fdb show dev {dev} | awk '/ dst / {{print $1; exit}}'"

BLACKHOLE = {
    "the blackhole removed": "ip -{family} route del blackhole {network} proto 241 metric 4096",
}

IPTABLES = {
    "the rules flushed": "{iptables} -t nat -F FLANNEL-POSTRTG; {iptables} -F FLANNEL-FWD",
    "the chain unhooked": "{iptables} -D FORWARD -m comment --comment 'flanneld forward' -j FLANNEL-FWD",
}
NFTABLES = {
    "the rules flushed": "nft flush table {table}",
    "the table deleted": "nft delete table {table}",
}
RULESET = "nft flush ruleset"
SYSCTLS = "sysctl -qw {paths}"


def damages(case: Case) -> dict[str, Damage]:
    """All that can be done to a host that runs this case; with two families, the name says to which."""
    found: dict[str, Damage] = {}
    for family in case.families:
        words = _words(case, family)
        suffix = f", IPv{family}" if len(case.families) > 1 else ""
        for name, command in _commands(case):
            found[name + suffix] = partial(_sh, command.format(**words))
    found["the ruleset flushed"] = partial(_sh, RULESET)
    if case.type == "vxlan" and len(case.families) > 1:
        # The kernel does not tell, so this waits for the daemon's next look: once for both.
        paths = [f"net/ipv6/conf/{dev}/accept_ra=1" for dev in case.devices.values()]
        found["sysctls changed"] = partial(_sh, SYSCTLS.format(paths=" ".join(paths)))
    if case.type in PROGRAMS:
        found["its program killed"] = partial(_kill, PROGRAMS[case.type])
    return found


def _commands(case: Case) -> Iterator[tuple[str, str]]:
    tables = [NFTABLES if case.nftables else IPTABLES]
    if case.devices:
        tables.append({name: text for name, text in DEVICE.items() if not (case.direct and name in _NO_ROUTES)})
    if case.direct:
        tables.append(DIRECT)
    if case.type == "wireguard":
        tables.append(BLACKHOLE)
    if case.type == "vxlan":
        tables.append(VTEP)
        if not case.direct:
            tables.append(PEERS)
    for table in tables:
        yield from table.items()


_NO_ROUTES = ("a route removed", "a route sent elsewhere")
"""Not on the device of a case that routes past it."""


def _words(case: Case, family: int) -> dict[str, str]:
    words = {
        "family": str(family),
        "dev": case.devices.get(family, ""),
        "network": case.network["Network" if family == 4 else "IPv6Network"],
        "gateway": GATEWAYS[family],
        "iptables": "iptables" if family == 4 else "ip6tables",
        "table": "ip flannel-ipv4" if family == 4 else "ip6 flannel-ipv6",
        **STRAY[family],
    }
    lists = {"routes": ROUTES, "direct_routes": DIRECT_ROUTES, "neighbours": NEIGHBOURS, "macs": MACS}
    return words | {name: text.format(**words) for name, text in lists.items()}


def _sh(command: str, host: Host) -> None:
    """A command that fails has damaged nothing, and the test would show nothing."""
    host.run(["sh", "-e", "-c", command])


PROGRAMS = {"udp": "flanneld.dataplane.udp_tunnel", "wireguard": "wireguard-go"}
"""What carries the packets, as it stands in the command line."""


def _kill(program: str, host: Host) -> None:
    pids = [pid for pid in _processes(host) if program in run(["cat", f"/proc/{pid}/cmdline"])]
    tunnels = host.daemon.get("/status").json().get("tunnels", {})
    assert pids or {tunnel.get("engine") for tunnel in tunnels.values()} == {"kernel"}, f"{host.name}: no {program}"
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


def _processes(host: Host) -> Iterable[int]:
    return map(int, run(["ip", "netns", "pids", host.ns.name]).split())
