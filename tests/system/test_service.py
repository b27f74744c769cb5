"""The daemon as a service: what its supervisor sees and sends."""

from __future__ import annotations

import signal
import socket
import time
from collections.abc import Callable

import pytest

from flanneld.lab import wait
from flanneld.lab.hosts import Lab
from flanneld.lab.wait import clock, wait_until
from tests.system.kernel_text import metric
from tests.system.test_symptoms import events, reasons


@pytest.fixture
def single(make_lab: Callable[..., Lab]) -> Lab:
    lab = make_lab(1)
    lab.set_config()
    return lab


@pytest.mark.field_problem(36)
def test_systemd_hears_of_ready_when_the_subnet_file_is_there_and_of_life_until_the_end(single: Lab) -> None:
    path = single.directory / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(path))
        systemd.settimeout(20 * wait.patience)
        daemon = single.hosts[0].start_daemon(env={"NOTIFY_SOCKET": str(path), "WATCHDOG_USEC": "1000000"})
        while "READY=1" not in (heard := systemd.recv(4096).decode()):
            assert heard.startswith(("STATUS=not ready", "WATCHDOG=1"))
        assert daemon.subnet_env()["FLANNEL_NETWORK"] == "10.5.0.0/16"
        assert "STATUS=ready, subnet 10.5." in heard
        lives = clock()
        for _ in range(3):
            while (heard := systemd.recv(4096).decode()) != "WATCHDOG=1":
                assert heard.startswith("STATUS=")
        assert clock() - lives < 10
        assert daemon.stop() == 0
        while (heard := systemd.recv(4096).decode()) != "STOPPING=1":
            assert heard.startswith(("STATUS=", "WATCHDOG=1"))


@pytest.mark.field_problem(8)
@pytest.mark.parametrize("silent", [False, True], ids=["refused", "unanswered"])
def test_it_stops_soon_although_its_store_is_away(single: Lab, silent: bool) -> None:
    host = single.hosts[0]
    daemon = host.start_daemon(wait=True)
    if silent:
        host.run(f"ip route add blackhole {single.etcd.address}/32")
    else:
        single.etcd.stop()
    began = clock()
    assert daemon.stop(timeout=30) == 0
    assert clock() - began < 8
    assert "Traceback" not in daemon.log.read_text()


def test_a_status_port_that_is_taken_is_named_and_ends_the_start(single: Lab) -> None:
    host = single.hosts[0]
    with host.ns.inside():
        other = socket.create_server(("127.0.0.1", 8081))
    with other:
        daemon = host.start_daemon()
        wait_until(lambda: not daemon.running, 15, "the daemon's end")
    assert daemon.process.returncode == 1
    last = events(daemon)[-1]
    assert last["level"] == "error"
    assert "--healthz-port=8081: Address already in use" in last["event"]


def test_hangup_reads_the_configuration_again_and_its_mending_needs_no_signal(single: Lab) -> None:
    daemon = single.hosts[0].start_daemon(wait=True)
    before = daemon.subnet_env()
    single.set_config("{")
    daemon.process.send_signal(signal.SIGHUP)
    wait_until(lambda: "not JSON" in reasons(daemon).get("config", ""), 15, daemon.why_not)
    assert "/coreos.com/network/config" in reasons(daemon)["config"]
    single.set_config()
    daemon.wait_ready(15)
    assert daemon.subnet_env() == before


def test_hangup_costs_nothing_where_all_is_well(single: Lab) -> None:
    host = single.hosts[0]
    daemon = host.start_daemon(wait=True)
    changes, passes = metric(host, "flanneld_changes_total"), metric(host, "flanneld_reconcile_passes_total")
    daemon.process.send_signal(signal.SIGHUP)
    wait_until(lambda: metric(host, "flanneld_reconcile_passes_total") > passes, 10, "a pass")
    # What the store shows after it was connected anew arrives.
    value = '{"PublicIP":"203.0.113.9","BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"02:00:00:00:00:09"}}'
    assert metric(host, "flanneld_changes_total") == changes
    single.etcd.ctl("put", "/coreos.com/network/subnets/10.5.9.0-24", value)
    wait_until(lambda: "10.5.9.0" in host.run("ip route"), 10, "the peer")
    assert [event for event in events(daemon) if event["level"] in ("error", "warning")] == []


def test_killed_at_any_moment_of_its_start_it_leaves_nothing_that_the_next_start_minds(single: Lab) -> None:
    host = single.hosts[0]
    daemon = host.start_daemon(wait=True)
    before = daemon.subnet_env()
    for tenths in (1, 3, 4, 5, 6, 8):
        daemon.kill()
        daemon.start()
        time.sleep(tenths / 10)  # where in its start it is hit is up to chance: any moment must do
    daemon.kill()
    daemon.start()
    daemon.wait_ready()
    assert daemon.subnet_env() == before
    # A file that was being written when it was killed is used up by the next write, or stays the only one.
    files = {file.name for file in daemon.run_dir.iterdir() if not file.name.endswith(".tmp")}
    assert files == {"flanneld-status.json", "subnet.env", "subnet.env.lock"}
    assert len(single.etcd.ctl("get", "--prefix", "--keys-only", "/coreos.com/network/subnets/").split()) == 1
    assert not [event for event in events(daemon) if "exception" in event]
