"""Which foreign chains drop pod packets, decided from what ``nft -j`` prints."""

from __future__ import annotations

import pytest

from flanneld.dataplane.netfilter_blocking import blocking_chains, ruleset_of_save

pytestmark = pytest.mark.field_problem(24)

NETWORK = "10.244.0.0/16"
DROP, ACCEPT, REJECT = {"drop": None}, {"accept": None}, {"reject": {"type": "icmpx", "expr": "admin-prohibited"}}


def match(left, right, op="=="):
    return {"match": {"op": op, "left": left, "right": right}}


def saddr(address, length, op="=="):
    return match({"payload": {"protocol": "ip", "field": "saddr"}}, {"prefix": {"addr": address, "len": length}}, op)


def iifname(name):
    return match({"meta": {"key": "iifname"}}, name)


def ct(*states):
    return match({"ct": {"key": "state"}}, list(states), "in")


TCP = match({"payload": {"protocol": "tcp", "field": "dport"}}, 22)


def ruleset(*rules, policy="accept", family="inet", hook="forward", chain="forward", other=()):
    base = {"family": family, "table": "filter", "name": chain, "hook": hook, "policy": policy}
    made = [{"chain": base}]
    made += [{"rule": {"family": family, "table": "filter", "chain": chain, "expr": list(r)}} for r in rules]
    made += [{"rule": {"family": family, "table": "filter", "chain": "other", "expr": list(r)}} for r in other]
    return made


@pytest.mark.parametrize(
    "listing",
    [
        ruleset(policy="drop"),
        ruleset([DROP]),
        ruleset([{"counter": None}, REJECT]),
        ruleset([ct("established", "related"), ACCEPT], policy="drop"),
        ruleset([TCP, ACCEPT], policy="drop"),
        ruleset([saddr("10.244.1.0", 24), ACCEPT], policy="drop"),
        ruleset([iifname("eth0"), ACCEPT], policy="drop"),
        ruleset([{"jump": {"target": "other"}}], other=[[DROP]]),
        ruleset([{"jump": {"target": "other"}}], other=[[{"return": None}], [ACCEPT]], policy="drop"),
        ruleset([saddr("10.0.0.0", 8), DROP]),
        ruleset([saddr("192.168.0.0", 16, "!="), DROP]),
        ruleset([{"xt": {"type": "target", "name": "REJECT"}}], family="ip", chain="FORWARD"),
        ruleset([{"xt": {"type": "match", "name": "conntrack"}}, ACCEPT], policy="drop"),
        ruleset([{"jump": {"target": "forward"}}], policy="drop"),
    ],
)
def test_a_chain_that_drops(listing):
    (sentence,) = blocking_chains(listing, [NETWORK])
    assert "drops packets of 10.244.0.0/16" in sentence
    assert " accept'" in sentence or " ACCEPT'" in sentence


@pytest.mark.parametrize(
    "listing",
    [
        ruleset(),
        ruleset(policy="drop", hook="input"),
        ruleset(policy="drop", family="ip6"),
        ruleset(policy="drop", family="bridge"),
        ruleset([ACCEPT], [DROP]),
        ruleset([saddr("10.244.0.0", 16), ACCEPT], policy="drop"),
        ruleset([saddr("10.0.0.0", 8), ACCEPT], [REJECT]),
        ruleset([saddr("192.168.0.0", 16, "!="), ACCEPT], policy="drop"),
        ruleset([saddr("10.244.0.0", 16, "!="), DROP]),
        ruleset([match({"payload": {"protocol": "ip", "field": "daddr"}}, {"set": ["1.1.1.1", {"prefix": {"addr": "10.0.0.0", "len": 8}}]}), ACCEPT], policy="drop"),
        ruleset([match({"payload": {"protocol": "ip", "field": "daddr"}}, "@banned", "!="), DROP]),
        ruleset([iifname("cni0"), ACCEPT], policy="drop"),
        ruleset([iifname("flannel.1"), ACCEPT], policy="drop"),
        ruleset([iifname({"set": ["lo", "flannel*"]}), ACCEPT], policy="drop"),
        ruleset([ct("established", "new"), ACCEPT], policy="drop"),
        ruleset([ct("invalid"), DROP]),
        ruleset([TCP, DROP]),
        ruleset([{"limit": {"rate": 3}}, DROP]),
        ruleset([match({"meta": {"key": "nfproto"}}, "ipv6"), DROP]),
        ruleset([{"jump": {"target": "other"}}], [DROP], other=[[ACCEPT]]),
        ruleset(
            [{"vmap": {"key": {"ct": {"key": "state"}}, "data": {"set": [["established", ACCEPT], ["new", {"jump": {"target": "other"}}]]}}}],
            other=[[saddr("10.244.0.0", 16), ACCEPT]],
            policy="drop",
        ),
        ruleset([{"xt": {"type": "match", "name": "comment"}}, {"jump": {"target": "other"}}], other=[[saddr("10.244.0.0", 16), ACCEPT]], policy="drop"),
    ],
)  # fmt: skip
def test_a_chain_that_lets_pass(listing):
    assert blocking_chains(listing, [NETWORK]) == ()


def test_firewalld_with_the_pod_network_in_its_trusted_zone():
    listing = ruleset(
        [ct("established", "related"), ACCEPT],
        [{"jump": {"target": "other"}}],
        [REJECT],
        other=[[saddr("10.244.0.0", 16), {"goto": {"target": "trusted"}}]],
    )
    trusted = {"rule": {"family": "inet", "table": "filter", "chain": "trusted", "expr": [ACCEPT]}}
    assert blocking_chains([*listing, trusted], [NETWORK]) == ()
    assert len(blocking_chains(listing, [NETWORK])) == 1


def test_the_sentence_holds_commands_to_paste():
    assert blocking_chains(ruleset(policy="drop"), [NETWORK]) == (
        "table inet filter chain forward (policy drop) drops packets of 10.244.0.0/16: let them pass with "
        "'nft insert rule inet filter forward ip saddr 10.244.0.0/16 accept' and "
        "'nft insert rule inet filter forward ip daddr 10.244.0.0/16 accept'",
    )


def test_tables_of_ours_are_left_out_and_families_kept_apart():
    listing = ruleset(policy="drop")
    assert blocking_chains(listing, [NETWORK], ours={("inet", "filter")}) == ()
    assert len(blocking_chains(listing, [NETWORK, "fd00::/48"])) == 2
    assert "ip6 saddr fd00::/48" in blocking_chains(listing, ["fd00::/48"])[0]


@pytest.mark.parametrize(
    ("rules", "blocked"),
    [
        ("", True),
        ("-A FORWARD -s 10.0.0.0/8 -j ACCEPT", False),
        ("-A FORWARD ! -s 192.168.0.0/16 -j ACCEPT", False),
        ("-A FORWARD -s 10.0.0.0/8 -p tcp -m tcp --dport 80 -j ACCEPT", True),
        ("-A FORWARD -i cni+ -j ACCEPT", False),
        ("-A FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT", True),
        ('-A FORWARD -m comment --comment "all of it" -j ACCEPT', False),
        ("-A FORWARD -j FLANNEL-FWD\n-A FLANNEL-FWD -d 10.244.0.0/16 -j ACCEPT", False),
        ("-A FORWARD -g other\n-A FORWARD -j ACCEPT\n-A other -j LOG --log-prefix x", True),
    ],
)
def test_iptables_save_is_read_the_same_way(rules, blocked):
    text = f"*nat\n:FORWARD ACCEPT [0:0]\nCOMMIT\n*filter\n:FORWARD DROP [0:0]\n{rules}\nCOMMIT\n"
    found = blocking_chains(ruleset_of_save(text, 4, "iptables-legacy"), [NETWORK])
    assert bool(found) == blocked
    if blocked:
        assert found[0].startswith("iptables-legacy chain FORWARD (policy drop) drops packets")
        assert "'iptables-legacy -I FORWARD -s 10.244.0.0/16 -j ACCEPT'" in found[0]
