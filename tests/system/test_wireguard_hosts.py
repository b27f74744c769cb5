"""The wireguard backend on whole hosts: daemons, containers, both families, restarts, keys, removal."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import stat
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from flanneld.lab.hosts import Host, Lab
from flanneld.lab.wait import wait_until
from tests.system.kernel_text import metric

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


@contextlib.contextmanager
def no_packet_lost(lab: Lab) -> Iterator[None]:
    here, there = (host.containers[0] for host in lab.hosts[:2])
    with here.ping_stream(there) as stream:
        wait_until(lambda: len(stream.replies()) >= 20, 10, "twenty replies")
        yield
        after = len(stream.replies())
        wait_until(lambda: len(stream.replies()) >= after + 30, 10, "replies afterwards")
        result = stream.stop()
    assert result.lost == 0, f"{result.lost} of {result.sent} lost"


def wireguard_processes(host: Host) -> list[str]:
    pids = host.run(["ip", "netns", "pids", host.ns.name]).split()
    return [pid for pid in pids if "wireguard-go" in host.run(["cat", f"/proc/{pid}/comm"], check=False)]


def lease(host: Host) -> dict[str, Any]:
    subnet = host.daemon.subnet_env()["FLANNEL_SUBNET"].replace(".1/24", ".0-24")
    found = host.lab.etcd.ctl("get", "--prefix", "--print-value-only", f"/coreos.com/network/subnets/{subnet}")
    return dict(json.loads(found))


@pytest.mark.parametrize("mode", ["separate", "auto"])
def test_containers_reach_each_other_in_both_families(make_lab: Callable[..., Lab], mode: str) -> None:
    lab = started(make_lab(2, underlay6="2001:db8:30::/64"), Mode=mode, PersistentKeepaliveInterval=25)
    one, two = lab.hosts
    assert one.daemon.subnet_env()["FLANNEL_MTU"] == "1420"
    assert lease(one)["BackendData"].keys() == {"PublicKey", "Port"}
    tunnels = one.daemon.get("/status").json()["tunnels"]
    assert set(tunnels) == ({"flannel-wg", "flannel-wg-v6"} if mode == "separate" else {"flannel-wg"})
    assert all(told["engine"] in ("kernel", "wireguard-go") for told in tunnels.values())
    full = one.containers[0].run(["ping", "-c", "2", "-M", "do", "-s", "1392", str(two.containers[0].address)])
    assert " 0% packet loss" in full


@pytest.mark.field_problem(28)
@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGKILL])
def test_a_restart_loses_nothing_and_writes_nothing(running: Lab, sig: signal.Signals) -> None:
    host = running.hosts[0]
    pids, key = wireguard_processes(host), lease(host)["BackendData"]
    with no_packet_lost(running):
        host.daemon.stop(sig)
        host.daemon.start()
        host.daemon.wait_ready()
    assert wireguard_processes(host) == pids
    assert lease(host)["BackendData"] == key
    assert metric(host, "flanneld_changes_total") == 0


@pytest.mark.field_problem(1)
@pytest.mark.field_problem(2)
def test_what_is_removed_comes_back(running: Lab) -> None:
    host = running.hosts[0]
    for fault in ("ip route del 10.5.0.0/16", "ip link del flannel-wg", "ip link set flannel-wg-v6 down"):
        host.run(fault)
        reach(running)
    wait_until(lambda: host.daemon.ready, 20, "ready again")


@pytest.mark.field_problem(32)
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


@pytest.mark.field_problem(20)
def test_a_switch_to_another_backend_ends_wireguard_and_back(running: Lab) -> None:
    running.set_config({**DUAL, "Backend": {"Type": "vxlan"}})
    for host in running.hosts:
        wait_until(lambda h=host: "flannel-wg" not in h.run("ip link") and not wireguard_processes(h), 20, "gone")
    reach(running)
    running.set_config(config())
    for host in running.hosts:
        wait_until(lambda h=host: "flannel.1" not in h.run("ip link"), 20, "vxlan gone")
    reach(running)


def test_a_nat_d_node_and_a_public_one(make_lab: Callable[..., Lab]) -> None:
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
