"""The wireguard backend on whole hosts: daemons, containers, both families, restarts, keys, removal."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import socket
import stat
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from flanneld.lab.capture import capture
from flanneld.lab.hosts import Host, Lab
from flanneld.lab.netns import end
from flanneld.lab.wait import wait_until
from tests.system.kernel_text import metric
from tests.system.loss import no_packet_lost

DUAL = {"Network": "10.5.0.0/16", "EnableIPv6": True, "IPv6Network": "fc00::/48"}


def config(**options: Any) -> dict[str, Any]:
    return {**DUAL, "Backend": {"Type": "wireguard", **options}}


@pytest.fixture(autouse=True)
def some_wireguard(make_lab: Callable[..., Lab]) -> None:
    if shutil.which("wireguard-go") is None:
        pytest.skip("the program wireguard-go is not installed (Debian: wireguard-go)")


@pytest.fixture
def running(make_lab: Callable[..., Lab]) -> Lab:
    return started(make_lab(2, underlay6="2001:db8:30::/64"))


def started(lab: Lab, **options: Any) -> Lab:
    lab.set_config(config(**options))
    lab.start_daemons("--ip-masq")
    for host in lab.hosts:
        host.container("c")
    reach(lab)
    return lab


def reach(lab: Lab) -> None:
    """Every container reaches the next host's, in both families."""
    for host, other in zip(lab.hosts, [*lab.hosts[1:], lab.hosts[0]], strict=True):
        here, there = host.containers[0], other.containers[0]
        for address in (there.address, there.address6):
            wait_until(lambda h=here, a=address: h.ping(a).ok, 20, f"{host.name} → {other.name} at {address}")


def wireguard_processes(host: Host) -> list[str]:
    pids = host.run(["ip", "netns", "pids", host.ns.name]).split()
    return [pid for pid in pids if "wireguard-go" in host.run(["cat", f"/proc/{pid}/comm"], check=False)]


def lease(host: Host) -> dict[str, Any]:
    subnet = host.daemon.subnet_env()["FLANNEL_SUBNET"].replace(".1/24", ".0-24")
    found = host.lab.etcd.ctl("get", "--prefix", "--print-value-only", f"/coreos.com/network/subnets/{subnet}")
    return dict(json.loads(found))


def test_what_is_published_and_what_status_says(running: Lab) -> None:
    one = running.hosts[0]
    assert lease(one)["BackendData"].keys() == lease(one)["BackendV6Data"].keys() == {"PublicKey", "Port"}
    tunnels = one.daemon.get("/status").json()["tunnels"]
    assert set(tunnels) == {"flannel-wg", "flannel-wg-v6"}
    assert all(told["engine"] in ("kernel", "wireguard-go") for told in tunnels.values())


@pytest.mark.field_problem(28)
def test_a_killed_daemon_finds_its_tunnels_again_and_writes_nothing(running: Lab) -> None:
    host = running.hosts[0]
    pids, key = wireguard_processes(host), lease(host)["BackendData"]
    with no_packet_lost(*(each.containers[0] for each in running.hosts)):
        host.daemon.stop(signal.SIGKILL)
        host.daemon.start()
        host.daemon.wait_ready()
    assert wireguard_processes(host) == pids
    assert lease(host)["BackendData"] == key
    assert metric(host, "flanneld_changes_total") == 0


@pytest.mark.field_problem(22)
def test_an_address_that_changed_while_the_daemon_was_down_is_left(running: Lab) -> None:
    """The peer's daemon is down, too, so the peer knows the lost address only, and cannot speak first."""
    host, other = running.hosts
    for each in running.hosts:
        each.daemon.stop()
    host.run("ip addr del 172.30.0.11/24 dev eth0")
    host.run("ip addr add 172.30.0.111/24 dev eth0")
    host.run("ip route replace default via 172.30.0.1")
    host.daemon.start()
    host.daemon.wait_ready()
    # Left to itself, wireguard-go tries another address 20 s after the first packet that was not answered.
    wait_until(lambda: host.containers[0].ping(other.containers[0]).ok, 3, "a ping from the new address")


@pytest.mark.field_problem(1)
@pytest.mark.field_problem(2)
def test_what_is_removed_comes_back(running: Lab) -> None:
    host = running.hosts[0]
    for fault in ("ip route del 10.5.0.0/16", "ip link del flannel-wg", "ip link set flannel-wg-v6 down"):
        host.run(fault)
        reach(running)
    wait_until(lambda: host.daemon.ready, 20, "ready again")


@pytest.mark.field_problem(32)
@pytest.mark.field_problem(20)
def test_what_cannot_be_encrypted_stays_here(make_lab: Callable[..., Lab]) -> None:
    """The switch to wireguard fails on one host, and later its device is deleted: no packet leaves in the clear."""
    lab = make_lab(2)
    lab.set_config({"Network": "10.5.0.0/16", "Backend": {"Type": "vxlan"}})
    lab.start_daemons()
    host, box, there = lab.hosts[0], lab.hosts[0].container("c"), lab.hosts[1].container("c")
    wait_until(lambda: box.ping(there).ok, 10, "a ping by vxlan")
    with host.ns.inside(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as taken:
        taken.bind(("0.0.0.0", 51820))
        lab.set_config({"Network": "10.5.0.0/16", "Backend": {"Type": "wireguard"}})
        wait_until(lambda: "flannel.1" not in host.run("ip -br link"), 10, "the old device gone")
        wait_until(lambda: "51820" in host.daemon.get("/readyz").text, 10, "the reason told")
        with in_the_clear(host) as seen:
            assert not box.ping(there, count=3).ok
        assert seen() == ""
    wait_until(lambda: box.ping(there).ok, 15, "a ping by wireguard")
    with in_the_clear(host) as seen, box.ping_stream(there) as stream:
        wait_until(stream.replies, 10, "a reply")
        host.run("ip link del flannel-wg")
        replies = len(stream.replies())
        wait_until(lambda: len(stream.replies()) > replies + 20, 15, "replies again")
    assert seen() == ""


@contextlib.contextmanager
def in_the_clear(host: Host) -> Iterator[Callable[[], str]]:
    """What tcpdump sees on the underlay, meanwhile, of containers' packets."""
    log = host.lab.directory / "clear.log"
    process = host.ns.start(["tcpdump", "-i", "eth0", "-nnl", "net 10.5.0.0/16"], log=log)
    try:
        wait_until(lambda: "listening on" in log.read_text(), 10, "tcpdump")
        yield lambda: "".join(line for line in log.read_text().splitlines(True) if " > " in line)
    finally:
        end(process, signal.SIGINT)


def test_a_node_that_left_leaves_nothing_and_no_secret_is_shown(running: Lab) -> None:
    one, two = running.hosts
    two.daemon.stop()
    running.etcd.ctl("del", "--prefix", "/coreos.com/network/subnets/" + two.daemon.subnet_env()["FLANNEL_SUBNET"][:6])
    wait_until(lambda: tunnel_peers(one) == 0, 20, "no peers left")
    key_file = one.directory / "wgkey"
    assert stat.S_IMODE(key_file.stat().st_mode) == 0o400
    secret = key_file.read_text().strip()
    shown = [
        one.daemon.output(100000),
        *(one.daemon.get(path).text for path in ("/status", "/status/desired", "/metrics")),
    ]
    assert all(secret not in text for text in shown)


def tunnel_peers(host: Host) -> int:
    desired = host.daemon.get("/status/desired").json()["records"]
    return sum(record["record"] == "WireguardPeer" for record in desired)


@pytest.mark.field_problem(21)
@pytest.mark.field_problem(32)
def test_a_nat_d_node_whose_port_changes(make_lab: Callable[..., Lab]) -> None:
    lab = make_lab(2, nat=["h2"])
    lab.set_config({"Network": "10.5.0.0/16", "Backend": {"Type": "wireguard", "PersistentKeepaliveInterval": 1}})
    public, hidden = lab.hosts
    public.start_daemon()
    hidden.start_daemon(f"--public-ip={hidden.public_address}")
    for host in lab.hosts:
        host.daemon.wait_ready()
        host.container("c")
    for here, there in ((public, hidden), (hidden, public)):
        wait_until(lambda h=here, t=there: h.containers[0].ping(t.containers[0]).ok, 20, "pings")

    # The router forgets its flows, and the next ones leave it from other ports than the lease says.
    assert hidden.router is not None
    hidden.router.run("nft insert rule ip nat post oifname wan udp sport 51820 masquerade to :40000-40100")
    hidden.router.run("conntrack -F")
    box, other = public.containers[0], hidden.containers[0]
    wait_until(lambda: other.ping(box).ok and box.ping(other).ok, 30, "pings from the new port")
    assert 40000 <= source_port(public, lambda: other.ping(box)) <= 40100, "it roamed"
    changes, looks = (metric(public, f"flanneld_{name}_total") for name in ("changes", "reconcile_passes"))
    wait_until(lambda: metric(public, "flanneld_reconcile_passes_total") >= looks + 2, 60, "two more looks")
    wait_until(lambda: box.ping(other).ok, 5, "a ping")
    assert metric(public, "flanneld_changes_total") == changes, "no rewriting of a live peer's endpoint"


def source_port(host: Host, provoke: Callable[[], object]) -> int:
    """Of the next WireGuard packet that arrives here."""
    (packet,) = capture(host.ns, "eth0", "udp dst port 51820", provoke)
    return int(packet["UDP"].sport)
