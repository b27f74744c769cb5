"""Two networks on each host, in dual-stack, one over wireguard and one over vxlan: both carry traffic, and never meet."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest

from flanneld.lab.containers import Container
from flanneld.lab.daemons import Daemon
from flanneld.lab.hosts import Lab
from flanneld.lab.wait import Promised, wait_until
from tests.system.backend_cases import DUAL, UNDERLAY6, needs_wireguard
from tests.system.kernel_text import kernel_text

BLUE = {"EnableIPv6": True, "Network": "10.6.0.0/16", "IPv6Network": "fd06::/48"}
DEVICES = ("flannel-wg", "flannel-wg-v6", "flannel.2", "flannel-v6.2")


@dataclass(frozen=True, slots=True)
class Network:
    daemons: list[Daemon]
    boxes: list[Container]

    def carries(self) -> bool:
        here, there = self.boxes
        ways = ((here, there), (there, here))
        return all(a.ping(address).ok for a, b in ways for address in b.addresses)

    def reaches(self, other: Network) -> bool:
        """Whether anything of this network gets to anything of the other."""
        targets = [address for box in other.boxes for address in box.addresses]
        return any(box.ping(address, wait=0.1).ok for box in self.boxes for address in targets)


@pytest.mark.field_problem(44)
@needs_wireguard
def test_wireguard_and_vxlan_side_by_side(make_lab: Callable[..., Lab]) -> None:
    lab = make_lab(2, underlay6=UNDERLAY6)
    lab.set_config({**DUAL, "Backend": {"Type": "wireguard"}})
    lab.set_config({**BLUE, "Backend": {"Type": "vxlan", "VNI": 2}}, prefix="/blue")
    red = started(lab, "r", "cni0")
    blue = started(lab, "b", "cni1", "--etcd-prefix=/blue", instance="blue")
    separate(red, blue)

    # One restarts, loses its devices, changes its backend: the other does not notice.
    host = lab.hosts[0]
    before = kernel_text(host, *DEVICES)
    blue.daemons[0].restart()
    blue.daemons[0].wait_ready()
    host.run("ip link del flannel-v6.2")
    host.run("ip link del flannel-wg")
    wait_until(lambda: kernel_text(host, *DEVICES) == before, Promised(5), "all as it was")
    separate(red, blue)

    lab.set_config({**DUAL, "Backend": {"Type": "host-gw"}})
    for each in lab.hosts:
        wait_until(lambda: "flannel-wg" not in each.run("ip -br link"), 10, "the old devices gone")
        wait_until(lambda: "proto 241" in each.run("ip route"), 10, "direct routes")
        assert "flannel-v6.2" in each.run("ip -br link")
    separate(red, blue)


def started(lab: Lab, name: str, bridge: str, *flags: str, instance: str = "") -> Network:
    daemons = [host.start_daemon("--ip-masq", *flags, instance=instance) for host in lab.hosts]
    for daemon in daemons:
        daemon.wait_ready()
    pairs = zip(lab.hosts, daemons, strict=True)
    return Network(daemons, [host.container(name, daemon=daemon, bridge=bridge) for host, daemon in pairs])


def separate(red: Network, blue: Network) -> None:
    wait_until(lambda: red.carries() and blue.carries(), 10, "traffic in both")
    wait_until(lambda: not red.reaches(blue) and not blue.reaches(red), 20, "no way from one to the other")
    wait_until(lambda: red.carries() and blue.carries(), 10, "traffic in both")
    for daemon in (*red.daemons, *blue.daemons):
        daemon.wait_ready()
        assert daemon.get("/status").json()["warnings"] == []
