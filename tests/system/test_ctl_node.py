"""flannelctl on a node: status, the plan that is not applied, doctor, cleanup."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from ipaddress import IPv4Network

import pytest

from backends.kernel_state import Firewall, Scope, Sysctl
from flanneld.ctl.drift import differences, line
from flanneld.lab.faults import peers_in_kernel
from flanneld.lab.hosts import Lab
from flanneld.lab.wait import wait_until
from flanneld.record_json import from_json
from tests.system.whole_host import becomes, everything, use_iptables


def test_status_tells_people_and_programs_how_the_node_fares(lab: Lab) -> None:
    lab.start_daemons()
    lab.wait_peers()
    host = lab.hosts[0]
    shown = host.ctl("status")
    assert shown.returncode == 0, shown.stdout + shown.stderr
    subnet = str(IPv4Network(host.daemon.subnet_env()["FLANNEL_SUBNET"], strict=False))
    lines = dict(line.split(maxsplit=1) for line in shown.stdout.splitlines())
    assert lines["flanneld"] == "ready"
    assert lines["node"] == "h1"
    assert lines["subnet"] == subnet
    assert lines["underlay"] == f"eth0 {host.address}"
    assert lines["backend"].startswith("vxlan, flannel.1, ")
    assert lines["peers"] == "2"
    whole = json.loads(host.ctl("status", "--json").stdout)
    assert whole["ready"] is True and whole["running"] is True and whole["subnet"] == subnet
    host.daemon.process.send_signal(signal.SIGSTOP)
    hung = host.ctl("status")
    host.daemon.process.send_signal(signal.SIGCONT)
    pid = host.daemon.process.pid
    words = f"runs (pid {pid}) but does not answer on 127.0.0.1:8081; restart it"
    assert (hung.returncode, hung.stdout.splitlines()[0]) == (1, f"flanneld  {words}")
    host.daemon.stop()
    after = host.ctl("status")
    assert after.returncode == 1
    assert "not running" in after.stdout and subnet in after.stdout
    stranger = host.ctl("status", "--subnet-file=/nonexistent/subnet.env", "--healthz-port=1")
    assert stranger.returncode == 1 and "no flanneld is known on this host" in stranger.stderr


def test_diff_is_the_plan_not_applied(lab: Lab) -> None:
    lab.start_daemons("--ip-masq")
    lab.wait_peers()
    host = lab.hosts[0]
    wait_until(lambda: host.ctl("status", "--diff").returncode == 0, 10, lambda: host.ctl("status", "--diff").stdout)
    shown = host.ctl("status", "--diff")
    assert "kernel    as it should be" in shown.stdout
    wanted = host.daemon.get("/status/desired").json()
    desired = [from_json(value) for value in wanted["records"]]
    scope = Scope(
        frozenset(wanted["devices"]),
        tuple(wanted["networks"]),
        wanted["instance"],
        tuple(r for r in desired if isinstance(r, Firewall)),
        tuple(r.path for r in desired if isinstance(r, Sysctl)),
    )
    host.daemon.stop()  # else it would repair what is broken now
    peer, other = peers_in_kernel(host)[:2]
    host.run(f"ip route del {peer.subnet} dev flannel.1")
    host.run(f"ip neigh replace {other.vtep} lladdr 02:00:00:00:00:99 dev flannel.1 nud permanent")
    host.run("ip route add 10.5.250.0/24 dev flannel.1")
    with host.ns.inside():
        found = sorted(line(change) for change in differences(desired, scope))
    assert len(found) == 3, found
    assert found[0].startswith("+ route ") and f"dst={peer.subnet}" in found[0]
    assert found[1].startswith("- route ") and "dst=10.5.250.0/24" in found[1]
    assert found[2].startswith("~ neighbour ") and "02:00:00:00:00:99" in found[2]
    assert host.ctl("status", "--diff").returncode == 1


@pytest.mark.field_problem(46)
def test_doctor_tells_a_dead_tunnel_from_a_dead_host(lab: Lab) -> None:
    lab.start_daemons()
    lab.wait_peers()
    here, firewalled, dead = lab.hosts
    assert here.ctl("reserve", "10.5.99.0/24", "--node", "not-yet-there").returncode == 0
    wait_until(lambda: here.ctl("doctor").returncode == 0, 10, lambda: here.ctl("doctor").stdout)
    healthy = here.ctl("doctor")
    assert "not-yet-there" not in healthy.stdout and "None" not in healthy.stdout
    firewalled.run(
        "nft -f -",
        stdin="table ip wall { chain in { type filter hook input priority 0; udp dport 8472 drop; }; }",
    )
    dead.run("ip link set eth0 down")

    def verdicts() -> dict[str, str]:
        sick = here.ctl("doctor")
        assert sick.returncode == 1
        return {row.split()[0]: row for row in sick.stdout.splitlines()[1:]}

    expected = {"h2": "underlay good, UDP 8472 dead to h2", "h3": "underlay dead"}
    wait_until(lambda: all(text in verdicts()[name] for name, text in expected.items()), 10, lambda: str(verdicts()))
    assert [entry["overlay"] for entry in json.loads(here.ctl("doctor", "--json").stdout)] == [False, False]
    here.daemon.stop()
    alone = here.ctl("doctor")
    assert (alone.returncode, alone.stdout) == (1, "")
    assert "this node is not ready: flanneld does not run here" in alone.stderr


@pytest.mark.field_problem(42)
@pytest.mark.parametrize(
    ("backend", "nftables"),
    [("vxlan", False), ("vxlan", True), ("host-gw", True), ("udp", False), ("wireguard", True)],
)
def test_cleanup_leaves_the_host_as_it_was(make_lab: Callable[..., Lab], backend: str, nftables: bool) -> None:
    if backend == "wireguard" and not shutil.which("wireguard-go"):
        pytest.skip("wireguard-go is not installed (Debian: wireguard-go)")
    lab = make_lab(2)
    lab.set_config({"Network": "10.5.0.0/16", "EnableNFTables": nftables, "Backend": {"Type": backend}})
    host = lab.hosts[0]
    host.run("ip route add 10.99.0.0/16 via 172.30.0.1")
    if not nftables:
        use_iptables(host)
    before = everything(host)
    lab.start_daemons("--ip-masq", "--ip-blackhole-route")
    wait_until(
        lambda: all(h.daemon.get("/status").json()["peers"] == 1 for h in lab.hosts),
        30,
        lambda: "\n".join(f"each host to know its peer: {h.daemon.get('/status').text}" for h in lab.hosts),
    )
    wait_until(lambda: host.ctl("status", "--diff").returncode == 0, 10, lambda: host.ctl("status", "--diff").stdout)
    refused = host.ctl("cleanup")
    pid = host.daemon.process.pid
    assert refused.returncode == 1
    assert f"flanneld runs on this host (pid {pid}, {host.daemon.subnet_file})" in refused.stderr
    subnet = host.daemon.get("/status").json()["subnet"]
    host.daemon.stop()
    assert everything(host) != before, "stopping must leave the overlay"
    done = host.ctl("cleanup")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "removed" in done.stdout
    stays = f"the lease {subnet} stays in etcd: flannelctl release {subnet}"
    assert done.stdout.splitlines()[-1] == stays
    becomes(host, before)
    assert not list(host.daemon.run_dir.iterdir())
    again = host.ctl("cleanup")
    assert (again.returncode, again.stdout) == (0, "nothing of this flanneld was left on this host\n")


@pytest.mark.field_problem(42)
@pytest.mark.parametrize("backend", ["vxlan", "host-gw"])
def test_cleanup_finds_everything_although_the_run_directory_is_gone(
    make_lab: Callable[..., Lab], backend: str
) -> None:
    lab = make_lab(2)
    lab.set_config({"Network": "10.5.0.0/16", "EnableNFTables": True, "Backend": {"Type": backend}})
    host = lab.hosts[0]
    host.run("ip route add 10.99.0.0/16 via 172.30.0.1")
    before = everything(host)
    lab.start_daemons("--ip-masq", "--ip-blackhole-route")
    wait_until(lambda: all(h.daemon.get("/status").json()["peers"] == 1 for h in lab.hosts), 30, "a peer each")
    host.daemon.stop()
    assert "blackhole 10.5." in host.run("ip route")
    shutil.rmtree(host.daemon.run_dir)
    done = host.ctl("cleanup")
    assert done.returncode == 0, done.stdout + done.stderr
    becomes(host, before)


@pytest.mark.field_problem(44)
def test_cleanup_without_a_subnet_file_spares_a_second_networks_device(make_lab: Callable[..., Lab]) -> None:
    lab = make_lab(1)
    lab.set_config()
    lab.set_config({"Network": "10.6.0.0/16", "Backend": {"Type": "vxlan", "VNI": 2}}, prefix="/second/network")
    host = lab.hosts[0]
    first = host.start_daemon(wait=True)
    second = host.start_daemon("--etcd-prefix=/second/network", instance="b", wait=True)
    before = host.run("ip -brief link show dev flannel.2")
    first.stop()
    shutil.rmtree(first.run_dir)
    done = host.ctl("cleanup", f"--subnet-file={first.subnet_file}", f"--healthz-port={first.healthz_port}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "flannel.1" not in host.run("ip -brief link")
    assert second.ready and host.run("ip -brief link show dev flannel.2") == before
    repairs = [line for line in second.get("/metrics").text.splitlines() if line.startswith("flanneld_repairs_total")]
    assert not [line for line in repairs if not line.endswith(" 0.0")]


@pytest.mark.field_problem(44)
def test_cleanup_without_a_subnet_file_spares_a_second_networks_routes(make_lab: Callable[..., Lab]) -> None:
    lab = make_lab(2)
    lab.set_config({"Network": "10.5.0.0/16", "Backend": {"Type": "host-gw"}})
    lab.set_config({"Network": "10.6.0.0/16", "Backend": {"Type": "host-gw"}}, prefix="/second/network")
    host = lab.hosts[0]
    lab.start_daemons()
    seconds = [h.start_daemon("--etcd-prefix=/second/network", instance="b", wait=True) for h in lab.hosts]
    wait_until(lambda: host.run("ip route").count("proto 241") == 2, 20, "a route in each network")
    first = host.daemons[0]
    first.stop()
    # The second daemon's port, as a user gives it who forgets that the first one had its own.
    flags = (f"--subnet-file={first.subnet_file}", f"--healthz-port={seconds[0].healthz_port}")
    status = host.ctl("status", *flags)
    pid = seconds[0].process.pid
    assert status.returncode == 1 and "not running" in status.stdout and "10.5." in status.stdout, status.stdout
    assert f"another daemon (pid {pid}, {seconds[0].subnet_file}) answers" in status.stdout
    shutil.rmtree(first.run_dir)
    refused = host.ctl("cleanup", *flags)
    assert refused.returncode == 1 and f"another daemon (pid {pid}, {seconds[0].subnet_file})" in refused.stderr
    done = host.ctl("cleanup", f"--subnet-file={first.subnet_file}", f"--healthz-port={first.healthz_port}")
    assert done.returncode == 0, done.stdout + done.stderr
    (left,) = [line for line in host.run("ip route").splitlines() if "proto 241" in line]
    assert left.startswith("10.6.") and seconds[0].ready
