"""Hosts of a cluster: daemons with --kube-subnet-mgr, an API server between them, containers that reach each other.

The API server is the fake one, and for the first test a real one, too, where there is one. Nodes and their podCIDRs
are what kubelet and the controller manager would have made.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from flanneld.lab.hosts import Lab
from flanneld.lab.wait import Promised, wait_until
from tests.testbed.fake_kube import FakeKube
from tests.testbed.real_kube import RealKube, assets

PREFIX = "flannel.alpha.coreos.com/"
NET_CONF = {"Network": "10.244.0.0/16", "Backend": {"Type": "vxlan"}}


class Cluster:
    """A lab whose leases are nodes of an API server in a namespace of its own."""

    def __init__(self, lab: Lab, *, real: bool = False) -> None:
        self.lab = lab
        self.net_conf = lab.directory / "net-conf.json"
        self.configure(NET_CONF)
        self.kube: Any
        if real:
            self.kube = RealKube(address=str(lab.underlay[2]), namespace=lab.etcd_ns)
        else:
            with lab.etcd_ns.inside():
                self.kube = FakeKube(address=str(lab.underlay[2]))

    def configure(self, config: dict[str, object]) -> None:
        self.net_conf.write_text(json.dumps(config))

    @property
    def flags(self) -> tuple[str, ...]:
        return (
            "--kube-subnet-mgr",
            f"--kube-api-url={self.kube.url}",
            f"--net-config-path={self.net_conf}",
            "--ip-masq",
        )

    def join(self, *, pod_cidrs: bool = True) -> None:
        """Register every host as kubelet does, and start its daemon."""
        for number, host in enumerate(self.lab.hosts, 1):
            self.kube.add_node(host.name, *([f"10.244.{number}.0/24"] if pod_cidrs else []))
            host.start_daemon(*self.flags)

    def stop_api(self) -> None:
        self.kube.stop()

    def start_api(self) -> None:
        with self.lab.etcd_ns.inside():
            self.kube.start()

    def condition(self, name: str) -> str:
        conditions = self.kube.node(name)["status"]["conditions"]
        return next((c["status"] for c in conditions if c["type"] == "NetworkUnavailable"), "")


@pytest.fixture
def cluster(make_lab: Callable[..., Lab]) -> Iterator[Cluster]:
    cluster = Cluster(make_lab(2, etcd=False))
    yield cluster
    cluster.kube.stop()


@pytest.fixture(params=["fake", "real"] if assets() else ["fake"])
def any_cluster(request: pytest.FixtureRequest, make_lab: Callable[..., Lab]) -> Iterator[Cluster]:
    """On the fake API server, and on a real one where KUBEBUILDER_ASSETS points to it."""
    cluster = Cluster(make_lab(2, etcd=False), real=request.param == "real")
    yield cluster
    cluster.kube.stop()


def test_containers_on_two_nodes_reach_each_other(any_cluster):
    cluster = any_cluster
    lab, kube = cluster.lab, cluster.kube
    cluster.join()
    for host in lab.hosts:
        host.daemon.wait_ready(30)
    lab.wait_peers()
    a, b = lab.hosts[0].container("a"), lab.hosts[1].container("b")
    assert a.address.startswith("10.244.1.")
    wait_until(lambda: a.ping(b.address).ok, 5, "a ping")
    wait_until(lambda: b.ping(a.address).ok, 5, "a ping")
    for host in lab.hosts:
        mac = json.loads(host.run("ip -j link show flannel.1"))[0]["address"]
        assert {k: v for k, v in kube.annotations(host.name).items() if k.startswith(PREFIX)} == {
            PREFIX + "backend-data": f'{{"VNI":1,"VtepMAC":"{mac}"}}',
            PREFIX + "backend-type": "vxlan",
            PREFIX + "kube-subnet-manager": "true",
            PREFIX + "public-ip": host.address,
        }
        wait_until(lambda name=host.name: cluster.condition(name) == "False", 10, "NetworkUnavailable=False")


@pytest.mark.field_problem(9)
def test_a_daemon_waits_for_its_pod_cidr_and_goes_on_within_five_seconds(cluster):
    cluster.join(pod_cidrs=False)
    daemon = cluster.lab.hosts[0].daemon
    wait_until(lambda: "pod cidr not assigned" in daemon.get("/readyz").text, 20, daemon.why_not)
    assert "--pod-network-cidr" in daemon.get("/readyz").text
    cluster.kube.patch_node("h1", {"spec": {"podCIDR": "10.244.1.0/24", "podCIDRs": ["10.244.1.0/24"]}})
    wait_until(lambda: daemon.subnet_env().get("FLANNEL_SUBNET") == "10.244.1.1/24", Promised(5), daemon.why_not)


@pytest.mark.field_problem(8)
def test_a_restart_without_the_api_server_keeps_the_data_path_and_heals(cluster):
    lab = cluster.lab
    cluster.join()
    for host in lab.hosts:
        host.daemon.wait_ready(30)
    lab.wait_peers()
    a, b = lab.hosts[0].container("a"), lab.hosts[1].container("b")
    wait_until(lambda: a.ping(b.address).ok, 5, "a ping")
    mac = cluster.kube.annotations("h1")[PREFIX + "backend-data"]
    daemon = lab.hosts[0].daemon
    cluster.stop_api()
    daemon.restart()
    wait_until(lambda: daemon.get("/readyz").status == 503, 20, daemon.why_not)
    wait_until(lambda: cluster.kube.url in daemon.get("/readyz").text, 20, daemon.why_not)
    wait_until(lambda: a.ping(b.address).ok, 5, "a ping")
    assert daemon.running
    cluster.start_api()
    daemon.wait_ready(30)
    wait_until(lambda: a.ping(b.address).ok, 5, "a ping")
    assert cluster.kube.annotations("h1")[PREFIX + "backend-data"] == mac


@pytest.mark.field_problem(41)
def test_a_node_that_is_deleted_leaves_no_route_behind_and_a_new_one_is_reached(cluster):
    lab = cluster.lab
    cluster.join()
    lab.wait_peers()
    lab.hosts[1].daemon.stop()
    cluster.kube.delete_node("h2")
    first = lab.hosts[0]
    wait_until(lambda: "10.244.2.0/24" not in first.run("ip route"), 10, lambda: first.run("ip route"))
    cluster.kube.add_peer("h9", "10.244.9.0/24", "172.30.0.99", "02:00:00:00:00:09")
    wait_until(lambda: "10.244.9.0/24" in first.run("ip route"), Promised(5), lambda: first.run("ip route"))


@pytest.mark.field_problem(18)
def test_five_thousand_nodes_are_reached_within_a_minute_and_fit_into_110_megabytes(make_lab):
    """Nodes of 15 KB each, as kubelet writes them with their images."""
    lab = make_lab(1, etcd=False)
    cluster = Cluster(lab)
    cluster.configure({"Network": "10.0.0.0/8", "Backend": {"Type": "vxlan"}})
    try:
        for number in range(5000):
            high, low = divmod(number, 250)
            mac = f"02:00:00:00:{high:02x}:{low:02x}"
            cluster.kube.add_peer(
                f"n{number}", f"10.{high + 1}.{low}.0/24", f"172.31.{high}.{low + 1}", mac, weight=15_000
            )
        (host,) = lab.hosts
        cluster.kube.add_node(host.name, "10.244.1.0/24")
        daemon = host.start_daemon(*cluster.flags)

        def peers() -> int:
            return host.run("ip route show dev flannel.1", check=False).count(" via ")

        wait_until(lambda: daemon.ready and peers() == 5000, 60, daemon.why_not, interval=0.5)
        status = Path(f"/proc/{daemon.process.pid}/status").read_text()
        memory = {
            line.split(":")[0]: int(line.split()[1]) // 1024 for line in status.splitlines() if line.startswith("Vm")
        }
        assert memory["VmRSS"] <= 110, memory
    finally:
        cluster.kube.stop()


@pytest.mark.field_problem(22)
def test_an_operators_address_for_a_running_node_is_published_at_once(cluster: Cluster) -> None:
    cluster.join()
    host = cluster.lab.hosts[0]
    host.daemon.wait_ready()
    host.run("ip addr add 172.30.0.99/24 dev eth0")
    cluster.kube.annotate(host.name, {PREFIX + "node-public-ip": "172.30.0.99"})
    wait_until(
        lambda: cluster.kube.annotations(host.name)[PREFIX + "public-ip"] == "172.30.0.99", Promised(5), "the address"
    )
    wait_until(
        lambda: "172.30.0.99" in cluster.lab.hosts[1].run("bridge fdb show dev flannel.1"),
        Promised(5),
        "the peer's entry",
    )
