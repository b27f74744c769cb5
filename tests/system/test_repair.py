"""Whatever somebody removes or alters comes back by itself, and nothing foreign goes."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from flanneld.lab.hosts import Host, Lab
from flanneld.lab.wait import Promised, wait_until
from tests.system.kernel_text import difference, kernel_text, metric

PROMISE = Promised(5)
"""Seconds; what is usual stands in docs/benchmarks.md."""


@pytest.fixture(scope="module")
def running() -> Iterator[Lab]:
    """Three hosts with daemons and a container each, shared by the tests of this file: each leaves it as it was."""
    with Lab(3) as lab:
        lab.set_config()
        lab.start_daemons("--ip-masq")
        lab.wait_peers()
        for host in lab.hosts:
            host.container("c")
        yield lab


ROUTE = "ip route | grep flannel.1 | head -1"
PEER = "P=$(ip route show dev flannel.1 | awk '/via/ {print $1; exit}'); B=${P%/*};"
MAC = PEER + " M=$(ip neigh show $B dev flannel.1 | awk '{print $3}');"

INTERFERENCE = {
    "a route removed": PEER + "ip route del $P",
    "a route sent elsewhere": PEER + "ip route replace $P via 172.30.0.1 dev eth0",
    "all routes flushed": "ip route flush dev flannel.1",
    "a neighbour removed": PEER + "ip neigh del $B dev flannel.1",
    "a neighbour altered": PEER + "ip neigh replace $B lladdr 02:00:00:00:99:99 dev flannel.1 nud permanent",
    "neighbours flushed": "ip neigh flush dev flannel.1 nud permanent",
    "an FDB entry removed": MAC + "bridge fdb del $M dev flannel.1",
    "an FDB entry altered": MAC + "bridge fdb replace $M dev flannel.1 dst 172.30.0.99 self permanent",
    "a stray FDB entry": "bridge fdb add 02:00:00:00:77:77 dev flannel.1 dst 172.30.0.77 self permanent",
    "a stray neighbour": "ip neigh add 10.5.250.0 lladdr 02:00:00:00:77:77 dev flannel.1 nud permanent",
    "a stray route": "ip route add 10.5.250.0/24 via 10.5.250.0 dev flannel.1 onlink",
    "the address removed": "ip addr flush dev flannel.1 scope global",
    "a stray address": "ip addr add 10.5.251.1/32 dev flannel.1",
    "the device down": "ip link set flannel.1 down",
    "the device down and up": "ip link set flannel.1 down; ip link set flannel.1 up",
    "the MAC altered": "ip link set flannel.1 address 02:00:00:00:55:55",
    "the MTU altered": "ip link set flannel.1 mtu 1300",
    "the device deleted": "ip link del flannel.1",
    "the rules flushed": "iptables -t nat -F FLANNEL-POSTRTG; iptables -F FLANNEL-FWD",
    "the chains unhooked": "iptables -D FORWARD -m comment --comment 'flanneld forward' -j FLANNEL-FWD",
    "a rule in front": "iptables -t nat -I FLANNEL-POSTRTG -s 10.5.0.0/16 -j MASQUERADE",
    "the ruleset flushed": "nft flush ruleset",
    "the underlay down and up": "ip link set eth0 down; ip link set eth0 up; ip route add default via 172.30.0.1",
}


@pytest.mark.field_problem(1)
@pytest.mark.field_problem(2)
@pytest.mark.field_problem(3)
@pytest.mark.field_problem(19)
@pytest.mark.field_problem(23)
@pytest.mark.field_problem(26)
@pytest.mark.parametrize("what", INTERFERENCE)
def test_it_comes_back(running: Lab, what: str) -> None:
    host, other = running.hosts[0], running.hosts[1]
    before = kernel_text(host)
    host.run(["sh", "-c", INTERFERENCE[what]], check=False)
    wait_until(
        lambda: kernel_text(host) == before,
        PROMISE,
        lambda: f"{what}: {difference(before, kernel_text(host))}\n{host.daemon.output(10)}",
    )
    wait_until(lambda: host.daemon.ready, PROMISE, "ready again")
    wait_until(lambda: host.containers[0].ping(other.containers[0]).ok, PROMISE, "a ping between containers")


def test_a_device_of_another_kind_in_its_place_is_named_with_the_remedy(running: Lab) -> None:
    host, other = running.hosts[0], running.hosts[1]
    before = kernel_text(host)

    # Held still meanwhile: otherwise it is quicker than ip(8) to put its own device back.
    os.kill(host.daemon.process.pid, signal.SIGSTOP)
    try:
        host.run("ip link del flannel.1")
        host.run("ip link add flannel.1 type veth peer name vx")
    finally:
        os.kill(host.daemon.process.pid, signal.SIGCONT)
    wait_until(lambda: "ip link del flannel.1" in host.daemon.get("/readyz").text, PROMISE, "the remedy")
    assert "its kind is veth, not vxlan" in host.daemon.get("/readyz").text
    assert "veth" in host.run("ip -d link show flannel.1"), "a foreign device was removed"
    host.run("ip link del flannel.1")
    wait_until(lambda: kernel_text(host) == before, Promised(2 * PROMISE), "our own device back")
    wait_until(lambda: host.containers[0].ping(other.containers[0]).ok, PROMISE, "a ping between containers")


def test_foreign_state_is_left_alone(running: Lab) -> None:
    host = running.hosts[0]
    commands = (
        "ip route add 10.5.240.0/24 via 172.30.0.1 dev eth0 proto static",
        "ip route add 198.51.100.0/24 via 172.30.0.1 dev eth0",
        "ip neigh add 172.30.0.200 lladdr 02:00:00:00:44:44 dev eth0 nud permanent",
        "ip link add foreign0 type veth peer name foreign1",
        "ip link add flannel.99 type vxlan id 99 dstport 4999 local 172.30.0.11 dev eth0",
        "ip addr add 10.99.0.0/32 dev flannel.99",
        "iptables -A FORWARD -s 203.0.113.0/24 -j DROP",
    )
    for command in commands:
        host.run(command)
    try:
        before = kernel_text(host)
        host.run("ip route flush dev flannel.1")
        wait_until(lambda: kernel_text(host) == before, PROMISE, "our routes back, theirs still there")
        assert host.run("ip neigh show 172.30.0.200 dev eth0")
        assert host.run("ip link show foreign0")
        assert "10.99.0.0/32" in host.run("ip addr show flannel.99")
    finally:
        for command in (
            "ip route del 10.5.240.0/24",
            "ip route del 198.51.100.0/24",
            "ip neigh del 172.30.0.200 dev eth0",
            "ip link del foreign0",
            "ip link del flannel.99",
            "iptables -D FORWARD -s 203.0.113.0/24 -j DROP",
        ):
            host.run(command, check=False)


@pytest.mark.field_problem(26)
def test_idle_means_no_writes_no_lines_and_no_processes(running: Lab) -> None:
    host = running.hosts[0]
    wait_until(lambda: host.daemon.ready, PROMISE, "ready")
    # The search for blocking chains may follow the last test's changes by up to its minimum interval, ten
    # seconds, and a tick.
    wait_until(lambda: _unchanged_for(host, 25), Promised(90), "twenty-five seconds without a trace")


def _footprint(host: Host) -> tuple[float, int, str]:
    """Writes to the kernel, bytes of log, and the CPU time of ended children: a single iptables run would show."""
    pid = host.daemon.process.pid
    children = " ".join(Path(f"/proc/{pid}/stat").read_text().split()[15:17])  # cutime, cstime: proc(5)
    return metric(host, "flanneld_changes_total"), host.daemon.log.stat().st_size, children


def _unchanged_for(host: Host, seconds: float) -> bool:
    before = _footprint(host)
    _watch_for(seconds)
    return _footprint(host) == before


def _watch_for(seconds: float) -> None:
    """The passing of time is what these tests are about."""
    time.sleep(seconds)
