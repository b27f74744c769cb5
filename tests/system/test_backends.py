"""Every backend and family that this kernel can run, from end to end, and the switch between them on live hosts."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from flanneld.lab.capture import capture, decode_vxlan
from flanneld.lab.hosts import Lab
from flanneld.lab.wait import wait_until

MakeLab = Callable[..., Lab]
V4 = {"Network": "10.5.0.0/16"}
DUAL = {"EnableIPv6": True, "Network": "10.5.0.0/16", "IPv6Network": "fd05::/48"}
V6 = {"EnableIPv4": False, "EnableIPv6": True, "IPv6Network": "fd05::/48"}

needs_wireguard = pytest.mark.skipif(
    shutil.which("wireguard-go") is None and not Path("/sys/module/wireguard").exists(),
    reason="neither the kernel's wireguard nor wireguard-go is here (Debian: apt-get install wireguard-go)",
)


CASES = {
    "vxlan": (V4, {"Type": "vxlan"}, 1450),
    "vxlan dual": (DUAL, {"Type": "vxlan"}, 1430),
    "vxlan v6": (V6, {"Type": "vxlan"}, 1430),
    "vxlan direct": (DUAL, {"Type": "vxlan", "DirectRouting": True}, 1430),
    "host-gw": (V4, {"Type": "host-gw"}, 1500),
    "host-gw dual": (DUAL, {"Type": "host-gw"}, 1500),
    "host-gw v6": (V6, {"Type": "host-gw"}, 1500),
    "udp": (V4, {"Type": "udp"}, 1472),
    "wireguard": (V4, {"Type": "wireguard"}, 1420),
    "wireguard dual": (DUAL, {"Type": "wireguard"}, 1420),
    "wireguard auto": (DUAL, {"Type": "wireguard", "Mode": "auto"}, 1420),
    "wireguard v6": (V6, {"Type": "wireguard"}, 1420),
}

# What somebody might do to it, by backend; each must come back.
DAMAGE = {
    "vxlan": "ip link del flannel.1 || ip link del flannel-v6.1",
    "vxlan v6": "ip link del flannel-v6.1",
    "vxlan direct": "ip route flush proto 241; ip -6 route flush proto 241",
    "host-gw": "ip route flush proto 241",
    "host-gw dual": "ip route flush proto 241; ip -6 route flush proto 241",
    "host-gw v6": "ip -6 route flush proto 241",
    "udp": "ip link del flannel0",
    "wireguard": "ip link del flannel-wg",
    "wireguard v6": "ip link del flannel-wg-v6",
}


@pytest.fixture(params=[pytest.param(n, marks=needs_wireguard if "wireguard" in n else ()) for n in CASES])
def case(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def ping_all(lab: Lab, timeout: float = 15, **options: object) -> None:
    """Containers of both hosts reach each other, both ways, in every family that they have."""
    here, there = (host.containers[0] for host in lab.hosts)
    for a, b in ((here, there), (there, here)):
        for address in b.addresses:
            wait_until(lambda a=a, x=address: a.ping(x, **options).ok, timeout, f"{a.name} to {address} {options}")


def test_a_backend_from_end_to_end(make_lab: MakeLab, case: str) -> None:
    network, backend, mtu = CASES[case]
    lab = make_lab(2, underlay6="fd30::/64")
    lab.set_config({**network, "Backend": backend})
    lab.start_daemons("--ip-masq")
    boxes = [host.container("c") for host in lab.hosts]
    ping_all(lab)
    assert lab.hosts[0].daemon.subnet_env()["FLANNEL_MTU"] == str(mtu)

    # The largest packet that the published MTU promises, not to be fragmented on the way.
    for address in boxes[1].addresses:
        header = 48 if ":" in address else 28
        assert boxes[0].ping(address, size=mtu - header, dont_fragment=True).ok, f"{mtu} bytes to {address}"
        assert not boxes[0].ping(address, size=mtu - header + 1, dont_fragment=True).ok

    if case in DAMAGE:
        lab.hosts[0].run(["sh", "-c", DAMAGE[case]], check=False)
        ping_all(lab)

    # A restart, gentle or not, takes no packet.
    for sig in (signal.SIGTERM, signal.SIGKILL):
        with boxes[0].ping_stream(boxes[1].addresses[-1]) as stream:
            wait_until(lambda: len(stream.replies()) >= 20, 10, "twenty replies")
            lab.hosts[0].daemon.restart(sig)
            lab.hosts[0].daemon.wait_ready()
            seen = len(stream.replies())
            wait_until(lambda: len(stream.replies()) >= seen + 20, 10, "replies after the restart")
            result = stream.stop()
        assert result.lost == 0, f"{result.lost} of {result.sent} lost across {sig.name}"


@pytest.fixture
def switching(make_lab: MakeLab) -> Iterator[Lab]:
    lab = make_lab(2)
    lab.set_config({**V4, "Backend": {"Type": "vxlan"}})
    lab.start_daemons()
    for host in lab.hosts:
        host.container("c")
    yield lab


DEVICES = {"vxlan": "flannel.1", "host-gw": "eth0", "wireguard": "flannel-wg", "udp": "flannel0"}


@pytest.mark.field_problem(20)
@needs_wireguard
def test_switching_backends_on_live_hosts_leaves_nothing_of_the_old_one(switching: Lab) -> None:
    lab = switching
    ping_all(lab)
    for name in ("host-gw", "wireguard", "udp", "vxlan"):
        lab.set_config({**V4, "Backend": {"Type": name}})
        for host in lab.hosts:
            wait_until(lambda h=host: old_devices(h, DEVICES[name]) == [], 15, f"{name}: the old devices gone")
        here, there = lab.hosts[0], lab.hosts[1].containers[0]
        wait_until(lambda: f"dev {DEVICES[name]} " in here.run(f"ip route get {there.address}"), 15, f"{name} in use")
        if name != "host-gw":
            assert "dev eth0 proto 241" not in here.run("ip route")
        ping_all(lab)
        assert here.daemon.get("/status").json()["backend"] == name


def old_devices(host, wanted: str) -> list[str]:
    names = [line.split()[0].split("@")[0] for line in host.run("ip -br link").splitlines()]
    return [name for name in names if name.startswith("flannel") and name != wanted]


def test_a_vxlan_packet_is_what_rfc_7348_says(switching: Lab) -> None:
    here, there = (host.containers[0] for host in switching.hosts)
    ping_all(switching)
    packet = decode_vxlan(capture(switching.hosts[0].ns, "eth0", "udp dst port 8472", lambda: here.ping(there))[0])
    assert packet.outer[0].startswith("172.30.0.1") and packet.port == 8472 and packet.vni == 1
    macs = [host.daemon.get("/status").json()["vtep_mac"] for host in switching.hosts]
    assert set(packet.inner_macs) == set(macs)
    assert set(packet.inner) == {here.address, there.address}
