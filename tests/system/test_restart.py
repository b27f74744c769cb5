"""Stopping, killing and restarting the daemon, and losing its store, take no packet."""

from __future__ import annotations

import contextlib
import signal
import time

import pytest

from flanneld.desired import LINGER
from flanneld.lab.hosts import Daemon, Lab
from flanneld.lab.netns import end
from flanneld.lab.wait import Promised, wait_until
from tests.system.kernel_text import kernel_text, metric
from tests.system.loss import no_packet_lost


@pytest.fixture
def running(lab: Lab) -> Lab:
    lab.start_daemons("--ip-masq")
    lab.wait_peers()
    for host in lab.hosts:
        host.container("c")
    return lab


def containers(lab: Lab):
    return [host.containers[0] for host in lab.hosts]


@pytest.mark.field_problem(28)
@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGKILL])
def test_a_restart_loses_nothing_and_writes_nothing(running: Lab, sig: signal.Signals) -> None:
    host = running.hosts[0]
    before, subnet = kernel_text(host), host.daemon.subnet_env()
    revision = revision_of(running)
    with no_packet_lost(*containers(running)[:2]):
        code = host.daemon.stop(sig)
        assert kernel_text(host) == before
        host.daemon.start()
        host.daemon.wait_ready()
    assert code == (0 if sig == signal.SIGTERM else -9)
    assert kernel_text(host) == before
    assert host.daemon.subnet_env() == subnet
    assert metric(host, "flanneld_changes_total") == 0
    assert leases_revision(running) <= revision, "a restart rewrote a lease and woke everybody"


def revision_of(lab: Lab) -> int:
    return leases_revision(lab)


def leases_revision(lab: Lab) -> int:
    """The newest revision of any lease key."""
    import json

    answer = json.loads(lab.etcd.ctl("get", "--prefix", "/coreos.com/network/subnets/", "-w", "json"))
    return max(kv["mod_revision"] for kv in answer["kvs"])


@pytest.mark.field_problem(19)
def test_what_left_while_the_daemon_was_down_is_removed_at_its_start_and_nothing_else(running: Lab) -> None:
    host, gone = running.hosts[0], running.hosts[2]
    subnet = gone.daemon.subnet_env()["FLANNEL_SUBNET"].replace(".1/24", ".0/24")
    host.daemon.stop()
    gone.daemon.kill()
    host.run("ip route add 10.5.240.0/24 via 172.30.0.1 dev eth0 proto static")
    running.etcd.ctl("del", f"/coreos.com/network/subnets/{subnet.replace('/', '-')}")
    assert subnet in host.run("ip route show dev flannel.1")
    host.daemon.start()
    host.daemon.wait_ready()
    wait_until(lambda: subnet not in host.run("ip route"), Promised(5), "the stale route gone")
    wait_until(lambda: host.run("bridge fdb show dev flannel.1").count(" dst ") == 1, 5, "one forwarding entry")
    neighbours = "ip neigh show dev flannel.1 nud permanent"
    wait_until(lambda: host.run(neighbours).count("lladdr") == 1, 5, "one neighbour")
    assert "10.5.240.0/24" in host.run("ip route")
    wait_until(lambda: host.containers[0].ping(running.hosts[1].containers[0]).ok, 5, "a ping")


@pytest.mark.field_problem(8)
def test_started_without_its_store_it_touches_nothing_and_heals(running: Lab) -> None:
    host = running.hosts[0]
    before = kernel_text(host)
    running.etcd.stop()
    host.daemon.restart()
    where = running.etcd.endpoint.removeprefix("http://")
    wait_until(lambda: where in reason(host.daemon, "lease"), 20, "a reason that names the store")
    assert host.daemon.running
    assert kernel_text(host) == before
    wait_until(lambda: containers(running)[0].ping(containers(running)[1]).ok, 5, "a ping")
    assert host.daemon.get("/healthz").status == 200
    running.etcd.start()
    host.daemon.wait_ready(30)
    assert kernel_text(host) == before


@pytest.mark.field_problem(5)
@pytest.mark.field_problem(38)
def test_a_bad_configuration_is_told_and_the_good_one_stays_in_use(running: Lab) -> None:
    before = [kernel_text(host) for host in running.hosts]
    with no_packet_lost(*containers(running)[:2]):
        running.etcd.ctl("put", "/coreos.com/network/config", '{"Network": "10.5.0.0/33"}')
        for host in running.hosts:
            wait_until(lambda host=host: "10.5.0.0/33" in reason(host.daemon, "stored_config"), 10, "the reason told")
        running.set_config()
        for host in running.hosts:
            host.daemon.wait_ready(10)
    assert [kernel_text(host) for host in running.hosts] == before


def reason(daemon: Daemon, condition: str) -> str:
    with contextlib.suppress(OSError):
        answer = daemon.get("/readyz")
        if answer.status == 503:
            return next((line for line in answer.text.splitlines() if line.startswith(f"- {condition}:")), "")
    return ""


@pytest.mark.field_problem(14)
@pytest.mark.parametrize("wipe", [False, True])
def test_a_lost_or_wiped_store_takes_no_packet_and_is_filled_again(running: Lab, wipe: bool) -> None:
    before = [kernel_text(host) for host in running.hosts]
    with no_packet_lost(*containers(running)[:2]):
        running.etcd.stop(wipe=wipe)
        daemon = running.hosts[0].daemon
        # Whoever meets it first; when both have, it is told once.
        wait_until(lambda: reason(daemon, "store") or reason(daemon, "lease"), 40, "not ready while the store is away")
        running.etcd.start()
        if wipe:
            running.set_config()
        for host in running.hosts:
            host.daemon.wait_ready(40)
        wait_until(lambda: lease_count(running) == 3, 30, "three leases in the store")
    assert [kernel_text(host) for host in running.hosts] == before


def lease_count(lab: Lab) -> int:
    return len(lab.etcd.ctl("get", "--prefix", "--keys-only", "/coreos.com/network/subnets/").split())


@pytest.mark.field_problem(13)
def test_its_own_lease_deleted_is_claimed_again_without_an_exit(running: Lab) -> None:
    host = running.hosts[0]
    before, subnet = kernel_text(host), host.daemon.subnet_env()
    key = "/coreos.com/network/subnets/" + subnet["FLANNEL_SUBNET"].replace(".1/24", ".0-24")

    def lost_and_found() -> bool:
        """Nothing is lost, or the lease was away for longer than peers wait for it: that shows nothing."""
        away = 0.0
        try:
            with no_packet_lost(*containers(running)[:2]):
                began = time.monotonic()
                running.etcd.ctl("del", key)
                wait_until(lambda: running.etcd.ctl("get", "--keys-only", key).strip() == key, 10, "the lease back")
                away = time.monotonic() - began
                host.daemon.wait_ready()
        except AssertionError:
            if away < LINGER / 2:
                raise
            return False
        return True

    assert any(lost_and_found() for _ in range(5)), "a machine that is quick enough for once"
    assert host.daemon.running
    assert kernel_text(host) == before


@pytest.mark.field_problem(5)
def test_bad_keys_change_nothing_but_a_counter(running: Lab) -> None:
    host = running.hosts[0]
    before = kernel_text(host)
    prefix = "/coreos.com/network"
    for key, value in {
        f"{prefix}/subnets/foo": "bar",
        f"{prefix}/subnets/10.5.300.0-24": "{}",
        f"{prefix}/subnets/10.5.200.0-24": "{not json",
        f"{prefix}/subnets-old/10.5.201.0-24": '{"PublicIP":"172.30.0.99","BackendType":"vxlan"}',
        f"{prefix}/subnets/10.77.1.0-24": '{"PublicIP":"172.30.0.98","BackendType":"vxlan",'
        '"BackendData":{"VNI":1,"VtepMAC":"02:00:00:00:00:98"}}',
    }.items():
        running.etcd.ctl("put", key, value)
    wait_until(lambda: metric(host, "flanneld_store_errors_total") >= 3, 10, "bad keys counted")
    wait_until(lambda: metric(host, "flanneld_refused_peers") == 1, 10, "the foreign subnet refused")
    assert kernel_text(host) == before
    assert host.daemon.ready


@pytest.mark.field_problem(41)
def test_the_lease_of_a_node_that_is_gone_is_released_without_force(running: Lab) -> None:
    gone = running.hosts[1]
    subnet = gone.daemon.subnet_env()["FLANNEL_SUBNET"].replace(".1/24", ".0/24")
    refused = running.hosts[0].ctl("release", subnet)
    assert refused.returncode == 1 and "node h2" in refused.stderr and "which runs" in refused.stderr
    gone.daemon.stop()
    # It takes its sign of life with it; if etcd does not answer that soon, the sign expires within half a minute.
    wait_until(lambda: running.hosts[0].ctl("release", subnet).returncode == 0, 15, "the lease released")
    assert subnet not in running.hosts[0].ctl("leases").stdout


@pytest.mark.field_problem(5)
def test_its_own_lease_made_unreadable_is_written_again(running: Lab) -> None:
    host = running.hosts[0]
    before = kernel_text(host)
    key = "/coreos.com/network/subnets/" + host.daemon.subnet_env()["FLANNEL_SUBNET"].replace(".1/24", ".0-24")
    value = running.etcd.ctl("get", key)
    running.etcd.ctl("put", key, "garbage")
    wait_until(lambda: running.etcd.ctl("get", key) == value, 20, "the lease written again")
    assert "unreadable" not in host.ctl("leases").stdout
    assert kernel_text(host) == before
    host.daemon.wait_ready()
    told = "somebody wrote into this node's lease what nobody can read"
    wait_until(lambda: host.daemon.log.read_text().count(told) == 1, 5, "it is told once")
    log = host.daemon.log.read_text()
    assert "gone from etcd" not in log and "is now leased to" not in log


@pytest.mark.field_problem(11)
def test_a_lease_that_another_node_took_is_an_alarm_and_the_data_path_stays(running: Lab) -> None:
    host = running.hosts[0]
    before = kernel_text(host)
    key = "/coreos.com/network/subnets/" + host.daemon.subnet_env()["FLANNEL_SUBNET"].replace(".1/24", ".0-24")
    thief = (
        '{"PublicIP":"172.30.0.99","PublicIPv6":null,"BackendType":"vxlan",'
        '"BackendData":{"VNI":1,"VtepMAC":"02:00:00:00:00:99"}}'
    )
    running.etcd.ctl("put", key, thief)
    wait_until(lambda: "172.30.0.99" in reason(host.daemon, "lease"), 10, "not ready, and why")
    assert host.daemon.running
    assert kernel_text(host) == before
    assert running.etcd.ctl("get", "--print-value-only", key).strip() == thief, "the loser wrote"
    running.etcd.ctl("del", key)
    host.daemon.wait_ready(15)


def test_a_second_signal_ends_it_at_once(running: Lab) -> None:
    assert end(running.hosts[2].daemon.process) == 0
