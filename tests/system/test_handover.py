"""Taking over from flanneld on live nodes, standing beside it, and handing back: no packet lost, nothing rewritten.

flanneld (Go) is not available to these tests: ``tests.testbed.flannel_standin`` makes what flanneld v0.28 leaves on a
host and in etcd.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from ipaddress import IPv4Network

import pytest

from flanneld.lab.containers import Container
from flanneld.lab.hosts import Host, Lab
from flanneld.lab.wait import Promised, wait_until
from tests.system.kernel_text import kernel_text, metric
from tests.testbed.flannel_standin import Node, StandIn, read_leases, rules, subnet_env

FLANNEL_KEYS = ["PublicIP", "PublicIPv6", "BackendType", "BackendData"]


@pytest.fixture
def standing(lab: Lab) -> list[StandIn]:
    return build(lab)


def build(lab: Lab, *, vxlan: bool = True) -> list[StandIn]:
    """Three hosts on which flanneld has built its network, over vxlan or host-gw, with a container each."""
    hosts = []
    for i, host in enumerate(lab.hosts):
        mac = f"c6:d2:32:6f:8f:4{i}" if vxlan else ""
        hosts.append(StandIn(host, Node(IPv4Network(f"10.5.{40 + i}.0/24"), host.address, mac)))
    for here in hosts:
        here.start([there.node for there in hosts if there is not here])
        here.host.containers.append(Container(here.host, "c", here))  # type: ignore[arg-type]
    return hosts


@contextlib.contextmanager
def no_packet_lost(here: Host, there: Host) -> Iterator[None]:
    """A hundred pings a second between two containers, all of which must be answered."""
    with here.containers[0].ping_stream(there.containers[0]) as stream:
        wait_until(lambda: len(stream.replies()) >= 20, 10, "twenty replies")
        yield
        after = len(stream.replies())
        wait_until(lambda: len(stream.replies()) >= after + 30, 10, "replies afterwards")
        result = stream.stop()
    assert result.lost == 0, f"{result.lost} of {result.sent} lost"


def take_over(here: StandIn) -> None:
    daemon = here.host.start_daemon("--ip-masq", wait=True)
    assert daemon.subnet_file == here.subnet_file


def etcd_entry(lab: Lab, key: str) -> tuple[str, int, int]:
    """Value, etcd lease and version of a key."""
    (kv,) = json.loads(lab.etcd.ctl("get", key, "-w", "json"))["kvs"]
    return lab.etcd.ctl("get", "--print-value-only", key).strip(), kv["lease"], kv["version"]


@pytest.mark.field_problem(28)
def test_a_takeover_loses_no_packet_and_writes_nothing_into_the_kernel(lab: Lab, standing: list[StandIn]) -> None:
    before = [kernel_text(here.host) for here in standing]
    leases = {here.node.key: etcd_entry(lab, here.node.key) for here in standing}
    for i, here in enumerate(standing):  # node by node, so that both kinds stand in one network meanwhile
        with no_packet_lost(here.host, standing[(i + 1) % 3].host):
            take_over(here)
        assert kernel_text(here.host) == before[i]
        assert metric(here.host, "flanneld_changes_total") == 0
        assert here.subnet_file.read_text() == subnet_env(here.node)
    for here in standing:
        (old, old_lease, old_version), (new, new_lease, new_version) = (
            leases[here.node.key],
            etcd_entry(lab, here.node.key),
        )
        assert new.startswith(old[:-1]), "what flannel reads has changed"
        assert new_version <= old_version + 1, "the key was written more than once"
        assert new_lease == old_lease, "the lease lost the life it had"
        assert list(json.loads(new)) == [*FLANNEL_KEYS, "Node"]
        assert here.host.daemon.ready
    assert [kernel_text(here.host) for here in standing] == before


@pytest.mark.field_problem(28)
def test_what_stands_after_a_stop_is_what_flanneld_would_have_built(
    make_lab: Callable[..., Lab],
) -> None:
    lab = make_lab(3)
    lab.set_config()
    lab.start_daemons("--ip-masq")
    lab.wait_peers()
    for host in lab.hosts:
        host.container("c")
    host = lab.hosts[0]
    ours, text = kernel_text(host), host.daemon.subnet_file.read_text()
    with no_packet_lost(host, lab.hosts[1]):
        assert host.daemon.stop() == 0
        assert kernel_text(host) == ours
        assert host.daemon.subnet_file.read_text() == text

    # flannel reads all leases, and finds its own by its public IP.
    nodes = read_leases(lab.etcd)
    own = next(node for node in nodes if node.public_ip == host.address)
    assert etcd_entry(lab, own.key)[0].startswith(own.value[:-1] + ',"Node":')
    assert text == subnet_env(own)
    assert own.mac in host.run("ip link show flannel.1")

    # The same node made by flanneld looks the same, to the last line.
    peers = [node for node in nodes if node is not own]
    host.run("ip link del flannel.1")
    for table, chain, base in (("nat", "FLANNEL-POSTRTG", "POSTROUTING"), ("filter", "FLANNEL-FWD", "FORWARD")):
        word = "masq" if table == "nat" else "forward"
        jump = ["-m", "comment", "--comment", f"flanneld {word}", "-j", chain]
        host.run(["iptables", "-t", table, "-D", base, *jump])
        host.run(f"iptables -t {table} -F {chain}")
        host.run(f"iptables -t {table} -X {chain}")
    theirs = StandIn(host, own)
    theirs.make_device()
    host.run("iptables-restore --noflush", stdin=rules(own))
    for peer in peers:
        theirs.add_peer(peer)
    seen = kernel_text(host)
    # The same rules once more, with the chains in the order in which they were made.
    assert sorted(seen.pop("nft")) == sorted(ours.pop("nft"))
    assert seen == ours


def test_flanneld_takes_back_a_node_and_the_others_never_notice(lab: Lab, standing: list[StandIn]) -> None:
    for here in standing:
        take_over(here)
    back, other = standing[0], standing[1]
    before = kernel_text(other.host)
    changes = metric(other.host, "flanneld_changes_total")
    with no_packet_lost(other.host, back.host):
        back.host.daemon.stop()
        assert [node for node in read_leases(lab.etcd) if node.public_ip == back.host.address] == [back.node]
        back.claim(lab.etcd)  # the identity goes, as flannel knows none
        wait_until(
            lambda: list(json.loads(etcd_entry(lab, back.node.key)[0])) == FLANNEL_KEYS,
            Promised(5),
            "flannel's own value",
        )
        other.host.daemon.wait_ready()
    assert kernel_text(other.host) == before
    assert metric(other.host, "flanneld_changes_total") == changes
    with no_packet_lost(other.host, back.host):
        take_over(back)
    assert json.loads(etcd_entry(lab, back.node.key)[0])["Node"]["Name"] == back.host.name
    assert metric(back.host, "flanneld_changes_total") == 0


def test_a_takeover_removes_what_flanneld_forgot(lab: Lab, standing: list[StandIn]) -> None:
    """Flannel never removes a peer that left while it was down (field problem 19)."""
    here = standing[0]
    here.add_peer(Node(IPv4Network("10.5.99.0/24"), "172.30.0.99", "c6:d2:32:6f:8f:99"))
    with no_packet_lost(here.host, standing[1].host):
        take_over(here)
        wait_until(lambda: "10.5.99.0/24" not in here.host.run("ip route"), Promised(5), "the stale route gone")
    for command, stale in (("bridge fdb", "c6:d2:32:6f:8f:99"), ("ip neigh", "10.5.99.0")):
        wait_until(lambda: stale not in here.host.run(f"{command} show dev flannel.1"), 5, f"{stale} gone")
    wait_until(lambda: metric(here.host, "flanneld_changes_total") == 3, 5, "three changes")


def test_host_gw_routes_change_hands_without_a_loss(lab: Lab) -> None:
    """Its routes stand on a device that is not ours, so each is replaced once by the same with our protocol number."""
    lab.set_config({"Network": "10.5.0.0/16", "Backend": {"Type": "host-gw"}})
    standing = build(lab, vxlan=False)
    here, there = standing[0], standing[1]
    peers = sorted(f"{peer.node.subnet} via {peer.host.address} dev eth0" for peer in standing[1:])
    with no_packet_lost(here.host, there.host):
        take_over(here)
        assert sorted(line.strip() for line in here.host.run("ip route show proto 241").splitlines()) == peers
        assert metric(here.host, "flanneld_changes_total") == len(peers)
        assert here.subnet_file.read_text() == subnet_env(here.node, mtu=1500)
        assert etcd_entry(lab, here.node.key)[0].startswith(here.node.value[:-1])
        before = kernel_text(here.host, only=("routes", "iptables"))
        here.host.daemon.stop()
        # flannel looks for a route by destination and gateway, finds it, and leaves it alone.
        assert kernel_text(here.host, only=("routes", "iptables")) == before
