"""Dual-stack clusters: two podCIDRs a node, each family with its own annotations, over every backend that has both."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator

import pytest

from flanneld.lab.containers import Container
from flanneld.lab.hosts import Lab
from flanneld.lab.wait import wait_until
from tests.system.backend_cases import UNDERLAY6, VXLAN, mac_of, params
from tests.system.loss import no_packet_lost
from tests.system.test_kube_hosts import PREFIX, Cluster

NETWORK = {"EnableIPv6": True, "Network": "10.244.0.0/16", "IPv6Network": "fd44::/48"}


@pytest.fixture
def cluster(make_lab: Callable[..., Lab]) -> Iterator[Cluster]:
    cluster = Cluster(make_lab(2, etcd=False, underlay6=UNDERLAY6))
    yield cluster
    cluster.kube.stop()


@pytest.mark.parametrize("backend", params(("vxlan", "host-gw", "wireguard")))
def test_containers_of_both_families_reach_each_other(cluster: Cluster, backend: str) -> None:
    cluster.configure({**NETWORK, "Backend": {"Type": backend}})
    lab, kube = cluster.lab, cluster.kube
    for number, host in enumerate(lab.hosts, 1):
        kube.add_node(host.name, f"10.244.{number}.0/24", f"fd44:0:0:{number}::/64")
        host.start_daemon(*cluster.flags)
    for host in lab.hosts:
        host.daemon.wait_ready(30)
    boxes = [host.container("c") for host in lab.hosts]
    assert [box.address6.rsplit(":", 1)[0] for box in boxes] == ["fd44:0:0:1:", "fd44:0:0:2:"]
    reach(boxes)

    for host in lab.hosts:
        told = {k.removeprefix(PREFIX): v for k, v in kube.annotations(host.name).items() if k.startswith(PREFIX)}
        assert told["backend-type"] == backend and told["kube-subnet-manager"] == "true"
        assert (told["public-ip"], told["public-ipv6"]) == (host.address, host.address6)
        data = [json.loads(told[key]) for key in ("backend-data", "backend-v6-data")]
        if backend == "vxlan":
            assert data == [{"VNI": 1, "VtepMAC": mac_of(host, dev)} for dev in VXLAN.values()]
        if backend == "wireguard":
            assert all(each.keys() == {"PublicKey", "Port"} for each in data)
        wait_until(lambda: cluster.condition(host.name) == "False", 10, "NetworkUnavailable=False")

    # The annotations are all that a restarted daemon has, and all that its peers know of it.
    first, before = lab.hosts[0], kube.annotations("h1")
    with no_packet_lost(boxes[0], *boxes[1].addresses):
        first.daemon.restart()
        first.daemon.wait_ready(30)
    assert kube.annotations("h1") == before

    lab.hosts[1].daemon.stop()
    kube.delete_node("h2")
    wait_until(lambda: first.daemon.get("/status").json()["peers"] == 0, 10, "no peer left")
    for family, subnet in ((4, "10.244.2.0/24"), (6, "fd44:0:0:2::/64")):
        shown = f"ip -{family} route"
        wait_until(lambda: subnet not in first.run(shown), 10, lambda: first.run(shown))


def reach(boxes: list[Container]) -> None:
    for here, there in (boxes, boxes[::-1]):
        for address in there.addresses:
            wait_until(lambda: here.ping(address).ok, 15, f"{here.name} to {address}")
