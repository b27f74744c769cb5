"""Foreign nftables chains that drop what we let through.

An accept ends only its own base chain: every other base chain on the forward hook still sees the packet, and one drop
is final. No rule of ours can win against that, so we find such chains and say what to write into them.

Pure. A new packet from pod to pod is walked through each foreign base chain of ``nft -j list ruleset``. A condition on
addresses, protocol family, connection state or one of our devices is decided; any other is taken as "perhaps", and a
rule with a "perhaps" neither saves nor dooms the packet.
"""

from __future__ import annotations

import fnmatch
import ipaddress
import shlex
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from flanneld.dataplane.netfilter_nft import cidr_of

Outcome = Literal["accept", "drop", "return", "continue"]
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

POD_DEVICES: Final = ("cni0", "docker0", "flannel*")
"""A rule that names one of these was written for the pod network."""

_SILENT: Final = frozenset({"counter", "log", "comment", "mangle", "nftrace", "meter", "quota"})
"""Statements that decide nothing."""
_DEPTH: Final = 16


@dataclass(frozen=True, slots=True)
class _Table:
    family: str
    name: str
    rules: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]]


def blocking_chains(
    ruleset: Iterable[Mapping[str, Any]],
    networks: Sequence[str],
    *,
    ours: Collection[tuple[str, str]] = (),
    devices: Sequence[str] = POD_DEVICES,
) -> tuple[str, ...]:
    """Sentences that name each chain that drops packets of ``networks`` (CIDR), and the command that lets them pass.

    ``ruleset`` are the objects of ``nft -j list``; tables in ``ours`` (family, name) are left out.
    """
    items = [next(iter(item.items())) for item in ruleset]
    found = []
    for what, chain in items:
        if what != "chain" or chain.get("hook") != "forward" or (chain["family"], chain["table"]) in ours:
            continue
        table = _table(chain["family"], chain["table"], items)
        for network in map(ipaddress.ip_network, networks):
            if chain["family"] not in ("inet", "ip" if network.version == 4 else "ip6"):
                continue
            outcome, reason = _walk(table, chain["name"], network, devices)
            if outcome == "continue" and chain.get("policy") == "drop":
                outcome, reason = "drop", "policy drop"
            if outcome == "drop":
                found.append(_sentence(chain, reason, network))
    return tuple(found)


def _table(family: str, name: str, items: Iterable[tuple[str, Any]]) -> _Table:
    rules: dict[str, list[Sequence[Mapping[str, Any]]]] = {}
    for what, value in items:
        if what == "rule" and value["family"] == family and value["table"] == name:
            rules.setdefault(value["chain"], []).append(value.get("expr", ()))
    return _Table(family, name, rules)


def _sentence(chain: Mapping[str, Any], reason: str, network: Network) -> str:
    family, table, name = chain["family"], chain["table"], chain["name"]
    tool = chain.get("tool", "iptables" if family == "ip" else "ip6tables")
    place = f"{tool} chain {name}" if "tool" in chain else f"table {family} {table} chain {name}"
    where = f"{place} ({reason}) drops packets of {network}"
    if family in ("ip", "ip6") and (table, name) == ("filter", "FORWARD"):
        commands = [f"{tool} -I FORWARD -{side} {network} -j ACCEPT" for side in "sd"]
    else:
        protocol = "ip" if network.version == 4 else "ip6"
        commands = [f"nft insert rule {family} {table} {name} {protocol} {s}addr {network} accept" for s in "sd"]
    return f"{where}: let them pass with '{commands[0]}' and '{commands[1]}'"


def _walk(table: _Table, chain: str, network: Network, devices: Sequence[str], depth: int = 0) -> tuple[Outcome, str]:
    """What becomes of the packet in this chain, and the reason if it is dropped."""
    if depth > _DEPTH:
        return "continue", ""
    for expressions in table.rules.get(chain, ()):
        sure, verdict, target = _read(expressions, network, devices)
        if not sure or verdict is None:
            continue
        if verdict in ("jump", "goto"):
            outcome, reason = _walk(table, target, network, devices, depth + 1)
            if outcome in ("accept", "drop"):
                return outcome, reason
            if verdict == "goto":
                return "continue", ""
        elif verdict == "accept":
            return "accept", ""
        elif verdict == "return":
            return "return" if depth else "continue", ""
        else:
            return "drop", f"{verdict} in {chain}" if depth else f"rule {verdict}"
    return "continue", ""


def _read(
    expressions: Iterable[Mapping[str, Any]], network: Network, devices: Sequence[str]
) -> tuple[bool, str | None, str]:
    """(every condition surely holds, verdict, jump target) of one rule."""
    sure, verdict, target = True, None, ""
    for what, value in _pairs(expressions):
        if what in ("accept", "drop", "return", "reject"):
            verdict = what
        elif what in ("jump", "goto"):
            verdict, target = what, value["target"]
        elif what == "match":
            sure = sure and _holds(value, network, devices)
        elif what == "xt" and isinstance(value, Mapping) and value.get("name") == "comment":
            continue
        elif what == "xt" and isinstance(value, Mapping) and value.get("name") == "REJECT":
            verdict = "reject"
        elif what == "vmap":
            verdict, target = _vmap(value, verdict, target)
        elif what not in _SILENT:
            sure = False
    return sure, verdict, target


def _pairs(expressions: Iterable[Mapping[str, Any]]) -> Iterator[tuple[str, Any]]:
    return (next(iter(expression.items())) for expression in expressions)


def _vmap(value: Mapping[str, Any], verdict: str | None, target: str) -> tuple[str | None, str]:
    """The verdict that ``ct state vmap { … }`` has for a new packet; other maps decide nothing."""
    data = value.get("data")
    if value.get("key") == {"ct": {"key": "state"}} and isinstance(data, Mapping):
        for state, action in data.get("set", ()):
            if state == "new":
                ((what, detail),) = action.items()
                return what, detail["target"] if detail else ""
    return verdict, target


def _holds(match: Mapping[str, Any], network: Network, devices: Sequence[str]) -> bool:
    """Whether the condition surely holds for a new packet between pods."""
    operator, left, right = match.get("op"), match.get("left"), match.get("right")
    if not isinstance(left, Mapping):
        return False
    ((what, detail),) = left.items()
    values = _values(right)
    if what == "payload" and detail.get("field") in ("saddr", "daddr"):
        inside = any(_covers(value, network) for value in values)
        return inside if operator == "==" else bool(values) and not any(_overlaps(v, network) for v in values)
    if operator not in ("==", "in"):
        return False
    if what == "meta" and detail.get("key") in ("iifname", "oifname"):
        names = [value for value in values if isinstance(value, str)]
        return any(fnmatch.fnmatchcase(d, n) or fnmatch.fnmatchcase(n, d) for n in names for d in devices)
    if what == "meta" and detail.get("key") == "nfproto":
        return f"ipv{network.version}" in values
    if what == "ct" and detail.get("key") == "state":
        return "new" in values
    return False


def _values(right: Any) -> list[Any]:
    if isinstance(right, Mapping) and "set" in right:
        right = right["set"]
    return list(right) if isinstance(right, list) else [right]


def _covers(value: Any, network: Network) -> bool:
    cidr = cidr_of(value)
    if cidr is None:
        return False
    outer = ipaddress.ip_network(cidr)
    return outer.version == network.version and network.subnet_of(outer)  # type: ignore[arg-type]


def _overlaps(value: Any, network: Network) -> bool:
    """Also True for what cannot be read: a named set may hold anything."""
    cidr = cidr_of(value)
    return cidr is None or network.overlaps(ipaddress.ip_network(cidr))


def ruleset_of_save(text: str, family: Literal[4, 6], tool: str) -> list[Mapping[str, Any]]:
    """The filter table of ``iptables-save`` in nft's own words; ``tool`` is the command that changes it."""
    nft_family = "ip" if family == 4 else "ip6"
    place = {"family": nft_family, "table": "filter"}
    items: list[Mapping[str, Any]] = []
    table = ""
    for line in text.splitlines():
        if line.startswith("*"):
            table = line[1:]
        elif table == "filter" and line.startswith(":FORWARD "):
            policy = line.split()[1].lower()
            items.append({"chain": {**place, "name": "FORWARD", "hook": "forward", "policy": policy, "tool": tool}})
        elif table == "filter" and line.startswith("-A "):
            chain, *words = shlex.split(line)[1:]
            items.append({"rule": {**place, "chain": chain, "expr": list(_expressions(words, nft_family))}})
    return items


def _expressions(words: Sequence[str], family: str) -> Iterator[Mapping[str, Any]]:
    """The conditions and the verdict of one iptables rule; what is not understood becomes a "perhaps"."""
    rest, operator = iter(words), "=="
    for word in rest:
        if word == "!":
            operator = "!="
            continue
        if word in _IPTABLES_FIELDS:
            left, value = _IPTABLES_FIELDS[word], next(rest, "")
            if "payload" in left:
                left = {"payload": {"protocol": family, **left["payload"]}}
            right: Any = value.lower().split(",") if "ct" in left else value.replace("+", "*")
            yield {"match": {"op": operator, "left": left, "right": right}}
        elif word in ("-j", "-g"):
            target = next(rest, "")
            if target in ("ACCEPT", "DROP", "RETURN", "REJECT"):
                yield {target.lower(): None}
            elif target not in ("LOG", "NFLOG"):
                yield {"jump" if word == "-j" else "goto": {"target": target}}
        elif word in ("-m", "--comment", "--reject-with", "--log-prefix", "--log-level"):
            value = next(rest, "")
            if word == "-m" and value not in ("comment", "conntrack", "state"):
                yield {"perhaps": value}
        else:
            yield {"perhaps": word}
        operator = "=="


_IPTABLES_FIELDS: Final[Mapping[str, Mapping[str, Any]]] = {
    "-s": {"payload": {"field": "saddr"}},
    "-d": {"payload": {"field": "daddr"}},
    "-i": {"meta": {"key": "iifname"}},
    "-o": {"meta": {"key": "oifname"}},
    "--ctstate": {"ct": {"key": "state"}},
    "--state": {"ct": {"key": "state"}},
}
