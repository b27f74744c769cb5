"""The lab itself: what the system tests stand on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from flanneld.lab import wait
from flanneld.lab.hosts import Host, Lab
from flanneld.lab.netns import RUN_ID, run
from flanneld.lab.wait import NotYet, wait_until

IDLE = ("sh", "-c", "exec sleep 1000", "idle")
"""Stands in for the daemon where a test brings its own subnet.env."""


def pretend_lease(host: Host, subnet: str, *, subnet6: str | None = None) -> None:
    """Start a stand-in daemon and write what flanneld would have written."""
    daemon = host.start_daemon()
    text = f"FLANNEL_NETWORK=10.5.0.0/16\nFLANNEL_SUBNET={subnet}\n"
    text += f"FLANNEL_IPV6_NETWORK=fd05::/48\nFLANNEL_IPV6_SUBNET={subnet6}\n" if subnet6 else ""
    daemon.subnet_file.write_text(f"{text}FLANNEL_MTU=1450\nFLANNEL_IPMASQ=false\n")


def test_hosts_reach_each_other_and_etcd(make_lab: Callable[..., Lab]) -> None:
    lab = make_lab(3, underlay6="fd30::/64", second="172.31.0.0/24", mtu=1400)
    first, last = lab.hosts[0], lab.hosts[-1]
    wait_until(lambda: first.ping(last.address).ok, 5, "a ping")
    assert last.address6 is not None
    wait_until(lambda: first.ping(last.address6).ok, 5, "a ping")
    assert last.second_address is not None
    wait_until(lambda: first.ping(last.second_address).ok, 5, "a ping")
    wait_until(lambda: first.ping(last.address, size=1372, dont_fragment=True).ok, 5, "a ping")
    assert not first.ping(last.address, size=1373, dont_fragment=True).ok
    assert lab.etcd.ctl("put", "a", "b").strip() == "OK"
    first.run(["bash", "-c", f"exec 3<>/dev/tcp/{lab.etcd.address}/{lab.etcd.port}"])


@pytest.mark.parametrize("by", ["cni", "hand"])
def test_containers_talk_through_their_hosts(make_lab: Callable[..., Lab], by: str) -> None:
    lab = make_lab(2, etcd=False, program=IDLE, underlay6="fd30::/64")
    for number, host in enumerate(lab.hosts, 1):
        pretend_lease(host, f"10.5.{number}.1/24", subnet6=f"fd05:0:0:{number}::1/64")
        for other, peer in enumerate(lab.hosts, 1):
            if peer is not host:
                host.run(f"ip route add 10.5.{other}.0/24 via {peer.address}")
                host.run(f"ip route add fd05:0:0:{other}::/64 via {peer.address6}")
    here, there = (host.container("a", by=by) for host in lab.hosts)
    neighbour = lab.hosts[0].container("b", by=by)
    assert len({here.address, there.address, neighbour.address}) == 3
    wait_until(lambda: here.ping(neighbour).ok, 5, "a ping")
    wait_until(lambda: here.ping(there, size=1422, dont_fragment=True).ok, 5, "a ping")
    wait_until(lambda: here.ping(there.address6).ok, 5, "IPv6 between the containers")
    with here.ping_stream(there) as stream:
        wait_until(lambda: len(stream.replies()) >= 20, 10, "twenty replies")
        result = stream.stop()
    assert result.received >= 20 and result.longest_gap < 5


@pytest.mark.field_problem(21)
def test_a_host_behind_a_router_is_reached_at_its_public_address(make_lab: Callable[..., Lab]) -> None:
    lab = make_lab(2, nat=("h1", "h2"), etcd=False)
    first, second = lab.hosts
    assert first.address == second.address and first.public_address != second.public_address
    wait_until(lambda: first.ping(second.public_address).ok, 5, "a ping")
    wait_until(lambda: second.ping(first.public_address).ok, 5, "a ping")


def test_daemons_have_their_own_hostname_and_end_with_the_lab(make_lab: Callable[..., Lab]) -> None:
    with make_lab(1, etcd=False, program=("sh", "-c", "hostname; echo $NODE_NAME; exec sleep 1000", "idle")) as lab:
        daemon = lab.hosts[0].start_daemon()
        wait_until(lambda: daemon.output().splitlines() == ["h1", "h1"], 5, "both names")
        assert not daemon.ready
        directory = lab.directory
    assert daemon.process.returncode is not None
    assert not directory.exists()
    assert not list(Path("/var/run/netns").glob(f"{RUN_ID}-*"))


def test_a_daemon_that_dies_is_shown_with_its_log(make_lab: Callable[..., Lab]) -> None:
    lab = make_lab(1, etcd=False, program=("sh", "-c", "echo no such luck; exit 3", "dying"))
    with pytest.raises(RuntimeError, match="exited 3:\nno such luck"):
        lab.hosts[0].start_daemon(wait=True)


def test_a_failure_while_building_leaves_nothing(make_lab: Callable[..., Lab]) -> None:
    def namespaces() -> list[str]:
        """Ours; another run's come and go."""
        return [line for line in run(["ip", "netns", "list"]).splitlines() if line.startswith(RUN_ID)]

    before = namespaces()
    with pytest.raises(RuntimeError, match="etcd did not start"):
        make_lab(1, etcd_extra=("--no-such-flag",))
    assert namespaces() == before


def test_waiting_says_what_was_there_instead() -> None:
    with pytest.raises(NotYet, match=rf"not within {0.05 * wait.patience:g} s: a miracle \(last answer: 0\)"):
        wait_until(lambda: 0, 0.05, "a miracle")
