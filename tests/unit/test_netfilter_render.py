"""Netfilter as text: rendering, reading back, and what is found wrong in what others wrote."""

from __future__ import annotations

from ipaddress import IPv4Network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.kernel_state import Firewall, Rule
from flanneld.dataplane import netfilter_iptables as iptables
from flanneld.dataplane import netfilter_nft as nft
from flanneld.dataplane.netfilter_bridge import bridge_warnings
from flanneld.dataplane.netfilter_names import names_of
from flanneld.traffic_rules import forwarding_rules, masquerade_rules
from tests.testbed.firewall_rules import rules

C, P = IPv4Network("10.244.0.0/16"), IPv4Network("10.244.1.0/24")
RULES = (*masquerade_rules(4, C, P, (), True), *forwarding_rules(C))
WANTED = Firewall(4, "iptables", RULES)

# What flanneld v0.28 leaves on a host, as iptables-save prints it.
FLANNEL = """\
*filter
:INPUT ACCEPT [0:0]
:FORWARD ACCEPT [0:0]
:FLANNEL-FWD - [0:0]
-A FORWARD -m comment --comment "flanneld forward" -j FLANNEL-FWD
-A FLANNEL-FWD -s 10.244.0.0/16 -m comment --comment "flanneld forward" -j ACCEPT
-A FLANNEL-FWD -d 10.244.0.0/16 -m comment --comment "flanneld forward" -j ACCEPT
COMMIT
*nat
:POSTROUTING ACCEPT [0:0]
:FLANNEL-POSTRTG - [0:0]
-A POSTROUTING -s 172.17.0.0/16 ! -o docker0 -j MASQUERADE
-A POSTROUTING -m comment --comment "flanneld masq" -j FLANNEL-POSTRTG
-A FLANNEL-POSTRTG -m mark --mark 0x4000/0x4000 -m comment --comment "flanneld masq" -j RETURN
-A FLANNEL-POSTRTG -s 10.244.1.0/24 -d 10.244.0.0/16 -m comment --comment "flanneld masq" -j RETURN
-A FLANNEL-POSTRTG -s 10.244.0.0/16 -d 10.244.1.0/24 -m comment --comment "flanneld masq" -j RETURN
-A FLANNEL-POSTRTG ! -s 10.244.0.0/16 -d 10.244.1.0/24 -m comment --comment "flanneld masq" -j RETURN
-A FLANNEL-POSTRTG -s 10.244.0.0/16 ! -d 224.0.0.0/4 -m comment --comment "flanneld masq" -j MASQUERADE --random-fully
-A FLANNEL-POSTRTG ! -s 10.244.0.0/16 -d 10.244.0.0/16 -m comment --comment "flanneld masq" -j MASQUERADE --random-fully
COMMIT
"""


def saved(text: str, instance: str = "") -> iptables.Saved:
    return iptables.parse_save(text, names_of(instance))


def observed(text: str) -> Firewall | None:
    return iptables.firewall_of(saved(text), 4)


def repair(text: str) -> str:
    return iptables.render_put(WANTED, saved(text))


def test_flannels_own_rules_are_adopted_as_they_are():
    assert observed(FLANNEL) == WANTED
    assert repair(FLANNEL) == ""


def test_a_first_put_is_one_transaction_for_each_table():
    assert repair("") == (
        "*nat\n"
        ":FLANNEL-POSTRTG - [0:0]\n"
        '-A FLANNEL-POSTRTG -m mark --mark 0x4000/0x4000 -m comment --comment "flanneld masq" -j RETURN\n'
        '-A FLANNEL-POSTRTG -s 10.244.1.0/24 -d 10.244.0.0/16 -m comment --comment "flanneld masq" -j RETURN\n'
        '-A FLANNEL-POSTRTG -s 10.244.0.0/16 -d 10.244.1.0/24 -m comment --comment "flanneld masq" -j RETURN\n'
        '-A FLANNEL-POSTRTG ! -s 10.244.0.0/16 -d 10.244.1.0/24 -m comment --comment "flanneld masq" -j RETURN\n'
        '-A FLANNEL-POSTRTG -s 10.244.0.0/16 ! -d 224.0.0.0/4 -m comment --comment "flanneld masq"'
        " -j MASQUERADE --random-fully\n"
        '-A FLANNEL-POSTRTG ! -s 10.244.0.0/16 -d 10.244.0.0/16 -m comment --comment "flanneld masq"'
        " -j MASQUERADE --random-fully\n"
        '-A POSTROUTING -m comment --comment "flanneld masq" -j FLANNEL-POSTRTG\n'
        "COMMIT\n"
        "*filter\n"
        ":FLANNEL-FWD - [0:0]\n"
        '-A FLANNEL-FWD -s 10.244.0.0/16 -m comment --comment "flanneld forward" -j ACCEPT\n'
        '-A FLANNEL-FWD -d 10.244.0.0/16 -m comment --comment "flanneld forward" -j ACCEPT\n'
        '-I FORWARD 1 -m comment --comment "flanneld forward" -j FLANNEL-FWD\n'
        "COMMIT\n"
    )


JUMP = '-A FORWARD -m comment --comment "flanneld forward" -j FLANNEL-FWD\n'
MASQ_JUMP = '-A POSTROUTING -m comment --comment "flanneld masq" -j FLANNEL-POSTRTG\n'


@pytest.mark.field_problem(16)
def test_a_reject_before_our_jump_is_a_defect_and_the_jump_moves():
    text = FLANNEL.replace(JUMP, "-A FORWARD -j REJECT --reject-with icmp-port-unreachable\n" + JUMP)
    firewall = observed(text)
    assert firewall is not None
    assert firewall.defects == ("the jump from FORWARD stands after: -j REJECT --reject-with icmp-port-unreachable",)
    assert repair(text) == (
        '*filter\n-D FORWARD -m comment --comment "flanneld forward" -j FLANNEL-FWD\n'
        '-I FORWARD 1 -m comment --comment "flanneld forward" -j FLANNEL-FWD\nCOMMIT\n'
    )


def test_policy_engines_and_the_administrator_decide_before_us():
    before = "-A FORWARD -j KUBE-ROUTER-FORWARD\n-A FORWARD -j DOCKER-USER\n"
    assert observed(FLANNEL.replace(JUMP, before + JUMP)) == WANTED
    text = FLANNEL.replace(JUMP, before + "-A FORWARD -j DOCKER-FORWARD\n" + JUMP)
    assert "-I FORWARD 3 " in repair(text)


def test_a_tolerated_rule_may_stand_before_us():
    text = FLANNEL.replace(JUMP, "-A FORWARD -j RIVAL\n" + JUMP)
    assert iptables.rules_before_jump(saved(text)) == ("-j RIVAL",)
    assert iptables.firewall_of(saved(text), 4, "", {"-j RIVAL"}) == WANTED


@pytest.mark.field_problem(26)
@pytest.mark.parametrize(
    ("change", "defect"),
    [
        (lambda t: t.replace(JUMP, ""), "no jump from FORWARD"),
        (lambda t: t.replace(MASQ_JUMP, ""), "no jump from POSTROUTING"),
        (lambda t: t.replace(JUMP, JUMP * 2), "2 jumps from FORWARD"),
        (lambda t: t.replace(MASQ_JUMP, MASQ_JUMP * 3), "3 jumps from POSTROUTING"),
        (lambda t: t + "*nat\n:FLANNEL-FWD - [0:0]\nCOMMIT\n", "chain FLANNEL-FWD left in table nat"),
        (
            lambda t: t.replace(JUMP, JUMP + "-A FLANNEL-FWD -p tcp -j DROP\n"),
            "unexpected rule in FLANNEL-FWD: -p tcp -j DROP",
        ),
        (
            lambda t: t.replace(
                MASQ_JUMP,
                MASQ_JUMP + '-A POSTROUTING -s 10.9.0.0/16 -m comment --comment "flanneld masq" -j MASQUERADE\n',
            ),
            'stale rule in POSTROUTING: -s 10.9.0.0/16 -m comment --comment "flanneld masq" -j MASQUERADE',
        ),
        (lambda t: "# Table `nat' is incompatible, use 'nft' tool.\n" + t, "iptables cannot read table nat"),
    ],
)
def test_what_no_rule_can_say_is_a_defect(change, defect):
    firewall = observed(change(FLANNEL))
    assert firewall is not None
    assert any(found.startswith(defect) for found in firewall.defects), firewall.defects
    assert firewall != WANTED


@pytest.mark.field_problem(26)
def test_only_the_chain_that_is_out_of_order_is_written():
    lines = FLANNEL.splitlines(keepends=True)
    first, last = 12, len(lines) - 2
    lines[first], lines[last] = lines[last], lines[first]
    assert observed("".join(lines)) != WANTED
    text = repair("".join(lines))
    assert text.startswith("*nat\n:FLANNEL-POSTRTG - [0:0]\n")
    assert "POSTROUTING" not in text
    assert "*filter" not in text


@pytest.mark.field_problem(42)
def test_removal_takes_everything_that_is_ours_and_nothing_else():
    old = FLANNEL + "*nat\n:FLANNEL-FWD - [0:0]\nCOMMIT\n"
    text = iptables.render_remove(saved(old))
    assert text == (
        '*filter\n-D FORWARD -m comment --comment "flanneld forward" -j FLANNEL-FWD\n-F FLANNEL-FWD\n-X FLANNEL-FWD\n'
        'COMMIT\n*nat\n-D POSTROUTING -m comment --comment "flanneld masq" -j FLANNEL-POSTRTG\n'
        "-F FLANNEL-POSTRTG\n-F FLANNEL-FWD\n-X FLANNEL-POSTRTG\n-X FLANNEL-FWD\nCOMMIT\n"
    )
    assert iptables.render_remove(saved("*nat\n-A POSTROUTING -j MASQUERADE\nCOMMIT\n")) == ""


@pytest.mark.field_problem(44)
def test_another_instance_sees_and_names_nothing_of_the_first():
    assert iptables.firewall_of(saved(FLANNEL, "blue"), 4, "blue") is None
    text = iptables.render_put(Firewall(4, "iptables", RULES, "blue"), saved(FLANNEL, "blue"))
    assert "FLANNEL-POSTRTG-blue" in text
    assert "-D" not in text
    assert observed(FLANNEL + text.replace("-I FORWARD 1", "-A FORWARD")) == WANTED


@given(st.text(min_size=1, max_size=60))
def test_names_are_valid_whatever_the_instance_is_called(instance):
    names = names_of(instance)
    assert all(len(chain) <= 28 and chain.isascii() and " " not in chain for chain in names.chains)
    assert names.chains != names_of("").chains


@given(rules(4) | rules(6))
def test_a_rule_survives_iptables_text(rule):
    assert iptables.parse_rule(iptables.render_rule(rule, "flanneld masq"), rule.chain) == rule


@given(st.text())
def test_any_text_is_read_without_an_error(text):
    iptables.firewall_of(saved("*nat\n:FLANNEL-POSTRTG - [0:0]\n-A FLANNEL-POSTRTG " + text), 4)
    iptables.firewall_of(saved(text), 4)


def test_nft_text_replaces_the_whole_table():
    assert nft.render_put(Firewall(4, "nftables", RULES)) == (
        "add table ip flannel-ipv4\n"
        "delete table ip flannel-ipv4\n"
        "table ip flannel-ipv4 {\n"
        "\tchain postrtg {\n"
        "\t\ttype nat hook postrouting priority 100; policy accept;\n"
        "\t\tmeta mark & 0x4000 == 0x4000 return\n"
        "\t\tip saddr 10.244.1.0/24 ip daddr 10.244.0.0/16 return\n"
        "\t\tip saddr 10.244.0.0/16 ip daddr 10.244.1.0/24 return\n"
        "\t\tip saddr != 10.244.0.0/16 ip daddr 10.244.1.0/24 return\n"
        "\t\tip saddr 10.244.0.0/16 ip daddr != 224.0.0.0/4 masquerade fully-random\n"
        "\t\tip saddr != 10.244.0.0/16 ip daddr 10.244.0.0/16 masquerade fully-random\n"
        "\t}\n"
        "\tchain forward {\n"
        "\t\ttype filter hook forward priority 0; policy accept;\n"
        "\t\tip saddr 10.244.0.0/16 accept\n"
        "\t\tip daddr 10.244.0.0/16 accept\n"
        "\t}\n"
        "}\n"
    )


@pytest.mark.field_problem(35)
def test_a_missing_br_netfilter_is_named(tmp_path, monkeypatch):
    def refuse(module):
        raise modules.ModuleMissing(f"kernel lacks the module {module}")

    from flanneld.dataplane import modules

    monkeypatch.setattr(modules, "load", refuse)
    (warning,) = bridge_warnings((4,), tmp_path)
    assert "bridge-nf-call-iptables does not exist" in warning
    assert "br_netfilter" in warning
    (tmp_path / "net/bridge").mkdir(parents=True)
    (tmp_path / "net/bridge/bridge-nf-call-iptables").touch()
    assert bridge_warnings((4,), tmp_path) == ()


def test_rule_without_an_equal_in_nft_is_none():
    assert nft.parse_rule([{"reject": None}], 4, "forward") is None
    assert nft.parse_rule([{"accept": None}, {"accept": None}], 4, "forward") is None
    assert nft.parse_rule([{"counter": {"packets": 1, "bytes": 2}}, {"accept": None}], 4, "forward") == Rule(
        "forward", "accept"
    )
