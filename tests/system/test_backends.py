"""Every backend and family that this kernel can run, from end to end, and the switch between them on live hosts."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator

import pytest

from flanneld.lab.hosts import Host, Lab
from flanneld.lab.netns import run
from flanneld.lab.throughput import iperf3
from flanneld.lab.wait import Promised, wait_until
from tests.system.backend_cases import (
    DUAL,
    UNDERLAY6,
    V4,
    VXLAN,
    WIREGUARD,
    Running,
    needs_wireguard,
    params,
    running_case,
)
from tests.system.loss import no_packet_lost
from tests.system.packets import check_packet
from tests.system.whole_host import becomes, everything


@pytest.fixture(scope="module", params=params())
def running(request: pytest.FixtureRequest) -> Iterator[Running]:
    """Two hosts that run one case, shared by the tests of it: each leaves them as they were."""
    with running_case(request.param, iptables_in_use=True) as running:
        yield running


def test_containers_reach_each_other_with_packets_as_large_as_published(running: Running) -> None:
    mtu = running.case.mtu
    assert running.host.daemon.subnet_env()["FLANNEL_MTU"] == str(mtu)
    for box, address in running.targets():
        wait_until(lambda: box.ping(address).ok, 5, f"{box.name} to {address}")
        # Not to be fragmented on the way; a byte more does not pass.
        payload = mtu - (48 if ":" in address else 28)
        wait_until(lambda: box.ping(address, size=payload, dont_fragment=True).ok, 5, f"{mtu} bytes to {address}")
        assert not box.ping(address, size=payload + 1, dont_fragment=True, wait=0.2).ok


def test_tcp_flows(running: Running) -> None:
    here, there = running.boxes
    for address in there.addresses:
        wait_until(lambda: iperf3(here.ns, there.ns, address, seconds=1) > 1e6, 10, "a megabit a second")


def test_what_is_on_the_wire(running: Running) -> None:
    for family in running.case.families:
        check_packet(running, family)


@pytest.mark.field_problem(28)
@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGKILL], ids=lambda sig: sig.name)
def test_a_restart_loses_no_packet(running: Running, sig: signal.Signals) -> None:
    here, there = running.boxes
    with no_packet_lost(here, *there.addresses):
        running.host.daemon.restart(sig)
        running.host.daemon.wait_ready()


@pytest.mark.field_problem(42)
def test_cleanup_leaves_the_host_as_it_was_before_the_daemon(running: Running) -> None:
    host = running.host
    host.containers.pop().close()
    host.run("ip link del cni0")
    host.daemon.stop()
    assert everything(host) != running.untouched, "stopping must leave the overlay"
    done = host.ctl("cleanup")
    assert done.returncode == 0, done.stdout + done.stderr
    becomes(host, running.untouched)
    assert not list(host.daemon.run_dir.iterdir())
    wait_until(lambda: not run(["ip", "netns", "pids", host.ns.name]), Promised(5), "no process left behind")

    host.daemon.start()
    host.daemon.wait_ready()
    host.container("c")
    running.ping_all()


DEVICES = {"vxlan": VXLAN, "host-gw": {4: "eth0", 6: "eth0"}, "wireguard": WIREGUARD, "udp": {4: "flannel0"}}


@pytest.mark.field_problem(20)
@needs_wireguard
@pytest.mark.parametrize(
    ("network", "backends"),
    [(V4, "host-gw wireguard udp vxlan"), (DUAL, "host-gw wireguard vxlan")],
    ids=["v4", "dual"],
)
def test_switching_backends_on_live_hosts_leaves_nothing_of_the_old_one(
    make_lab: Callable[..., Lab], network: dict[str, object], backends: str
) -> None:
    lab = make_lab(2, underlay6=UNDERLAY6)
    lab.set_config({**network, "Backend": {"Type": "vxlan"}})
    lab.start_daemons()
    here, there = (host.container("c") for host in lab.hosts)
    for address in there.addresses:
        wait_until(lambda: here.ping(address).ok, 15, f"vxlan to {address}")
    for name in backends.split():
        lab.set_config({**network, "Backend": {"Type": name}})
        for host in lab.hosts:
            wait_until(lambda: not old_devices(host, DEVICES[name]), 15, f"{name}: the old devices gone")
        for address in there.addresses:
            dev = DEVICES[name][6 if ":" in address else 4]
            wait_until(lambda: f"dev {dev} " in here.host.run(f"ip route get {address}"), 15, f"{name} in use")
            wait_until(lambda: here.ping(address).ok, 15, f"{name} to {address}")
        if name != "host-gw":
            assert "dev eth0 proto 241" not in here.host.run("ip route") + here.host.run("ip -6 route")
        assert here.host.daemon.get("/status").json()["backend"] == name


def old_devices(host: Host, wanted: dict[int, str]) -> list[str]:
    names = [line.split()[0].split("@")[0] for line in host.run("ip -br link").splitlines()]
    return [name for name in names if name.startswith("flannel") and name not in wanted.values()]
