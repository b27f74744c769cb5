"""Packets of containers against a host's firewall, and what the daemon says about its own health."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from flanneld.lab.hosts import Host, Lab
from flanneld.lab.wait import wait_until
from tests.system.kernel_text import metric

CONFIGS = {
    "iptables": {"Network": "10.5.0.0/16", "Backend": {"Type": "vxlan", "TxChecksumOffload": "off"}},
    "nftables": {"Network": "10.5.0.0/16", "EnableNFTables": True, "Backend": {"Type": "vxlan"}},
}


@pytest.fixture(scope="module", params=list(CONFIGS))
def running(request: pytest.FixtureRequest) -> Iterator[Lab]:
    with Lab(2) as lab:
        lab.set_config(CONFIGS[request.param])
        lab.start_daemons("--ip-masq")
        lab.wait_peers()
        for host in lab.hosts:
            host.container("c")
        lab.mode = request.param
        yield lab


def cross_ping(lab: Lab) -> bool:
    here, there = (host.containers[0] for host in lab.hosts)
    return here.ping(there).ok and there.ping(here).ok


@pytest.mark.field_problem(16)
@pytest.mark.parametrize(
    ("block", "undo"),
    [
        ("iptables -A FORWARD -j REJECT", "iptables -D FORWARD -j REJECT"),
        ("iptables -P FORWARD DROP", "iptables -P FORWARD ACCEPT"),
    ],
)
def test_pods_talk_through_a_host_that_forwards_nothing_else(running: Lab, block: str, undo: str) -> None:
    if running.mode == "nftables":
        pytest.skip("in nftables mode another table's drop cannot be overruled; it is named instead (field problem 24)")
    for host in running.hosts:
        host.run(block)
    try:
        wait_until(lambda: cross_ping(running), 5, "pings both ways")
        running.hosts[0].daemon.restart()
        running.hosts[0].daemon.wait_ready()
        wait_until(lambda: cross_ping(running), 5, "pings both ways")
    finally:
        for host in running.hosts:
            host.run(undo)


@pytest.mark.field_problem(24)
def test_a_foreign_chain_that_drops_us_is_named_with_the_remedy(running: Lab) -> None:
    host = running.hosts[0]
    host.run(
        "nft -f -",
        stdin="table inet strict { chain forbid { type filter hook forward priority 10; policy drop; }; }",
    )
    try:
        text = wait_until(lambda: _ready_text(host, "strict"), 20, "the warning")
        assert "forbid" in text and "policy drop" in text
        assert metric(host, "flanneld_warnings") >= 1
    finally:
        host.run("nft delete table inet strict")
    wait_until(lambda: "strict" not in host.daemon.get("/readyz").text, 20, "the warning taken back")


def _ready_text(host: Host, word: str) -> str:
    text = host.daemon.get("/readyz").text
    return text if word in text else ""


def test_what_leaves_the_network_is_masqueraded_and_what_stays_is_not(running: Lab) -> None:
    here, there = (host.containers[0] for host in running.hosts)
    # etcd's namespace stands for the world outside: it has no route to the pods, so only the host's address works.
    wait_until(lambda: here.ping(running.etcd.address).ok, 5, "a ping")
    with_source = there.ns.start(["tcpdump", "-c1", "-nn", "-i", "eth0", "icmp"], log=running.directory / "seen")

    def seen() -> str:
        here.ping(there)
        ended = with_source.poll() is not None  # before it is read: the packet is written by then
        return (running.directory / "seen").read_text() if ended else ""

    assert f"{here.address} > {there.address}" in wait_until(seen, 10, "a packet at the peer")
    # The host itself reaches a remote container by its overlay address, so that the answer finds its way back.
    wait_until(lambda: running.hosts[0].ping(there.address).ok, 5, "a ping")


@pytest.mark.field_problem(15)
def test_the_checksum_offload_option_is_applied_and_applied_again(running: Lab) -> None:
    if running.mode != "iptables":
        pytest.skip("the option is set in the other configuration")
    host = running.hosts[0]

    def offloaded() -> bool:
        return "tx-checksumming: on" in host.run("ethtool -k flannel.1", check=False)

    assert not offloaded()
    host.run("ethtool -K flannel.1 tx-checksum-ip-generic on")
    wait_until(lambda: not offloaded(), 10, "off again")
    host.run("ip link del flannel.1")
    wait_until(
        lambda: "tx-checksumming: off" in host.run("ethtool -k flannel.1", check=False), 10, "off on the new one"
    )
    wait_until(lambda: cross_ping(running), 10, "pings")


@pytest.mark.field_problem(38)
def test_readiness_and_metrics_tell_the_truth(running: Lab) -> None:
    host = running.hosts[0]
    wait_until(lambda: host.daemon.ready, 10, "ready")
    assert metric(host, "flanneld_ready") == 1
    assert metric(host, "flanneld_peers") == 1
    assert metric(host, "flanneld_watch_age_seconds") < 30
    assert metric(host, "flanneld_lease_age_seconds") < 120
    before = metric(host, "flanneld_repairs_total")
    # A device of that name that cannot be removed while it is looked at: its place is taken again and again.
    host.run(["sh", "-c", "ip link set eth0 down"])
    wait_until(lambda: host.daemon.get("/readyz").status == 503, 10, "not ready without an underlay")
    assert host.daemon.get("/readyz").text.startswith("flanneld is not ready yet\n- ")
    host.run("ip link set eth0 up")
    host.run("ip route replace default via 172.30.0.1")
    wait_until(lambda: host.daemon.ready, 10, "ready")
    host.run("ip route flush dev flannel.1")
    wait_until(lambda: metric(host, "flanneld_repairs_total") > before, 10, "a repair counted")
    assert host.daemon.get("/healthz").text == "flanneld is running"
    status = host.daemon.get("/status").json()
    assert status["ready"] and status["peers"] == 1 and status["subnet"].endswith("/24")
    on_disk = json.loads((host.daemon.run_dir / "flanneld-status.json").read_text())
    assert on_disk["ready"] is True and on_disk["subnet"] == status["subnet"]
