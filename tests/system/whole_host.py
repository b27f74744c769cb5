"""Everything that a host has of networking, to compare a host with itself from before."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

from flanneld.lab.hosts import Host
from flanneld.lab.wait import wait_until

COMMANDS = (
    "ip -o link",
    "ip -o addr",
    "ip route show table all",
    "ip -6 route show table all",
    "ip rule",
    "ip -6 rule",
    "ip neigh show nud permanent",
    "bridge fdb show",
    "nft list ruleset",
    "iptables-save",
    "ip6tables-save",
)

_VOLATILE = re.compile(
    r"^#.*\n|^.* inet6 fe80:.*\n|^((local|anycast|multicast) )?(fe80:\S*|ff00::/8) .*\n"
    r"|\[\d+:\d+\]|\d+: |expires \d+sec|valid_lft \w+|preferred_lft \w+",
    re.MULTILINE,
)


def everything(host: Host, commands: Iterable[str] = COMMANDS) -> str:
    """Links, addresses, routes, rules, fixed neighbours and firewall, without what only counts or numbers.

    Nor with link-local addresses, which come a moment after their interface.
    """
    return _VOLATILE.sub("", "\n".join(host.run(each, check=False) for each in commands))


def becomes(host: Host, before: str) -> None:
    """Wait until a host is again what it was; a program of ours may end, and its device go, a moment later."""

    def difference() -> str:
        return "\n".join(difflib.unified_diff(before.splitlines(), everything(host).splitlines(), "before", "now", n=0))

    wait_until(lambda: everything(host) == before, 5, difference)


def use_iptables(host: Host) -> None:
    """iptables leaves its built-in chains behind, empty, once anybody has used them: so they are used beforehand."""
    for tool in ("iptables", "ip6tables"):
        for table, chain in (("nat", "POSTROUTING"), ("filter", "FORWARD")):
            host.run(f"{tool} -t {table} -A {chain} -j RETURN")
            host.run(f"{tool} -t {table} -D {chain} -j RETURN")
