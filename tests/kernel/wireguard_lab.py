"""Two hosts that run the wireguard backend through the real dataplane."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from pathlib import Path
from typing import Any

import pytest

from backends.backend import Host, Underlay
from backends.kernel_state import KernelState, Scope, WireguardPeer, state_of
from backends.wireguard import Wireguard
from flanneld.dataplane.dataplane import Dataplane
from flanneld.dataplane.wireguard import WireguardHandler
from flanneld.dataplane.wireguard_kernel import Kernel
from flanneld.dataplane.wireguard_userspace import Userspace
from flanneld.lab import wait
from flanneld.lab.netns import Namespace, veth
from flanneld.plan import plan
from flanneld.wireguard_key import clamped, public_key
from subnet_lease.lease import Lease, LeaseAttrs
from subnet_lease.network_config import NetworkConfig

NETWORK, NETWORK6 = IPv4Network("10.5.0.0/16"), IPv6Network("fc00::/48")
DEVICES = frozenset({"flannel-wg", "flannel-wg-v6"})


def poll(true: Callable[[], Any], what: str, seconds: float = 20) -> Any:
    """Wait; unlike ``wait_until`` this lets a failure of what is asked through at once."""
    seconds *= wait.patience
    deadline = time.monotonic() + seconds
    while not (value := true()):
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.05)
    return value


class Node:
    """One host: its namespace, its key, and a dataplane that can be thrown away and made anew."""

    def __init__(self, namespace: Namespace, number: int, engines: tuple[Any, ...], backend: Wireguard) -> None:
        self.namespace, self.number, self.engines, self.backend = namespace, number, engines, backend
        self.key = clamped(os.urandom(32))
        self._keys = ("", "")
        self.now = time.time
        self.dataplane: Dataplane | None = None
        self.handler: WireguardHandler | None = None
        self.start()

    def clock(self) -> float:
        """The time as this node has it; a test may put it forward."""
        return self.now()

    def start(self) -> None:
        with self.namespace.inside():
            self.handler = WireguardHandler(self.engines, clock=self.clock, look_seconds=0.2)
            self.dataplane = Dataplane([self.handler])

    def stop(self) -> None:
        if self.dataplane is not None:
            self.dataplane.close()
            self.dataplane = None

    @property
    def host(self) -> Host:
        local: Any = {4: IPv4Address(f"192.168.64.{self.number}"), 6: IPv6Address(f"2001:db8:64::{self.number}")}
        subnets: Any = {4: IPv4Network(f"10.5.{self.number}.0/24"), 6: IPv6Network(f"fc00:0:0:{self.number}::/64")}
        config = NetworkConfig(enable_ipv6=True, network=NETWORK, ipv6_network=NETWORK6, backend_type="wireguard")
        facts = {"wireguard_key": self.key, "wireguard_public_key": self._public_key()}
        return Host(Underlay("eth0", 1500, local, local), config, subnets, facts)

    def _public_key(self) -> str:
        if self._keys[0] != self.key:
            self._keys = self.key, public_key(self.key)
        return self._keys[1]

    @property
    def lease(self) -> Lease:
        told, here = self.backend.published(self.host), self.host
        return Lease(
            here.subnets[4],  # type: ignore[arg-type]
            here.subnets[6],  # type: ignore[arg-type]
            LeaseAttrs(
                here.underlay.public[4],  # type: ignore[arg-type]
                here.underlay.public[6],  # type: ignore[arg-type]
                told.backend_type,
                told.data,
                told.v6_data,
            ),
        )

    def desired(self, *peers: Lease) -> KernelState:
        records = [*self.backend.host_state(self.host)]
        for peer in peers:
            records += self.backend.peer_state(self.host, peer)
        return state_of(*records)

    def one_pass(self, desired: KernelState) -> list[Any]:
        """Observe, plan, apply; the changes that were needed."""
        assert self.dataplane is not None
        with self.namespace.inside():
            seen = self.dataplane.observe(Scope(DEVICES, (str(NETWORK), str(NETWORK6))))
            changes = plan(desired, seen.state, lambda record: getattr(record, "protocol", None) != 2)
            assert self.dataplane.apply(changes) == []
        return changes

    def converge(self, desired: KernelState) -> None:
        poll(lambda: not self.one_pass(desired), "no more changes")

    def peers(self) -> dict[str, WireguardPeer]:
        assert self.dataplane is not None
        with self.namespace.inside():
            state = self.dataplane.observe(Scope(DEVICES)).state
        return {r.endpoint: r for r in state.values() if isinstance(r, WireguardPeer) and r.dev == "flannel-wg"}

    def ping(self, address: str) -> bool:
        told = self.namespace.run(["ping", "-c", "1", "-W", "1", "-M", "do", "-s", "1372", address], check=False)
        return " 0% packet loss" in told

    def sees(self, address: str) -> None:
        poll(lambda: self.ping(address), f"host {self.number} reaches {address}")

    def remove_devices(self) -> None:
        for device in DEVICES:
            self.namespace.run(f"ip link del {device}", check=False)


def engine(name: str, folder: Path) -> Any:
    """The engine of this name; the test is skipped, saying why, where this host has none."""
    if name == "kernel":
        with Namespace("wgprobe") as probe:
            probe.run("ip link add probe type wireguard", check=False)
            if "probe" not in probe.run("ip -brief link"):
                pytest.skip(f"this kernel ({os.uname().release}) has no module wireguard")
        return Kernel()
    if shutil.which("wireguard-go") is None:
        pytest.skip("the program wireguard-go is not installed (Debian: wireguard-go)")
    return Userspace(private_sockets=folder)


@contextlib.contextmanager
def two_nodes(engine_of: Callable[[], Any], options: dict[str, Any] | None = None) -> Iterator[tuple[Node, Node]]:
    """Two hosts on one cable, not yet converged; their devices and programs end with the test."""
    with contextlib.ExitStack() as stack:
        left, right = (stack.enter_context(Namespace(f"wg{side}")) for side in "ab")
        veth(left, "eth0", right, "eth0")
        nodes = []
        for number, namespace in ((2, left), (3, right)):
            namespace.run(f"ip addr add 192.168.64.{number}/24 dev eth0")
            namespace.run(f"ip addr add 2001:db8:64::{number}/64 dev eth0 nodad")
            node = Node(namespace, number, (engine_of(),), Wireguard(options or {}))
            stack.callback(node.remove_devices)
            stack.callback(node.stop)
            nodes.append(node)
        yield nodes[0], nodes[1]
