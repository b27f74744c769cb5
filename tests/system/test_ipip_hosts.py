"""The ipip backend on whole hosts, where the kernel has it."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

from flanneld.lab.hosts import Lab
from flanneld.lab.wait import wait_until
from tests.system.backend_cases import kernel_has_ipip


@pytest.fixture(autouse=True)
def some_ipip(make_lab: Callable[..., Lab]) -> None:
    if not kernel_has_ipip():
        pytest.skip(f"this kernel ({os.uname().release}) has no module ipip")


@pytest.mark.parametrize("direct", [False, True])
def test_containers_reach_each_other_and_the_device_is_kept(make_lab: Callable[..., Lab], direct: bool) -> None:
    lab = make_lab(2)
    lab.set_config({"Network": "10.5.0.0/16", "Backend": {"Type": "ipip", "DirectRouting": direct}})
    lab.start_daemons()
    one, two = lab.hosts
    here, there = one.container("c"), two.container("c")
    wait_until(lambda: here.ping(there).ok and there.ping(here).ok, 20, "pings both ways")
    assert f"dev {'eth0' if direct else 'flannel.ipip'} " in one.run(f"ip route get {there.address}")
    assert one.daemon.subnet_env()["FLANNEL_MTU"] == "1480"
    wait_until(lambda: here.ping(there, size=1452, dont_fragment=True).ok, 5, "a ping")
    one.run("ip link del flannel.ipip")
    wait_until(lambda: "flannel.ipip" in one.run("ip link"), 20, "the device back")
    wait_until(lambda: here.ping(there).ok, 20, "and its routes")
