"""nftables as text: ``nft -j list table`` becomes a Firewall, a Firewall becomes input of ``nft -f -``.

Pure. Table and chain names, hooks and priorities are flannel's (pkg/trafficmngr/nftables/nftables.go). One input is one
transaction: the whole table is replaced, and no packet meets half of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Literal

from backends.kernel_state import Firewall, Rule
from flanneld.dataplane.netfilter_iptables import canonical_cidr
from flanneld.dataplane.netfilter_names import Family, names_of

NFT_FAMILY: Final[Mapping[Family, str]] = {4: "ip", 6: "ip6"}

_CHAIN: Final = {"postrouting": "postrtg", "forward": "forward"}
_HOOK: Final = {
    "postrtg": ("type nat hook postrouting priority 100; policy accept;", ("nat", "postrouting", 100, "accept")),
    "forward": ("type filter hook forward priority 0; policy accept;", ("filter", "forward", 0, "accept")),
}
"""How a chain is spelled, and what ``nft -j`` says of it. Priority 100 is "srcnat", 0 is "filter"."""


def render_put(firewall: Firewall) -> str:
    """Input of ``nft -f -``: the table as it should be, in place of whatever stands there."""
    table = f"table {NFT_FAMILY[firewall.family]} {names_of(firewall.instance).table(firewall.family)}"
    text = [f"add {table}", f"delete {table}", f"{table} {{"]
    for kind, chain in _CHAIN.items():
        rules = [rule for rule in firewall.rules if rule.chain == kind]
        if rules:
            text += [f"\tchain {chain} {{", f"\t\t{_HOOK[chain][0]}"]
            text += [f"\t\t{render_rule(rule, firewall.family)}" for rule in rules]
            text.append("\t}")
    return "\n".join([*text, "}"]) + "\n"


def render_remove(family: Family, instance: str = "") -> str:
    """Input of ``nft -f -`` after which there is no such table; correct also when there was none."""
    table = f"table {NFT_FAMILY[family]} {names_of(instance).table(family)}"
    return f"add {table}\ndelete {table}\n"


def render_rule(rule: Rule, family: Family) -> str:
    words = []
    if rule.mark is not None:
        value, _, mask = rule.mark.partition("/")
        words.append(f"meta mark & {mask} == {value}" if mask else f"meta mark {value}")
    for field, cidr in (("saddr", rule.src), ("daddr", rule.dst)):
        if cidr is not None:
            operator, address = ("!= ", cidr[1:]) if cidr.startswith("!") else ("", cidr)
            words.append(f"{NFT_FAMILY[family]} {field} {operator}{address}")
    words.append(rule.verdict)
    if rule.random_fully:
        words.append("fully-random")
    return " ".join(words)


def parse_table(listing: Mapping[str, Any], family: Family, instance: str = "") -> Firewall | None:
    """Read the answer to ``nft -j list table``; None when our table is not in it."""
    nft_family, table = NFT_FAMILY[family], names_of(instance).table(family)
    kinds = {chain: kind for kind, chain in _CHAIN.items()}
    rules: dict[str, list[Rule]] = {chain: [] for chain in kinds}
    present: dict[str, bool] = {}
    defects: list[str] = []
    found = False
    for item in listing.get("nftables", ()):
        ((what, value),) = item.items()
        if what == "table" and value["family"] == nft_family and value["name"] == table:
            found = True
            if value.get("flags"):
                defects.append(f"table {table} has flags: {value['flags']}")
        elif not isinstance(value, Mapping) or value.get("family") != nft_family or value.get("table") != table:
            continue
        elif what == "chain":
            defects += _chain_defects(value)
            present[value["name"]] = True
        elif what == "rule":
            chain = value["chain"]
            rule = parse_rule(value.get("expr", ()), family, kinds[chain]) if chain in kinds else None  # type: ignore[arg-type]
            if rule is None:
                defects.append(f"unexpected rule in chain {chain}: handle {value.get('handle')}")
            else:
                rules[chain].append(rule)
    if not found:
        return None
    defects += [f"chain {chain} is empty" for chain in rules if chain in present and not rules[chain]]
    return Firewall(family, "nftables", tuple(rules["postrtg"] + rules["forward"]), instance, tuple(defects))


def _chain_defects(chain: Mapping[str, Any]) -> list[str]:
    name = chain["name"]
    if name not in _HOOK:
        return [f"unexpected chain {name}"]
    has = tuple(chain.get(word) for word in ("type", "hook", "prio", "policy"))
    if has == _HOOK[name][1]:
        return []
    return [f"chain {name} is {' '.join(map(str, has))}, not {_HOOK[name][0].rstrip(';')}"]


def parse_rule(expressions: Any, family: Family, chain: Literal["postrouting", "forward"]) -> Rule | None:
    """The Rule that a list of nft expressions stands for; None when no Rule can say the same."""
    found: dict[str, Any] = {}
    for expression in expressions:
        ((what, value),) = expression.items()
        if what == "counter":
            continue
        if "verdict" in found:
            return None
        if what in ("return", "accept", "drop"):
            found["verdict"] = what
        elif what == "masquerade":
            flags = (value or {}).get("flags", [])
            flags = [flags] if isinstance(flags, str) else flags
            if set(value or {}) - {"flags"} or set(flags) - {"fully-random"}:
                return None
            found |= {"verdict": what, "random_fully": bool(flags)}
        elif what == "match":
            condition = _condition(value, family)
            if condition is None or condition[0] in found:
                return None
            found[condition[0]] = condition[1]
        else:
            return None
    return Rule(chain, **found) if "verdict" in found else None


def _condition(match: Mapping[str, Any], family: Family) -> tuple[str, str] | None:
    operator, left, right = match.get("op"), match.get("left"), match.get("right")
    if operator not in ("==", "!=") or not isinstance(left, Mapping):
        return None
    payload = left.get("payload")
    if payload is not None:
        side = {"saddr": "src", "daddr": "dst"}.get(payload.get("field"))
        cidr = cidr_of(right)
        if side is None or cidr is None or payload.get("protocol") != NFT_FAMILY[family]:
            return None
        return side, f"!{cidr}" if operator == "!=" else cidr
    masked, mask = left.get("&", (left, None))
    if isinstance(right, Mapping) and "prefix" in right:  # how nft shows a mask of leading ones
        right, length = right["prefix"]["addr"], right["prefix"]["len"]
        mask = 0xFFFFFFFF << (32 - length) & 0xFFFFFFFF
    if operator != "==" or masked != {"meta": {"key": "mark"}} or not isinstance(right, int):
        return None
    return "mark", f"{right:#x}/{mask:#x}" if mask is not None else f"{right:#x}"


def cidr_of(value: Any) -> str | None:
    """An address or prefix of ``nft -j`` in CIDR form."""
    if isinstance(value, str):
        return canonical_cidr(value)
    prefix = value.get("prefix") if isinstance(value, Mapping) else None
    return canonical_cidr(f"{prefix['addr']}/{prefix['len']}") if prefix else None
