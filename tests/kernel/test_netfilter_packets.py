"""What the rules do to packets: a router between a pod, a remote pod and the outside, in both modes.

pod 10.244.1.2 ── cni0 ┐           ┌ overlay ── 10.244.2.2 remote pod
                       host (router)
group 224.0.0.9        └ underlay ── 192.0.2.2 outside
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import shutil
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from backends.kernel_state import state_of
from flanneld.lab.hosts import sysctl
from flanneld.lab.netns import Namespace, veth
from tests.kernel.netfilter_lab import IPTABLES, Host, Programs, handler_in, need_legacy, programs, wanted

__all__ = ["programs"]

FLAVOURS = ("iptables-nft", "iptables-legacy", "nftables")


@dataclass(frozen=True)
class Plan:
    """Addresses of one family."""

    family: int
    pod: str
    remote: str
    outside: str
    host_cni: str
    host_overlay: str
    host_underlay: str
    group: str
    bits: int
    pod_prefix: int
    outside_prefix: int
    remote_subnet: str
    kind: socket.AddressFamily = field(default=socket.AF_INET)


PLANS = {
    4: Plan(
        family=4,
        pod="10.244.1.2",
        remote="10.244.2.2",
        outside="192.0.2.2",
        host_cni="10.244.1.1",
        host_overlay="10.244.1.0",
        host_underlay="192.0.2.1",
        group="224.0.1.9",
        bits=32,
        pod_prefix=24,
        outside_prefix=24,
        remote_subnet="10.244.2.0/24",
    ),
    6: Plan(
        family=6,
        pod="fd00:244:0:1::2",
        remote="fd00:244:0:2::2",
        outside="2001:db8::2",
        host_cni="fd00:244:0:1::1",
        host_overlay="fd00:244:0:1::",
        host_underlay="2001:db8::1",
        group="ff05::99",
        bits=128,
        pod_prefix=64,
        outside_prefix=64,
        remote_subnet="fd00:244:0:2::/64",
        kind=socket.AF_INET6,
    ),
}


@dataclass
class Town:
    pod: Namespace
    host: Namespace
    remote: Namespace
    outside: Namespace


@pytest.fixture(scope="module")
def town() -> Iterator[Town]:
    with Namespace("pod") as pod, Namespace("host") as host, Namespace("rem") as remote, Namespace("out") as outside:
        made = Town(pod, host, remote, outside)
        for namespace in (pod, host, remote, outside):
            sysctl(namespace, {"net/ipv6/conf/default/accept_dad": "0"})
        veth(host, "cni0", pod, "eth0")
        veth(host, "overlay", remote, "eth0")
        veth(host, "underlay", outside, "eth0")
        forwarding = {"net/ipv4/ip_forward": "1", "net/ipv6/conf/all/forwarding": "1"}
        sysctl(host, {**forwarding, "net/ipv4/conf/all/rp_filter": "0"})
        for plan in PLANS.values():
            build(made, plan)
        yield made


def build(town: Town, plan: Plan) -> None:
    ip = ["ip", f"-{plan.family}"]
    nodad = ["nodad"] if plan.family == 6 else []

    def address(where: Namespace, cidr: str, dev: str) -> None:
        where.run([*ip, "addr", "add", cidr, "dev", dev, *nodad])

    address(town.host, f"{plan.host_cni}/{plan.pod_prefix}", "cni0")
    address(town.host, f"{plan.host_overlay}/{plan.bits}", "overlay")
    address(town.host, f"{plan.host_underlay}/{plan.outside_prefix}", "underlay")
    address(town.pod, f"{plan.pod}/{plan.pod_prefix}", "eth0")
    address(town.outside, f"{plan.outside}/{plan.outside_prefix}", "eth0")
    address(town.remote, f"{plan.remote}/{plan.bits}", "eth0")
    town.host.run([*ip, "route", "add", plan.remote_subnet, "dev", "overlay"])
    town.pod.run([*ip, "route", "add", "default", "via", plan.host_cni])
    town.outside.run([*ip, "route", "add", "default", "via", plan.host_underlay])
    town.remote.run([*ip, "route", "add", "default", "dev", "eth0"])
    if plan.family == 4:
        # The overlay of this test is a cable: let each end answer for all that lies behind it.
        sysctl(town.host, {"net/ipv4/conf/overlay/proxy_arp": "1"})
    else:
        sysctl(town.host, {"net/ipv6/conf/overlay/proxy_ndp": "1", "net/ipv6/neigh/overlay/proxy_delay": "0"})
        for behind in (plan.pod, plan.outside, plan.host_cni, plan.host_underlay):
            town.host.run([*ip, "neigh", "replace", "proxy", behind, "dev", "overlay"])


@pytest.fixture(params=FLAVOURS)
def flavour(request, town, programs) -> Iterator[tuple[Host, str, Programs]]:
    """A handler on the host, its firewall mode, and the programs it uses; the firewall is empty before and after."""
    wipe(town)
    if request.param == "iptables-legacy":
        with town.host.inside():
            need_legacy()
    programs.variant = "legacy" if request.param == "iptables-legacy" else "nft"
    programs.add("nft", *IPTABLES)
    with handler_in(town.host) as host:
        yield host, "nftables" if request.param == "nftables" else "iptables", programs
    wipe(town)


def wipe(town: Town) -> None:
    town.host.run("nft flush ruleset")
    for tool in ("iptables-legacy", "ip6tables-legacy"):
        if shutil.which(tool):
            for command in ("-P FORWARD ACCEPT", "-F", "-X", "-t nat -F", "-t nat -X"):
                town.host.run(f"{tool} {command}", check=False)


def source_seen(
    plan: Plan,
    sender: Namespace,
    receiver: Namespace,
    destination: str,
    *,
    source: str | None = None,
    mark: int = 0,
    out: str | None = None,
) -> str | None:
    """Send datagrams; the source address of the first that arrives, None when none does within a second."""
    with receiver.inside():
        ear = socket.socket(plan.kind, socket.SOCK_DGRAM)
    with sender.inside():
        mouth = socket.socket(plan.kind, socket.SOCK_DGRAM)
    with ear, mouth:
        ear.settimeout(0.2)
        ear.bind(("", 0))
        if out:
            with sender.inside():
                out_index = socket.if_nametoindex(out)
            with receiver.inside():
                in_index = socket.if_nametoindex("eth0")
            join(plan, ear, in_index)
            if plan.family == 4:
                mouth.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, bytes(8) + out_index.to_bytes(4, "little"))
            else:
                mouth.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_IF, out_index)
        if mark:
            mouth.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, mark)
        if source:
            mouth.bind((source, 0))
        for _ in range(5):  # the first ones may be lost while addresses are resolved
            mouth.sendto(b"who am I?", (destination, ear.getsockname()[1]))
            with contextlib.suppress(TimeoutError):
                return ear.recvfrom(64)[1][0]
        return None


def join(plan: Plan, ear: socket.socket, index: int) -> None:
    group = socket.inet_pton(plan.kind, plan.group)
    if plan.family == 4:
        ear.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, group + bytes(4) + index.to_bytes(4, "little"))
    else:
        ear.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_JOIN_GROUP, group + index.to_bytes(4, "little"))


def flows(town: Town, plan: Plan) -> dict[str, tuple[str | None, str]]:
    """Each flow: the source address that was seen and the one that should be."""

    def see(sender: Namespace, receiver: Namespace, destination: str, **how) -> str | None:
        return source_seen(plan, sender, receiver, destination, **how)

    return {
        "pod to remote pod": (see(town.pod, town.remote, plan.remote), plan.pod),
        "remote pod to pod": (see(town.remote, town.pod, plan.pod), plan.remote),
        "pod to host": (see(town.pod, town.host, plan.host_underlay), plan.pod),
        "pod to outside": (see(town.pod, town.outside, plan.outside), plan.host_underlay),
        "outside to pod": (see(town.outside, town.pod, plan.pod), plan.outside),
        "outside to remote pod": (see(town.outside, town.remote, plan.remote), plan.host_overlay),
        "host's underlay address to remote pod": (
            see(town.host, town.remote, plan.remote, source=plan.host_underlay),
            plan.host_overlay,
        ),
        "host to pod": (see(town.host, town.pod, plan.pod, source=plan.host_underlay), plan.host_underlay),
        "marked by kube-proxy": (
            see(town.host, town.remote, plan.remote, source=plan.host_underlay, mark=0x4000),
            plan.host_underlay,
        ),
        "marked by kube-proxy and another": (
            see(town.host, town.remote, plan.remote, source=plan.host_underlay, mark=0x4001),
            plan.host_underlay,
        ),
        "multicast": (
            see(town.host, town.outside, plan.group, source=plan.host_cni, out="underlay"),
            plan.host_cni,
        ),
        "host to outside": (see(town.host, town.outside, plan.outside), plan.host_underlay),
    }


@pytest.mark.field_problem(25)
@pytest.mark.parametrize("family", [4, 6])
def test_every_flow_has_the_same_source_in_every_mode(town, flavour, family):
    host, mode, _ = flavour
    host.converge(wanted(mode))
    seen = flows(town, PLANS[family])
    assert {name: got for name, (got, _) in seen.items()} == {name: want for name, (_, want) in seen.items()}


@pytest.mark.field_problem(40)
def test_named_networks_see_the_pods_own_address(town, flavour):
    host, mode, _ = flavour
    host.converge(wanted(mode, keep="192.0.2.0/24"))
    assert source_seen(PLANS[4], town.pod, town.outside, PLANS[4].outside) == PLANS[4].pod


@pytest.mark.field_problem(16)
@pytest.mark.parametrize("block", ["-A FORWARD -j REJECT", "-P FORWARD DROP"])
@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("flavour", FLAVOURS[:2], indirect=True)  # nftables mode: see the blocking chains below
def test_pods_reach_each_other_in_spite_of_the_hosts_forward_chain(town, flavour, block, order):
    host, mode, programs = flavour
    if order == "after":
        host.converge(wanted(mode))
    for tool in ("iptables", "ip6tables"):
        town.host.run(f"{tool}-{programs.variant} {block}")
    if order == "before":
        assert source_seen(PLANS[4], town.pod, town.remote, PLANS[4].remote) is None
        host.converge(wanted(mode))
    for plan in PLANS.values():
        assert source_seen(plan, town.pod, town.remote, plan.remote) == plan.pod
        town.pod.run(f"ping -c 3 -i 0.2 -W 2 {plan.remote}")
        town.outside.run(f"ping -c 1 -W 2 {plan.pod}")
    assert host.observe(wanted(mode)) == state_of(*wanted(mode))


@pytest.mark.field_problem(28)
def test_replacing_rules_and_switching_modes_loses_no_packet(town, flavour):
    """In iptables mode under policy DROP, so that a moment without our rules would show."""
    host, mode, programs = flavour
    if mode == "iptables":
        town.host.run(f"iptables-{programs.variant} -P FORWARD DROP")
    host.converge(wanted(mode))
    with concurrent.futures.ThreadPoolExecutor() as pool:
        ping = pool.submit(town.pod.run, "ping -q -i 0.01 -c 150 -W 1 10.244.2.2")
        turn = 0
        while not ping.done():
            turn += 1
            host.converge(wanted(mode, keep=f"192.0.{turn % 256}.0/24"))
            if mode == "nftables":
                host.converge(wanted("iptables"))
                host.converge(wanted("nftables"))
    assert turn > 3
    assert " 0% packet loss" in ping.result()


@pytest.mark.field_problem(24)
def test_a_chain_that_drops_our_packets_is_named_with_a_remedy_that_works(town, flavour):
    host, mode, _ = flavour
    host.converge(wanted(mode))
    host.observe(wanted(mode))
    assert host.handler.blocking == ()
    town.host.run(
        ["nft", "-f", "-"],
        stdin="table inet filter { chain forward { type filter hook forward priority 0; policy drop; "
        "ct state established,related accept; }; }",
    )
    assert source_seen(PLANS[4], town.pod, town.remote, PLANS[4].remote) is None
    host.observe(wanted(mode))
    four, six = host.handler.blocking
    assert four.startswith("table inet filter chain forward (policy drop) drops packets of 10.244.0.0/16")
    assert "fd00:244::/48" in six
    for sentence in (four, six):
        for command in sentence.split("'")[1::2]:
            town.host.run(command)
    host.observe(wanted(mode))
    assert host.handler.blocking == ()
    assert source_seen(PLANS[4], town.pod, town.remote, PLANS[4].remote) == PLANS[4].pod


@pytest.mark.field_problem(24)
@pytest.mark.parametrize("block", ["-A FORWARD -j REJECT", "-P FORWARD DROP"])
@pytest.mark.parametrize("tool", ["iptables", "iptables-legacy"])
def test_the_hosts_iptables_is_named_in_nftables_mode(town, programs, block, tool):
    wipe(town)
    programs.add("nft", *IPTABLES)
    if tool == "iptables-legacy":
        with town.host.inside():
            need_legacy()
        programs.add("iptables-legacy-save", "iptables-legacy-restore")
    with handler_in(town.host) as host:
        host.converge(wanted("nftables"))
        town.host.run(f"{tool} {block}")
        assert source_seen(PLANS[4], town.pod, town.remote, PLANS[4].remote) is None
        host.observe(wanted("nftables"))
        (sentence,) = host.handler.blocking
        assert "chain FORWARD (" in sentence
        for command in sentence.split("'")[1::2]:
            assert command.startswith(f"{tool} -I FORWARD -")
            town.host.run(command)
        host.observe(wanted("nftables"))
        assert host.handler.blocking == ()
        assert source_seen(PLANS[4], town.pod, town.remote, PLANS[4].remote) == PLANS[4].pod
    wipe(town)


@pytest.mark.field_problem(24)
def test_the_search_for_blocking_chains_rests_while_nothing_changes(town, flavour):
    host, mode, programs = flavour
    town.host.run(
        ["nft", "-f", "-"], stdin="table inet filter { chain forward { type filter hook forward priority 0; }; }"
    )
    host.converge(wanted(mode))
    host.observe(wanted(mode))
    programs.started()
    for _ in range(20):
        host.observe(wanted(mode))
    assert programs.started() == []
    town.host.run("nft add table inet unrelated")
    host.observe(wanted(mode))
    assert programs.started() == []
    town.host.run("nft add rule inet filter forward counter")
    host.observe(wanted(mode))
    assert programs.started() == ["nft -j list table inet filter"]
