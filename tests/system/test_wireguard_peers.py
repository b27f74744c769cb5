"""The peers of WireGuard devices, removed, altered or added by wg(8), on every case of the backend."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from flanneld.dataplane.wireguard_device import Engine, PeerWrite
from flanneld.dataplane.wireguard_kernel import Kernel
from flanneld.dataplane.wireguard_userspace import Userspace
from flanneld.lab.hosts import Host
from flanneld.lab.wait import Promised, wait_until
from tests.system.backend_cases import Running, params, running_case

PROMISE = Promised(5)

STRAY = "c3RyYXkgc3RyYXkgc3RyYXkgc3RyYXkgc3RyYXkgc3Q="
"""A public key, and where that is wanted a preshared one."""

DAMAGE: dict[str, Callable[[str], list[PeerWrite]]] = {
    "one removed, another added": lambda peer: [
        PeerWrite(peer, remove=True),
        PeerWrite(STRAY, endpoint="172.30.0.77:51820", allowed_ips=("10.5.250.0/24",)),
    ],
    "one altered": lambda peer: [
        PeerWrite(peer, allowed_ips=("10.5.249.0/24",), keepalive=77, preshared_key=STRAY),
    ],
}


@pytest.fixture(scope="module", params=params(("wireguard", "wireguard dual", "wireguard auto", "wireguard v6")))
def running(request: pytest.FixtureRequest) -> Iterator[Running]:
    with running_case(request.param) as running:
        yield running


@pytest.mark.field_problem(1)
@pytest.mark.field_problem(32)
@pytest.mark.parametrize("what", DAMAGE)
def test_peers_come_right(running: Running, what: str) -> None:
    host, devices = running.host, set(running.case.devices.values())
    before = {dev: peers(host, dev) for dev in devices}
    for dev in devices:
        (key,) = before[dev]
        with host.ns.inside():
            engine(host).write(dev, DAMAGE[what](key))
        assert peers(host, dev) != before[dev]
    wait_until(lambda: {dev: peers(host, dev) for dev in devices} == before, PROMISE, f"{what}: {before} again")
    running.ping_all(PROMISE)


def peers(host: Host, dev: str) -> dict[str, tuple[Any, ...]]:
    """By public key, without what only counts."""
    with host.ns.inside():
        found = engine(host).read(dev).peers
    return {key: (p.endpoint, p.allowed_ips, p.keepalive, p.preshared_key) for key, p in found.items()}


def engine(host: Host) -> Engine:
    """As the daemon says; to be used inside the host."""
    tunnels = host.daemon.get("/status").json()["tunnels"].values()
    return Kernel() if all(tunnel["engine"] == "kernel" for tunnel in tunnels) else Userspace()
