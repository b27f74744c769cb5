"""flanneld.service under a real systemd: started, confined, restarted, killed, hung, stopped; and no packet is lost."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import pytest

from flanneld.lab.hosts import Lab
from flanneld.lab.wait import wait_until
from tests.system.backend_cases import needs_wireguard
from tests.system.kernel_text import kernel_text
from tests.system.loss import no_packet_lost
from tests.testbed.systemd import Systemd

WATCHDOG = "[Service]\nWatchdogSec=4\n"
"""The unit's own 30 s are long to wait for."""


@pytest.fixture(params=["vxlan", pytest.param("wireguard", marks=needs_wireguard)])
def lab(make_lab: Callable[..., Lab], request: pytest.FixtureRequest) -> Lab:
    lab = make_lab(2)
    lab.set_config({"Network": "10.5.0.0/16", "Backend": {"Type": request.param}})
    lab.hosts[1].start_daemon(wait=True)
    lab.hosts[1].container("c")
    return lab


@pytest.fixture
def systemd(lab: Lab) -> Iterator[Systemd]:
    variables = {
        "FLANNELD_ETCD_ENDPOINTS": lab.etcd.endpoint,
        "FLANNELD_NODE_NAME": "h1",
        "FLANNELD_HEALTHZ_IP": "127.0.0.1",
        "FLANNELD_HEALTHZ_PORT": "8081",
    }
    with Systemd(lab.hosts[0].ns, lab.hosts[0].directory, variables, WATCHDOG) as systemd:
        yield systemd


@pytest.mark.field_problem(28)
@pytest.mark.field_problem(36)
def test_the_unit_runs_flanneld_and_no_packet_is_lost_whatever_happens_to_it(lab: Lab, systemd: Systemd) -> None:
    host, there = lab.hosts[0], lab.hosts[1].containers[0]
    # "start" comes back when systemd has been told READY: what is ordered after the unit finds its subnet.
    assert systemd.ctl("start", "flanneld") == "", systemd.journal()
    environment = systemd.run("cat", "/run/flannel/subnet.env")
    (subnet,) = re.findall(r"FLANNEL_SUBNET=(10\.5\.\d+)\.1/24", environment)
    assert systemd.show("ActiveState") == "active"
    assert systemd.show("StatusText") == f"ready, subnet {subnet}.0/24"
    assert re.fullmatch(r"cap_net_admin cap_net_raw cap_sys_module", systemd.show("CapabilityBoundingSet"))
    wait_until(lambda: there.ping(f"{subnet}.0").ok, 20, "a ping to its device")
    before = kernel_text(host)

    def another_process(old: str) -> bool:
        return systemd.show("ActiveState") == "active" and systemd.show("MainPID") not in (old, "0")

    with no_packet_lost(there, f"{subnet}.0"):
        pid = systemd.show("MainPID")
        systemd.ctl("restart", "flanneld")
        assert another_process(pid), systemd.journal()
        for signal in ("KILL", "STOP"):  # the second is for the watchdog to find
            pid = systemd.show("MainPID")
            systemd.ctl("kill", f"--signal={signal}", "--kill-whom=main", "flanneld")
            wait_until(lambda pid=pid: another_process(pid), 40, systemd.journal)
        pid = systemd.show("MainPID")
        systemd.ctl("reload", "flanneld")
        assert systemd.show("MainPID") == pid
        systemd.ctl("stop", "flanneld")
        assert systemd.show("ActiveState") == "inactive", systemd.ctl("status", "flanneld")
        assert systemd.show("Result") == "success"
    assert systemd.run("cat", "/run/flannel/subnet.env") == environment
    assert kernel_text(host) == before
    assert "Traceback" not in systemd.journal()
    assert systemd.journal().count("lease acquired") == 4
