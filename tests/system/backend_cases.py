"""The backends and families that are tested from end to end, and two hosts that run one of them."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from flanneld.lab.containers import Container
from flanneld.lab.hosts import Host, Lab
from flanneld.lab.netns import Namespace
from flanneld.lab.wait import wait_until
from tests.system.whole_host import everything, use_iptables

V4 = {"Network": "10.5.0.0/16"}
DUAL = {"EnableIPv6": True, "Network": "10.5.0.0/16", "IPv6Network": "fd05::/48"}
V6 = {"EnableIPv4": False, "EnableIPv6": True, "IPv6Network": "fd05::/48"}
NFT = {"EnableNFTables": True}

UNDERLAY6 = "fd30::/64"
GATEWAYS = {4: "172.30.0.1", 6: "fd30::1"}

VXLAN = {4: "flannel.1", 6: "flannel-v6.1"}
WIREGUARD = {4: "flannel-wg", 6: "flannel-wg-v6"}
ONE_WIREGUARD = {4: "flannel-wg", 6: "flannel-wg"}

needs_wireguard = pytest.mark.skipif(
    shutil.which("wireguard-go") is None and not Path("/sys/module/wireguard").exists(),
    reason="neither the kernel's wireguard nor wireguard-go is here (Debian: apt-get install wireguard-go)",
)


@dataclass(frozen=True, slots=True)
class Case:
    """``mtu`` is the one to be published; ``by_family`` names a device that the backend makes for each family."""

    network: Mapping[str, Any]
    backend: Mapping[str, Any]
    mtu: int
    by_family: Mapping[int, str]

    @property
    def config(self) -> dict[str, Any]:
        return {**self.network, "Backend": self.backend}

    @property
    def type(self) -> str:
        return str(self.backend["Type"])

    @property
    def families(self) -> tuple[int, ...]:
        return tuple(family for family, key in ((4, "Network"), (6, "IPv6Network")) if key in self.network)

    @property
    def devices(self) -> dict[int, str]:
        """Ours, by family; none for host-gw."""
        return {family: self.by_family[family] for family in self.families if family in self.by_family}

    @property
    def direct(self) -> bool:
        """Packets go to the peer as they are."""
        return self.type == "host-gw" or bool(self.backend.get("DirectRouting"))

    @property
    def nftables(self) -> bool:
        return bool(self.network.get("EnableNFTables"))


CASES = {
    "vxlan": Case(V4, {"Type": "vxlan"}, 1450, VXLAN),
    "vxlan dual": Case(DUAL, {"Type": "vxlan"}, 1430, VXLAN),
    "vxlan v6": Case(V6, {"Type": "vxlan"}, 1430, VXLAN),
    "vxlan direct": Case({**DUAL, **NFT}, {"Type": "vxlan", "DirectRouting": True}, 1430, VXLAN),
    "host-gw": Case(V4, {"Type": "host-gw"}, 1500, {}),
    "host-gw dual": Case({**DUAL, **NFT}, {"Type": "host-gw"}, 1500, {}),
    "host-gw v6": Case(V6, {"Type": "host-gw"}, 1500, {}),
    "udp": Case(V4, {"Type": "udp"}, 1472, {4: "flannel0"}),
    "wireguard": Case(V4, {"Type": "wireguard"}, 1420, WIREGUARD),
    "wireguard dual": Case(DUAL, {"Type": "wireguard"}, 1420, WIREGUARD),
    "wireguard auto": Case({**DUAL, **NFT}, {"Type": "wireguard", "Mode": "auto"}, 1420, ONE_WIREGUARD),
    "wireguard v6": Case(V6, {"Type": "wireguard"}, 1420, WIREGUARD),
    "ipip": Case(V4, {"Type": "ipip"}, 1480, {4: "flannel.ipip"}),
}


@dataclass(frozen=True, slots=True)
class Running:
    """A case on two hosts with a container each; ``untouched`` is what the first host was before its daemon."""

    case: Case
    lab: Lab
    untouched: str

    @property
    def host(self) -> Host:
        return self.lab.hosts[0]

    @property
    def boxes(self) -> tuple[Container, Container]:
        here, there = (host.containers[0] for host in self.lab.hosts)
        return here, there

    def targets(self) -> Iterator[tuple[Container, str]]:
        """Who is to reach which address: both ways, in every family."""
        here, there = self.boxes
        for a, b in ((here, there), (there, here)):
            for address in b.addresses:
                yield a, address

    def ping_all(self, seconds: float = 15) -> None:
        for box, address in self.targets():
            wait_until(lambda: box.ping(address).ok, seconds, lambda: f"{box.name} to {address}: {self.why_not()}")

    def why_not(self) -> str:
        return "\n".join(f"{host.name}: {host.daemon.why_not()}" for host in self.lab.hosts)


@contextlib.contextmanager
def running_case(name: str, *, iptables_in_use: bool = False) -> Iterator[Running]:
    """Bring a case up; with ``iptables_in_use``, somebody has used iptables on the first host before."""
    case = CASES[name]
    if case.type == "ipip" and not kernel_has_ipip():
        pytest.skip(f"this kernel ({os.uname().release}) has no module ipip")
    with Lab(2, underlay6=UNDERLAY6) as lab:
        lab.set_config(case.config)
        if iptables_in_use and not case.nftables:
            use_iptables(lab.hosts[0])
        untouched = everything(lab.hosts[0])
        lab.start_daemons("--ip-masq")
        for host in lab.hosts:
            host.container("c")
        running = Running(case, lab, untouched)
        running.ping_all()
        yield running


def params(names: tuple[str, ...] = tuple(CASES)) -> list[Any]:
    return [pytest.param(name, marks=needs_wireguard if "wireguard" in name else ()) for name in names]


def mac_of(host: Host, dev: str) -> str:
    return str(json.loads(host.run(f"ip -j link show dev {dev}"))[0]["address"])


def kernel_has_ipip() -> bool:
    with Namespace("ipip") as probe:
        probe.run("ip link add probe type ipip local 127.0.0.1", check=False)
        return "probe" in probe.run("ip -brief link")
