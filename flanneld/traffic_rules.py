"""Which packets of the pod network are masqueraded and which are let through: one list of rules for every firewall.

P is this node's subnet, C the cluster network. A packet that leaves the host meets the masquerade rules in this order:

====  ======================  ===========  =====================================================================
rule  packet                  verdict      why
====  ======================  ===========  =====================================================================
1     mark 0x4000             return       kube-proxy masquerades it itself; twice would break old kernels
2     P → C                   return       pods talk to pods with their own addresses
3     C → P                   return       the same, on the way in
4     not C → P               return       what comes from outside for our own pods keeps its source
5     C → nonMasqueradeCIDRs  return       the networks that want to see the pods' own addresses
6     C → not multicast       masquerade   pods reach the outside with the host's address
7     not C → C               masquerade   the host, and what it routes, reaches remote pods with its overlay address,
                                           so that the answer comes back through the overlay
====  ======================  ===========  =====================================================================

This is flannel's list in its iptables mode (pkg/trafficmngr/iptables/iptables.go), rule 5 added. In its nftables mode
flannel returns for "not P → C" as rule 4, so that rule 7 is never reached; that is not copied: both modes get this list.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

from backends.kernel_state import Firewall, Rule
from subnet_lease.lease import FAMILIES, Family, IPNetwork
from subnet_lease.network_config import NetworkConfig

KUBE_PROXY_MARK: Final = "0x4000/0x4000"
"""The mark that kube-proxy sets on packets that it will masquerade (its default masqueradeBit 14)."""

MULTICAST: Final[Mapping[Family, str]] = {4: "224.0.0.0/4", 6: "ff00::/8"}


def firewalls(
    config: NetworkConfig,
    subnets: Mapping[Family, IPNetwork],
    *,
    ip_masq: bool,
    forward_rules: bool,
    random_fully: bool,
    instance: str = "",
    others: Iterable[IPNetwork] = (),
) -> tuple[Firewall, ...]:
    """The rules of every family for which we hold a subnet; a family that needs none has no Firewall.

    ``random_fully`` says whether masquerading may pick source ports at random (``--ip-masq-fully-random-disable``,
    and what the installed iptables can do). ``others`` are the networks of other daemons on this host.
    """
    wanted = []
    for family in FAMILIES:
        network, subnet = config.network_of(family), subnets.get(family)
        if network is None or subnet is None:
            continue
        rules: list[Rule] = []
        if ip_masq:
            rules += masquerade_rules(family, network, subnet, _kept_sources(config, family), random_fully)
        if forward_rules:
            rules += forwarding_rules(network, others)
        if rules:
            mode = "nftables" if config.enable_nftables else "iptables"
            wanted.append(Firewall(family, mode, tuple(rules), instance))  # type: ignore[arg-type]
    return tuple(wanted)


def masquerade_rules(
    family: Family, network: IPNetwork, subnet: IPNetwork, kept_sources: Iterable[IPNetwork], random_fully: bool
) -> list[Rule]:
    """The list above. ``kept_sources`` are destinations that see the pods' own addresses (nonMasqueradeCIDRs)."""
    cluster, pods = str(network), str(subnet)
    return [
        Rule("postrouting", "return", mark=KUBE_PROXY_MARK),
        Rule("postrouting", "return", src=pods, dst=cluster),
        Rule("postrouting", "return", src=cluster, dst=pods),
        Rule("postrouting", "return", src=f"!{cluster}", dst=pods),
        *(Rule("postrouting", "return", src=cluster, dst=_cidr(kept)) for kept in kept_sources),
        Rule("postrouting", "masquerade", src=cluster, dst=f"!{MULTICAST[family]}", random_fully=random_fully),
        Rule("postrouting", "masquerade", src=f"!{cluster}", dst=cluster, random_fully=random_fully),
    ]


def forwarding_rules(network: IPNetwork, others: Iterable[IPNetwork] = ()) -> list[Rule]:
    """Whatever comes from or goes to a pod may be forwarded, but not between this network and another of the host."""
    ours = str(network)
    apart = [str(other) for other in others if other.version == network.version and not other.overlaps(network)]
    return [
        *(Rule("forward", "drop", src=ours, dst=other) for other in apart),
        *(Rule("forward", "drop", src=other, dst=ours) for other in apart),
        Rule("forward", "accept", src=ours),
        Rule("forward", "accept", dst=ours),
    ]


def _kept_sources(config: NetworkConfig, family: Family) -> list[IPNetwork]:
    networks: Iterable[IPNetwork] = getattr(config, "non_masquerade_cidrs", ())
    return list(dict.fromkeys(n for n in networks if n.version == family))


def _cidr(network: IPNetwork) -> str | None:
    """None for "everywhere", which firewalls print as no condition at all."""
    return str(network) if network.prefixlen else None
