"""The firewall handler against the kernel's own firewalls: what it writes, what it sees, what it starts."""

from __future__ import annotations

import select
import socket

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backends.kernel_state import Change, Firewall, Scope, state_of
from flanneld.dataplane import netfilter_iptables, netfilter_tools
from flanneld.lab.netns import Namespace
from tests.kernel.netfilter_lab import (
    IPTABLES,
    NETWORKS,
    VARIANTS,
    Host,
    handler_in,
    need_legacy,
    programs,
    wanted,
)
from tests.testbed.firewall_rules import rules

__all__ = ["programs"]

MODES = ("iptables", "nftables")


@pytest.fixture
def namespace():
    with Namespace("nf") as made:
        yield made


@pytest.fixture
def host(namespace, programs):
    """Every program, iptables-nft."""
    programs.add("nft", *IPTABLES)
    with handler_in(namespace) as made:
        yield made


@pytest.fixture(params=VARIANTS)
def variant_host(request, namespace, programs):
    """iptables-nft and iptables-legacy, without nft."""
    programs.variant = request.param
    if request.param == "legacy":
        with namespace.inside():
            need_legacy()
    programs.add(*IPTABLES)
    with handler_in(namespace) as made:
        yield made


def sh(namespace: Namespace, command: str) -> str:
    return namespace.run(["/bin/sh", "-c", f"PATH=/usr/sbin:/usr/bin:/sbin:/bin; {command}"])


def rules_of(namespace: Namespace, tool: str) -> list[str]:
    return [line for line in sh(namespace, f"{tool}-save 2>/dev/null").splitlines() if line.startswith("-A")]


GOLDEN_IPTABLES = """\
-A FORWARD -m comment --comment "flanneld forward" -j FLANNEL-FWD
-A FLANNEL-FWD -s 10.244.0.0/16 -m comment --comment "flanneld forward" -j ACCEPT
-A FLANNEL-FWD -d 10.244.0.0/16 -m comment --comment "flanneld forward" -j ACCEPT
-A POSTROUTING -m comment --comment "flanneld masq" -j FLANNEL-POSTRTG
-A FLANNEL-POSTRTG -m mark --mark 0x4000/0x4000 -m comment --comment "flanneld masq" -j RETURN
-A FLANNEL-POSTRTG -s 10.244.1.0/24 -d 10.244.0.0/16 -m comment --comment "flanneld masq" -j RETURN
-A FLANNEL-POSTRTG -s 10.244.0.0/16 -d 10.244.1.0/24 -m comment --comment "flanneld masq" -j RETURN
-A FLANNEL-POSTRTG ! -s 10.244.0.0/16 -d 10.244.1.0/24 -m comment --comment "flanneld masq" -j RETURN
-A FLANNEL-POSTRTG -s 10.244.0.0/16 ! -d 224.0.0.0/4 -m comment --comment "flanneld masq" -j MASQUERADE --random-fully
-A FLANNEL-POSTRTG ! -s 10.244.0.0/16 -d 10.244.0.0/16 -m comment --comment "flanneld masq" -j MASQUERADE --random-fully
"""

GOLDEN_NFT = """\
table ip flannel-ipv4 {
	chain postrtg {
		type nat hook postrouting priority srcnat; policy accept;
		meta mark & 0x00004000 == 0x00004000 return
		ip saddr 10.244.1.0/24 ip daddr 10.244.0.0/16 return
		ip saddr 10.244.0.0/16 ip daddr 10.244.1.0/24 return
		ip saddr != 10.244.0.0/16 ip daddr 10.244.1.0/24 return
		ip saddr 10.244.0.0/16 ip daddr != 224.0.0.0/4 masquerade fully-random
		ip saddr != 10.244.0.0/16 ip daddr 10.244.0.0/16 masquerade fully-random
	}

	chain forward {
		type filter hook forward priority filter; policy accept;
		ip saddr 10.244.0.0/16 accept
		ip daddr 10.244.0.0/16 accept
	}
}
"""


def test_iptables_shows_flannels_rules(variant_host, programs, namespace):
    variant_host.converge(wanted("iptables"))
    tool = f"iptables-{programs.variant}"
    assert sorted(rules_of(namespace, tool)) == sorted(GOLDEN_IPTABLES.splitlines())
    chain = [line for line in rules_of(namespace, tool) if line.startswith("-A FLANNEL-POSTRTG")]
    assert chain == [line for line in GOLDEN_IPTABLES.splitlines() if line.startswith("-A FLANNEL-POSTRTG")]


def test_nft_shows_the_same_rules(host, namespace):
    host.converge(wanted("nftables"))
    assert sh(namespace, "nft list table ip flannel-ipv4") == GOLDEN_NFT
    assert sh(namespace, "nft list table ip6 flannel-ipv6") == (
        GOLDEN_NFT.replace("ip saddr", "ip6 saddr")
        .replace("ip daddr", "ip6 daddr")
        .replace("table ip flannel-ipv4", "table ip6 flannel-ipv6")
        .replace("10.244.0.0/16", "fd00:244::/48")
        .replace("10.244.1.0/24", "fd00:244:0:1::/64")
        .replace("224.0.0.0/4", "ff00::/8")
    )


@settings(max_examples=25)
@given(data=st.data(), mode=st.sampled_from(MODES), family=st.sampled_from((4, 6)))
def _round_trip(host: Host, data: st.DataObject, mode: str, family: int) -> None:
    made = data.draw(st.lists(rules(family), min_size=1, max_size=8))
    ordered = sorted(made, key=lambda rule: rule.chain == "forward")
    firewall = Firewall(family, mode, tuple(ordered))
    host.converge((firewall,))
    assert host.observe((firewall,)) == state_of(firewall)


def test_any_rules_read_back_as_they_were_written(host):
    _round_trip(host)


def test_any_rules_read_back_as_they_were_written_by_iptables_legacy(namespace, programs):
    with namespace.inside():
        need_legacy()
    programs.variant = "legacy"
    programs.add("nft", *IPTABLES)
    with handler_in(namespace) as host:
        _round_trip(host)


@pytest.mark.field_problem(26)
@pytest.mark.field_problem(27)
@pytest.mark.parametrize("mode", MODES)
def test_idle_starts_nothing_and_returns_the_same_answer(host, programs, mode):
    firewall = wanted(mode)
    host.converge(firewall)
    answer = host.observe(firewall)
    assert answer == state_of(*firewall)
    programs.started()
    for _ in range(100):
        host.handler.invalidate()  # the slow resync timer
        assert host.observe(firewall) is answer
    assert programs.started() == []


@pytest.mark.field_problem(27)
def test_idle_starts_nothing_with_iptables_legacy(namespace, programs):
    with namespace.inside():
        need_legacy()
    programs.variant = "legacy"
    programs.add("nft", *IPTABLES)
    with handler_in(namespace) as host:
        firewall = wanted("iptables")
        host.converge(firewall)
        answer = host.observe(firewall)
        programs.started()
        namespace.run("ping -c 1 -W 1 127.0.0.1")  # counters move; rules do not
        assert host.observe(firewall) is answer
        assert programs.started() == []
        sh(namespace, "iptables-legacy -t nat -F FLANNEL-POSTRTG")
        assert host.observe(firewall) != answer
        assert programs.started() == ["iptables-save "]


@pytest.mark.field_problem(27)
@pytest.mark.parametrize("mode", MODES)
def test_a_repair_starts_one_program_of_each_kind(host, programs, namespace, mode):
    firewall = wanted(mode, families=(4,))
    host.converge(firewall)
    host.observe(firewall)
    programs.started()
    sh(namespace, "nft flush ruleset")
    assert len(host.converge(firewall)) == 1
    expected = {
        "iptables": ["iptables-save ", "iptables-restore --noflush --wait=20"],
        "nftables": ["nft -f -"],
    }
    assert programs.started() == expected[mode]
    assert host.observe(firewall) == state_of(*firewall)


@pytest.mark.field_problem(27)
def test_foreign_churn_starts_nothing(host, programs, namespace):
    """kube-proxy rewrites its own chains in our tables all day."""
    sh(namespace, "iptables-nft -t nat -N KUBE-SERVICES")
    firewall = wanted("iptables", families=(4,))
    host.converge(firewall)
    answer = host.observe(firewall)
    programs.started()
    sh(namespace, "iptables-nft -t nat -A KUBE-SERVICES -d 10.96.0.1 -j RETURN; nft add table inet other")
    assert host.observe(firewall) is answer
    assert programs.started() == []


@pytest.mark.field_problem(23)
@pytest.mark.parametrize("mode", MODES)
def test_a_flush_is_heard_and_mended(host, namespace, mode):
    firewall = wanted(mode)
    host.converge(firewall)
    host.observe(firewall)
    descriptor = host.handler.fileno()
    assert descriptor is not None
    assert select.select([descriptor], [], [], 0)[0] == []
    sh(namespace, "nft flush ruleset")
    assert select.select([descriptor], [], [], 1)[0] == [descriptor]
    assert host.observe(firewall) == {}
    host.converge(firewall)
    assert host.observe(firewall) == state_of(*firewall)


@pytest.mark.field_problem(23)
def test_a_lost_message_is_noticed_by_the_resync(host, namespace):
    firewall = wanted("nftables", families=(4,))
    host.converge(firewall)
    host.observe(firewall)
    sh(namespace, "nft flush ruleset")
    while select.select([host.handler.fileno()], [], [], 0)[0]:
        host.handler._monitor._socket.recv(1 << 18)
    assert host.observe(firewall) == state_of(*firewall)
    host.handler.invalidate()
    assert host.observe(firewall) == {}


@pytest.mark.field_problem(18)
def test_a_flood_of_messages_leads_to_a_fresh_look(host, namespace):
    firewall = wanted("nftables", families=(4,))
    host.converge(firewall)
    host.observe(firewall)
    host.handler._monitor._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
    chains = "".join(f"add chain ip other c{number}\n" for number in range(2000))
    namespace.run("nft -f -", stdin="add table ip other\n" + chains + "delete table ip flannel-ipv4\n")
    assert host.observe(firewall) == {}


@pytest.mark.field_problem(26)
@pytest.mark.parametrize(
    "damage",
    [
        "-t nat -I FLANNEL-POSTRTG -s 10.244.0.0/16 -m comment --comment 'flanneld masq' -j MASQUERADE",
        "-t nat -D FLANNEL-POSTRTG 2",
        "-t nat -F POSTROUTING",
        "-t nat -A POSTROUTING -m comment --comment 'flanneld masq' -j FLANNEL-POSTRTG",
        "-t nat -A POSTROUTING -s 10.9.0.0/16 -m comment --comment 'flanneld masq' -j MASQUERADE",
        "-F FLANNEL-FWD",
        "-F FORWARD",
        "-A FORWARD -m comment --comment 'flanneld forward' -j FLANNEL-FWD",
        "-I FORWARD -j REJECT",
        "-t nat -N FLANNEL-FWD",
    ],
)
def test_disorder_is_mended_in_one_cycle(variant_host, programs, namespace, damage):
    firewall = wanted("iptables", families=(4,))
    variant_host.converge(firewall)
    sh(namespace, f"iptables-{programs.variant} -A FORWARD -j REJECT")
    assert variant_host.observe(firewall) == state_of(*firewall)
    before = rules_of(namespace, f"iptables-{programs.variant}")
    sh(namespace, f"iptables-{programs.variant} {damage}")
    assert variant_host.observe(firewall) != state_of(*firewall)
    assert [change.op for change in variant_host.converge(firewall)] == ["put"]
    assert variant_host.observe(firewall) == state_of(*firewall)
    ours = [line for line in rules_of(namespace, f"iptables-{programs.variant}") if "FLANNEL" in line]
    assert sorted(ours) == sorted(line for line in before if "FLANNEL" in line)


@pytest.mark.field_problem(26)
def test_alien_rules_in_our_nft_table_go(host, namespace):
    firewall = wanted("nftables", families=(4,))
    host.converge(firewall)
    for damage in (
        "add rule ip flannel-ipv4 forward tcp dport 80 drop",
        "insert rule ip flannel-ipv4 postrtg masquerade",
        "add chain ip flannel-ipv4 other",
        "flush chain ip flannel-ipv4 forward",
        "add table ip flannel-ipv4 { flags dormant; }",
    ):
        sh(namespace, f"nft '{damage}'")
        assert host.observe(firewall) != state_of(*firewall), damage
        host.converge(firewall)
        assert host.observe(firewall) == state_of(*firewall), damage
    assert sh(namespace, "nft list table ip flannel-ipv4") == GOLDEN_NFT


@pytest.mark.field_problem(26)
def test_someone_who_insists_on_the_first_place_gets_it(variant_host, programs, namespace):
    tool = f"iptables-{programs.variant}"
    firewall = wanted("iptables", families=(4,))
    sh(namespace, f"{tool} -N RIVAL")
    writes = 0
    for _ in range(15):
        variant_host.clock[0] -= 50
        writes += len(variant_host.converge(firewall))
        sh(namespace, f"{tool} -D FORWARD -j RIVAL 2>/dev/null; {tool} -I FORWARD -j RIVAL")
    assert writes < 10
    assert "RIVAL" in variant_host.handler.blocking[0]
    assert variant_host.observe(firewall) == state_of(*firewall)


@pytest.mark.field_problem(26)
def test_what_is_shown_otherwise_than_written_is_not_written_for_ever(host, monkeypatch):
    """As a later iptables might print it."""
    monkeypatch.setattr(netfilter_iptables, "parse_rule", lambda *_: None)
    firewall = wanted("iptables", families=(4,))
    writes = sum(len(host.converge(firewall)) for _ in range(20))
    assert writes < 10
    assert "shows other rules than were written" in host.handler.blocking[0]


@pytest.mark.parametrize(("before", "after"), [MODES, MODES[::-1]])
def test_switching_mode_leaves_nothing_of_the_other(host, namespace, before, after):
    host.converge(wanted(before))
    changes = host.converge(wanted(after))
    assert [change.op for change in changes] == ["put", "put", "remove", "remove"]
    assert host.observe(wanted(after)) == state_of(*wanted(after))
    everything = sh(namespace, "nft list ruleset; iptables-save; ip6tables-save")
    assert ("FLANNEL" in everything) == (after == "iptables")
    assert ("flannel-ipv" in everything) == (after == "nftables")


def test_what_flannel_left_in_the_other_variant_goes(host, programs, namespace):
    """A container's iptables-legacy, then the host's iptables-nft."""
    need_legacy()
    programs.add("iptables-legacy-save", "iptables-legacy-restore")
    sh(
        namespace,
        "iptables-legacy -N FLANNEL-FWD; iptables-legacy -A FORWARD -j FLANNEL-FWD;"
        "iptables-legacy -t nat -A POSTROUTING -s 10.1.0.0/16 -m comment --comment 'flanneld masq' -j MASQUERADE",
    )
    host.converge(wanted("iptables"))
    assert host.observe(wanted("iptables")) == state_of(*wanted("iptables"))
    assert rules_of(namespace, "iptables-legacy") == []


def test_the_rules_of_flannels_early_days_go_in_nft_mode_too(host, namespace):
    sh(
        namespace,
        "iptables-nft -t nat -A POSTROUTING -s 10.244.0.0/16 -m comment --comment 'flanneld masq' -j RETURN;"
        "iptables-nft -t nat -A POSTROUTING -s 10.9.0.0/16 -j MASQUERADE",
    )
    host.converge(wanted("nftables"))
    assert rules_of(namespace, "iptables-nft") == ["-A POSTROUTING -s 10.9.0.0/16 -j MASQUERADE"]


@pytest.mark.field_problem(42)
@pytest.mark.parametrize("mode", MODES)
def test_cleaning_up_leaves_foreign_rules_as_they_were(host, namespace, mode):
    sh(
        namespace,
        "iptables-nft -A FORWARD -i eth9 -j DROP; iptables-nft -t nat -A POSTROUTING -o eth9 -j MASQUERADE;"
        "iptables-nft -P FORWARD DROP; nft add table inet other",
    )
    listing = "iptables-nft-save | grep -v '^#'; nft list table inet other"
    before = sh(namespace, listing)
    host.converge(wanted(mode))
    assert sh(namespace, "nft list ruleset").lower().count("flannel") > 0
    host.converge(())
    assert sh(namespace, listing) == before
    assert "flannel" not in sh(namespace, "nft list ruleset").lower()
    assert host.observe(()) == {}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.field_problem(44)
def test_two_instances_do_not_disturb_each_other(namespace, host, mode):
    first, second = wanted(mode), wanted(mode, instance="blue")
    host.converge(first)
    with handler_in(namespace) as other:
        other.converge(second, "blue")
        assert other.observe(second, "blue") == state_of(*second)
        assert host.observe(first) == state_of(*first)
        other.converge((), "blue")
        assert other.observe((), "blue") == {}
        assert host.observe(first) == state_of(*first)


def test_nftables_mode_needs_no_iptables(namespace, programs):
    programs.add("nft")
    with handler_in(namespace) as host:
        sh(namespace, "iptables-nft -N FLANNEL-FWD")
        host.converge(wanted("nftables"))
        assert host.observe(wanted("nftables")) == state_of(*wanted("nftables"))


def test_iptables_mode_needs_no_nft(namespace, programs):
    programs.add(*IPTABLES)
    with handler_in(namespace) as host:
        sh(namespace, "nft add table ip flannel-ipv4")
        host.converge(wanted("iptables"))
        assert host.observe(wanted("iptables")) == state_of(*wanted("iptables"))


@pytest.mark.parametrize(("mode", "package"), [("iptables", "package iptables"), ("nftables", "package nftables")])
def test_a_missing_program_is_a_failure_that_names_the_package(namespace, programs, mode, package):
    firewall = wanted(mode, families=(4,))
    with handler_in(namespace) as host:
        assert host.observe(firewall) == {}
        (failure,) = host.handler.apply([Change("put", firewall[0])])
        assert failure.cause == "missing"
        assert package in failure.message
        programs.add("nft", *IPTABLES)
        host.converge(firewall)
        assert host.observe(firewall) == state_of(*firewall)


def test_a_refused_change_says_what_was_run_and_why(host, namespace):
    (firewall,) = wanted("iptables", families=(4,))
    broken = Firewall(4, "iptables", (*firewall.rules[:1],), "x")
    host.observe((broken,), "x")
    sh(namespace, "nft 'add table ip nat; add set ip nat s { type ipv4_addr; }; add chain ip nat POSTROUTING'")
    (failure,) = host.handler.apply([Change("put", broken)])
    assert failure.message.startswith("iptables-restore --noflush")
    assert "exit code" in failure.message


@pytest.mark.parametrize("mode", MODES)
def test_a_program_that_breaks_is_a_failure_not_the_end_of_the_pass(host, programs, mode):
    firewall = wanted(mode, families=(4,))
    host.converge(firewall)
    for name in ("nft", *IPTABLES):
        (programs.directory / name).write_text("#!/bin/sh\necho it is broken >&2; exit 4\n")
    host.handler._stale.add((mode, 4))
    seen = host.observe(firewall)
    assert seen[firewall[0].key] != firewall[0]
    (failure,) = host.handler.apply([Change("put", firewall[0])])
    assert failure.cause == "refused"
    assert "exit code 4: it is broken" in failure.message
    programs.add("nft", *IPTABLES)
    host.converge(firewall)
    assert host.observe(firewall) == state_of(*firewall)


def test_an_iptables_that_cannot_randomise_ports_is_spared_the_option(host, namespace, monkeypatch):
    monkeypatch.setattr(netfilter_tools, "RESTORE_WAITS", (99,))
    firewall = wanted("iptables", families=(4,))
    host.converge(firewall)
    assert host.observe(firewall) == state_of(*firewall)
    assert "--random-fully" not in sh(namespace, "iptables-nft-save")


def test_takeover_of_flannels_rules_writes_only_what_differs(host, programs, namespace):
    """flanneld v0.28's rules stand; a REJECT was before its jump."""
    host.converge(wanted("iptables", families=(4,)))
    sh(namespace, "iptables-nft -Z; iptables-nft -t nat -Z")
    sh(namespace, "iptables-nft -F FORWARD; iptables-nft -A FORWARD -j REJECT")
    sh(namespace, "iptables-nft -A FORWARD -m comment --comment 'flanneld forward' -j FLANNEL-FWD")
    with handler_in(namespace) as heir:
        programs.started()
        heir.converge(wanted("iptables", families=(4,)))
        assert rules_of(namespace, "iptables-nft")[0].endswith("-j FLANNEL-FWD")
        heir.observe(wanted("iptables", families=(4,)))
        programs.started()
    with handler_in(namespace) as heir:
        assert heir.converge(wanted("iptables", families=(4,))) == []
        assert [line.split()[0] for line in programs.started() if line.startswith("ip")] == ["iptables-save"]


def test_the_scope_decides_what_is_looked_at(host):
    answer = host.handler.observe(Scope(networks=NETWORKS), {})
    assert answer == {}
    assert host.handler.observe(Scope(networks=NETWORKS), {}) is answer
