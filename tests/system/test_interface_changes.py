"""What happens to the interface underneath is followed by every backend: its MTU, its link, another one in its place."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from flanneld.lab.wait import Promised, wait_until
from tests.system.backend_cases import GATEWAYS, Running, params, running_case

SOON = Promised(5)
NUMBER = 11
"""The first host's, on the underlay."""


@pytest.fixture(
    scope="module", params=params(("vxlan", "vxlan v6", "host-gw", "host-gw v6", "udp", "wireguard", "wireguard dual"))
)
def running(request: pytest.FixtureRequest) -> Iterator[Running]:
    """Two hosts that run one case, shared by the tests of it: each leaves them as they were."""
    with running_case(request.param) as running:
        yield running


@pytest.mark.field_problem(17)
def test_the_underlays_mtu_is_followed_in_place(running: Running) -> None:
    before = links(running)
    for mtu, less in ((1400, 100), (1500, 0)):
        running.host.run(f"ip link set eth0 mtu {mtu}")
        wait_until(lambda: published(running) == running.case.mtu - less, SOON, "the MTU in subnet.env")
        expected = [(index, was - less) for index, was in before]
        wait_until(lambda: links(running) == expected, SOON, lambda: f"{links(running)} to be {expected}")
    running.ping_all(SOON)


def published(running: Running) -> int:
    return int(running.host.daemon.subnet_env()["FLANNEL_MTU"])


def links(running: Running) -> list[tuple[int, int]]:
    """Index and MTU of each of our devices; a device that was made anew has another index."""
    shown = [json.loads(running.host.run(f"ip -j link show dev {dev}"))[0] for dev in running.case.devices.values()]
    return [(link["ifindex"], link["mtu"]) for link in shown]


@pytest.mark.field_problem(1)
def test_an_interface_that_goes_down_and_up(running: Running) -> None:
    host = running.host
    host.run("ip link set eth0 down")
    wait_until(lambda: not host.daemon.ready, SOON, "not ready")
    host.run("ip link set eth0 up")
    # The kernel has forgotten these; whoever brings the interface up sets them again.
    host.run(f"ip addr replace {host.address6}/64 dev eth0 nodad")
    for gateway in GATEWAYS.values():
        host.run(f"ip route replace default via {gateway}")
    running.ping_all(SOON)
    wait_until(lambda: host.daemon.ready, SOON, "ready")


@pytest.mark.field_problem(22)
def test_an_interface_that_is_replaced_by_another_of_its_name_and_address(running: Running) -> None:
    host, subnets = running.host, running.host.daemon.subnet_env()
    host.run("ip link del eth0")
    running.lab.plug(host.ns, "eth0", NUMBER)
    running.ping_all(SOON)
    wait_until(lambda: host.daemon.ready, SOON, "ready")
    assert host.daemon.subnet_env() == subnets


@pytest.mark.field_problem(22)
def test_an_interface_that_gets_another_mac(running: Running) -> None:
    host = running.host
    host.run("ip link set eth0 address 02:00:00:00:30:0b")
    running.ping_all(SOON)
    wait_until(lambda: host.daemon.ready, SOON, "ready")
