"""The abstract rules: flannel's list and order, one verdict in both modes."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network

import pytest

from backends.kernel_state import Firewall, Rule
from flanneld.traffic_rules import firewalls
from subnet_lease.network_config import NetworkConfig

CONFIG = NetworkConfig(
    enable_ipv6=True, network=IPv4Network("10.244.0.0/16"), ipv6_network=IPv6Network("fd00:244::/48")
)
SUBNETS = {4: IPv4Network("10.244.1.0/24"), 6: IPv6Network("fd00:244:0:1::/64")}


def wanted(config=CONFIG, subnets=SUBNETS, *, ip_masq=True, forward_rules=True, random_fully=True, instance=""):
    return firewalls(
        config,
        subnets,
        ip_masq=ip_masq,
        forward_rules=forward_rules,
        random_fully=random_fully,
        instance=instance,
    )


def verdict(firewall: Firewall, chain: str, src: str, dst: str, mark: int = 0) -> str:
    """What the list says about a packet."""

    def holds(condition: str | None, address: str) -> bool:
        if condition is None:
            return True
        inside = ip_address(address) in ip_network(condition.removeprefix("!"))
        return inside != condition.startswith("!")

    for rule in firewall.rules:
        marked = rule.mark is None or mark & int(rule.mark.split("/")[1], 16) == int(rule.mark.split("/")[0], 16)
        if rule.chain == chain and marked and holds(rule.src, src) and holds(rule.dst, dst):
            return rule.verdict
    return "none"


def test_the_list_is_flannels_in_flannels_order():
    v4, v6 = wanted()
    assert (v4.family, v6.family) == (4, 6)
    assert v4.rules == (
        Rule("postrouting", "return", mark="0x4000/0x4000"),
        Rule("postrouting", "return", src="10.244.1.0/24", dst="10.244.0.0/16"),
        Rule("postrouting", "return", src="10.244.0.0/16", dst="10.244.1.0/24"),
        Rule("postrouting", "return", src="!10.244.0.0/16", dst="10.244.1.0/24"),
        Rule("postrouting", "masquerade", src="10.244.0.0/16", dst="!224.0.0.0/4", random_fully=True),
        Rule("postrouting", "masquerade", src="!10.244.0.0/16", dst="10.244.0.0/16", random_fully=True),
        Rule("forward", "accept", src="10.244.0.0/16"),
        Rule("forward", "accept", dst="10.244.0.0/16"),
    )
    assert v6.rules[4].dst == "!ff00::/8"


@pytest.mark.field_problem(25)
def test_both_modes_have_the_same_rules():
    iptables, nftables = wanted(), wanted(replace(CONFIG, enable_nftables=True))
    assert [f.rules for f in iptables] == [f.rules for f in nftables]
    assert {f.mode for f in iptables} == {"iptables"}
    assert {f.mode for f in nftables} == {"nftables"}


@pytest.mark.field_problem(25)
@pytest.mark.parametrize(
    ("src", "dst", "mark", "expected"),
    [
        ("10.244.1.2", "10.244.2.2", 0, "return"),  # pod → remote pod
        ("10.244.2.2", "10.244.1.2", 0, "return"),  # remote pod → pod
        ("192.0.2.2", "10.244.1.2", 0, "return"),  # outside → pod
        ("10.244.1.2", "192.0.2.2", 0, "masquerade"),  # pod → outside
        ("192.0.2.1", "10.244.2.2", 0, "masquerade"),  # host or outside → remote pod
        ("10.244.1.2", "224.0.0.9", 0, "none"),  # multicast
        ("192.0.2.1", "192.0.2.2", 0, "none"),  # not ours
        ("10.244.1.2", "192.0.2.2", 0x4000, "return"),  # kube-proxy's
        ("10.244.1.2", "192.0.2.2", 0x4001, "return"),  # kube-proxy's, with another bit set
        ("10.244.1.2", "192.0.2.2", 0x8000, "masquerade"),
    ],
)
def test_verdicts(src, dst, mark, expected):
    assert verdict(wanted()[0], "postrouting", src, dst, mark) == expected


@pytest.mark.field_problem(40)
def test_named_networks_see_the_pods_own_addresses():
    kept = (IPv4Network("192.0.2.0/24"), IPv6Network("2001:db8::/32"))
    v4, v6 = wanted(replace(CONFIG, non_masquerade_cidrs=kept))
    assert verdict(v4, "postrouting", "10.244.1.2", "192.0.2.2") == "return"
    assert verdict(v4, "postrouting", "10.244.1.2", "198.51.100.2") == "masquerade"
    assert verdict(v6, "postrouting", "fd00:244:0:1::2", "2001:db8::2") == "return"
    assert all("192.0.2" not in str(rule) for rule in v6.rules)


@pytest.mark.field_problem(40)
def test_everywhere_is_no_condition():
    (v4, _) = wanted(replace(CONFIG, non_masquerade_cidrs=(IPv4Network("0.0.0.0/0"),)))
    assert Rule("postrouting", "return", src="10.244.0.0/16") in v4.rules
    assert verdict(v4, "postrouting", "10.244.1.2", "198.51.100.2") == "return"


@pytest.mark.field_problem(44)
def test_another_network_of_the_host_is_kept_apart():
    others = (IPv4Network("10.6.0.0/16"), IPv4Network("10.244.128.0/17"), IPv6Network("fd06::/48"))
    v4, v6 = firewalls(CONFIG, SUBNETS, ip_masq=True, forward_rules=True, random_fully=True, others=others)
    assert verdict(v4, "forward", "10.244.1.2", "10.6.1.2") == "drop"
    assert verdict(v4, "forward", "10.6.1.2", "10.244.1.2") == "drop"
    assert verdict(v4, "forward", "10.244.1.2", "10.244.2.2") == "accept"
    assert verdict(v4, "forward", "10.244.1.2", "10.244.128.2") == "accept", "an overlap is nobody's border"
    assert verdict(v6, "forward", "fd06::2", "fd00:244:0:1::2") == "drop"


def test_nothing_wanted_is_no_firewall():
    assert wanted(ip_masq=False, forward_rules=False) == ()
    assert wanted(subnets={}) == ()
    assert [f.family for f in wanted(subnets={6: SUBNETS[6]})] == [6]
    assert [f.family for f in wanted(replace(CONFIG, enable_ipv6=False))] == [4]


def test_options():
    assert {rule.chain for rule in wanted(ip_masq=False)[0].rules} == {"forward"}
    assert {rule.chain for rule in wanted(forward_rules=False)[0].rules} == {"postrouting"}
    assert not any(rule.random_fully for rule in wanted(random_fully=False)[0].rules)
    assert wanted(instance="blue")[0].instance == "blue"
