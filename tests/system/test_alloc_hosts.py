"""The alloc backend: a subnet for each host, and who carries the packets is somebody else's business."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from flanneld.lab.hosts import Lab
from flanneld.lab.wait import wait_until
from tests.system.backend_cases import DUAL, UNDERLAY6
from tests.system.whole_host import everything, use_iptables

NO_FIREWALL = (
    "ip -o link",
    "ip -o addr",
    "ip route show table all",
    "ip -6 route show table all",
    "bridge fdb show",
)


@pytest.fixture
def running(make_lab: Callable[..., Lab]) -> Lab:
    lab = make_lab(2, underlay6=UNDERLAY6)
    lab.set_config({**DUAL, "Backend": {"Type": "alloc"}})
    return lab


def leases(lab: Lab) -> dict[str, dict]:
    lines = lab.etcd.ctl("get", "--prefix", "/coreos.com/network/subnets/").splitlines()
    return {key.rsplit("/", 1)[1]: json.loads(value) for key, value in zip(lines[::2], lines[1::2], strict=True)}


def test_it_leases_a_subnet_writes_the_file_and_leaves_the_rest_alone(running: Lab) -> None:
    host = running.hosts[0]
    before = everything(host, NO_FIREWALL)
    running.start_daemons("--ip-masq")
    wait_until(lambda: len(leases(running)) == 2, 10, "two leases")
    assert everything(host, NO_FIREWALL) == before

    told = host.daemon.subnet_env()
    assert told["FLANNEL_NETWORK"] == "10.5.0.0/16" and told["FLANNEL_IPV6_NETWORK"] == "fd05::/48"
    assert told["FLANNEL_MTU"] == "1500" and told["FLANNEL_IPMASQ"] == "true"
    key = f"{told['FLANNEL_SUBNET']}&{told['FLANNEL_IPV6_SUBNET']}".replace(".1/", ".0-").replace("::1/", "::-")
    lease = leases(running)[key]
    assert (lease["PublicIP"], lease["PublicIPv6"]) == (host.address, host.address6)
    assert "BackendType" not in lease and "BackendData" not in lease

    rules = host.run("iptables-save") + host.run("ip6tables-save")
    assert "-A FLANNEL-POSTRTG -s 10.5.0.0/16" in rules and "-A FLANNEL-POSTRTG -s fd05::/48" in rules
    assert host.daemon.get("/status").json()["backend"] == "alloc"


@pytest.mark.field_problem(28)
@pytest.mark.field_problem(42)
def test_a_restart_keeps_the_subnet_and_cleanup_leaves_nothing(running: Lab) -> None:
    host = running.hosts[0]
    use_iptables(host)
    before = everything(host)
    host.start_daemon("--ip-masq", wait=True)
    subnets = host.daemon.subnet_env()
    host.daemon.restart()
    host.daemon.wait_ready()
    assert host.daemon.subnet_env() == subnets
    host.daemon.stop()
    assert everything(host) != before, "the rules stay when the daemon stops"
    done = host.ctl("cleanup")
    assert done.returncode == 0, done.stdout + done.stderr
    assert everything(host) == before
    assert not list(host.daemon.run_dir.iterdir())
