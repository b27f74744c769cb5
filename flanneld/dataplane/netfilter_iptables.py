"""iptables as text: what ``iptables-save`` prints becomes a Firewall, a Firewall becomes input of ``iptables-restore``.

Pure. The layout is flannel's: chain FLANNEL-POSTRTG in nat, reached from POSTROUTING; chain FLANNEL-FWD in filter,
reached from FORWARD. flannel appends its jump to FORWARD and loses to a REJECT before it; here the jump stands before
everything but the chains of policy engines and of the administrator, which must go on deciding first.

Every text is one transaction for each table (``*table`` to COMMIT): a chain is never seen empty.
"""

from __future__ import annotations

import ipaddress
import shlex
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Final, Literal

from backends.kernel_state import Firewall, Rule
from flanneld.dataplane.netfilter_names import Family, Names, names_of

Table = Literal["nat", "filter"]

GOES_FIRST: Final = ("cali-", "KUBE-", "CILIUM_", "WEAVE-", "DOCKER-USER", "DOCKER-ISOLATION-", "FLANNEL-FWD")
"""Chains that may stand before our jump in FORWARD: network policies, kube-proxy, the administrator's own rules, those
of a second daemon like us, and what keeps Docker's bridges (none of them ours) apart.

Some of them (Calico, kube-router) insist on the first place and would take it back for ever.
"""

_TARGETS: Final = {"return": "RETURN", "accept": "ACCEPT", "masquerade": "MASQUERADE", "drop": "DROP"}
_VERDICTS: Final = {target: verdict for verdict, target in _TARGETS.items()}


@dataclass(frozen=True, slots=True)
class Place:
    """One of our two chains: its table, the built-in chain that jumps to it, and the comment its rules carry."""

    table: Table
    base: Literal["POSTROUTING", "FORWARD"]
    chain: str
    comment: str

    @property
    def kind(self) -> Literal["postrouting", "forward"]:
        """The chain as a Rule names it."""
        return "postrouting" if self.base == "POSTROUTING" else "forward"

    @property
    def jump(self) -> str:
        return f'-m comment --comment "{self.comment}" -j {self.chain}'

    def is_jump(self, spec: str) -> bool:
        """Whether a printed rule sends every packet to our chain, whatever its comment."""
        words = _words(spec)
        if words[:3] == ["-m", "comment", "--comment"]:
            words = words[4:]
        return words == ["-j", self.chain]


def places(names: Names) -> tuple[Place, Place]:
    return (
        Place("nat", "POSTROUTING", names.masq_chain, names.masq_comment),
        Place("filter", "FORWARD", names.forward_chain, names.forward_comment),
    )


@dataclass(frozen=True, slots=True)
class Line:
    """One rule as printed by iptables-save, without ``-A CHAIN``."""

    table: str
    chain: str
    spec: str


@dataclass(frozen=True, slots=True)
class Saved:
    """The part of iptables-save that concerns one instance.

    ``chains`` are those chains of ours that exist, in any table; ``lines`` the rules of our chains, of POSTROUTING and
    FORWARD, and any other rule that names one of our chains, in order. ``unreadable`` are tables that iptables-nft
    refuses to print because someone put rules of nft's own into them.
    """

    chains: tuple[tuple[str, str], ...] = ()
    lines: tuple[Line, ...] = ()
    unreadable: tuple[str, ...] = ()

    def of(self, table: str, chain: str) -> list[str]:
        return [line.spec for line in self.lines if line.table == table and line.chain == chain]


def parse_save(text: str, names: Names) -> Saved:
    """Read the output of iptables-save. One pass; the tens of thousands of lines of a big kube-proxy are stepped over."""
    table, chains, lines, unreadable = "", [], [], []
    bases = {("nat", "POSTROUTING"), ("filter", "FORWARD")}
    for line in text.splitlines():
        if line.startswith("-A "):
            _, chain, spec = line.split(" ", 2) if line.count(" ") > 1 else (*line.split(" "), "")
            ours = chain in names.chains or (table, chain) in bases
            if ours or any(f"{name}" in spec for name in names.chains):
                lines.append(Line(table, chain, spec))
        elif line.startswith(":"):
            chain = line[1:].split(" ", 1)[0]
            if chain in names.chains:
                chains.append((table, chain))
        elif line.startswith("*"):
            table = line[1:]
        elif line.startswith("# Table `") and "incompatible" in line:
            unreadable.append(line.split("`", 1)[1].split("'", 1)[0])
    return Saved(tuple(chains), tuple(lines), tuple(unreadable))


def render_rule(rule: Rule, comment: str) -> str:
    """A rule as iptables-save prints it, without ``-A CHAIN``."""
    words = []
    for option, cidr in (("-s", rule.src), ("-d", rule.dst)):
        if cidr is not None:
            words.append(f"! {option} {cidr[1:]}" if cidr.startswith("!") else f"{option} {cidr}")
    if rule.mark is not None:
        words.append(f"-m mark --mark {rule.mark}")
    words.append(f'-m comment --comment "{comment}" -j {_TARGETS[rule.verdict]}')
    if rule.random_fully:
        words.append("--random-fully")
    return " ".join(words)


def parse_rule(spec: str, chain: Literal["postrouting", "forward"]) -> Rule | None:
    """The Rule that a printed line stands for; None when no Rule can say the same."""
    src = dst = mark = verdict = None
    random_fully = negate = False
    rest = iter(_words(spec))
    for word in rest:
        if word == "!" and not negate:
            negate = True
            continue
        if word in ("-s", "-d"):
            cidr = canonical_cidr(next(rest, ""))
            if cidr is None:
                return None
            cidr = f"!{cidr}" if negate else cidr
            src, dst = (cidr, dst) if word == "-s" else (src, cidr)
        elif negate:
            return None
        elif word == "-m" and next(rest, "") in ("mark", "comment"):
            pass
        elif word == "--mark":
            mark = next(rest, None)
        elif word == "--comment":
            next(rest, None)
        elif word == "-j":
            verdict = _VERDICTS.get(next(rest, ""))
        elif word == "--random-fully":
            random_fully = True
        else:
            return None
        negate = False
    if verdict is None:
        return None
    return Rule(chain, verdict, src, dst, mark, random_fully)  # type: ignore[arg-type]


def _words(spec: str) -> list[str]:
    try:
        return shlex.split(spec)
    except ValueError:
        return [spec]


def canonical_cidr(text: str) -> str | None:
    try:
        return str(ipaddress.ip_network(text))
    except ValueError:
        return None


def firewall_of(saved: Saved, family: Family, instance: str = "", tolerated: Collection[str] = ()) -> Firewall | None:
    """What stands in the kernel, None when there is no trace of us.

    ``tolerated`` are rules of FORWARD (as printed) that are allowed before our jump.
    """
    names = names_of(instance)
    rules: list[Rule] = []
    defects: list[str] = [
        f"iptables cannot read table {table}: it holds rules of nft's own" for table in saved.unreadable
    ]
    for place in places(names):
        for spec in saved.of(place.table, place.chain):
            rule = parse_rule(spec, place.kind)
            if rule is None:
                defects.append(f"unexpected rule in {place.chain}: {spec}")
            else:
                rules.append(rule)
        defects += _jump_defects(saved, place, tolerated)
    for table, chain in saved.chains:
        if (table, chain) not in {(p.table, p.chain) for p in places(names)}:
            defects.append(f"chain {chain} left in table {table}")
    defects += [f"stale rule in {line.chain}: {line.spec}" for line in _strays(saved, names)]
    if not rules and not defects:
        return None
    return Firewall(family, "iptables", tuple(rules), instance, tuple(defects))


def rules_before_jump(saved: Saved, instance: str = "") -> tuple[str, ...]:
    """Rules of FORWARD that stand before our jump and should not."""
    place = places(names_of(instance))[1]
    before: list[str] = []
    for spec in saved.of(place.table, place.base):
        if place.is_jump(spec):
            return tuple(before)
        if not _may_go_first(spec, ()):
            before.append(spec)
    return ()


def _jump_defects(saved: Saved, place: Place, tolerated: Collection[str]) -> list[str]:
    base = saved.of(place.table, place.base)
    jumps = [i for i, spec in enumerate(base) if place.is_jump(spec)]
    if (place.table, place.chain) not in saved.chains:
        return []  # a jump to a chain that is not there cannot exist
    defects = []
    if not saved.of(place.table, place.chain):
        defects.append(f"chain {place.chain} is empty")
    if not jumps:
        defects.append(f"no jump from {place.base}")
    elif len(jumps) > 1:
        defects.append(f"{len(jumps)} jumps from {place.base}")
    elif place.base == "FORWARD":
        wrong = [s for s in base[: jumps[0]] if not _may_go_first(s, tolerated)]
        if wrong:
            defects.append(f"the jump from FORWARD stands after: {wrong[0]}")
    return defects


def _may_go_first(spec: str, tolerated: Collection[str]) -> bool:
    words = spec.split()
    target = next((words[i + 1] for i, word in enumerate(words[:-1]) if word in ("-j", "-g")), "")
    return target.startswith(GOES_FIRST) or spec in tolerated


def _jumps(saved: Saved, names: Names) -> list[Line]:
    """The jumps to our chains from where they belong."""
    by_base = {(str(p.table), str(p.base)): p for p in places(names)}
    return [
        line
        for line in saved.lines
        if (p := by_base.get((line.table, line.chain))) is not None and p.is_jump(line.spec)
    ]


def _strays(saved: Saved, names: Names) -> list[Line]:
    """Rules outside our chains that are ours but are not the jump: those of older flannels, jumps from elsewhere."""
    jumps = _jumps(saved, names)
    strays = []
    for line in saved.lines:
        if line.chain in names.chains or line in jumps:
            continue
        words = _words(line.spec)
        if any(word in names.comments or word in names.chains for word in words):
            strays.append(line)
    return strays


def render_put(firewall: Firewall, saved: Saved, tolerated: Collection[str] = ()) -> str:
    """Input of ``iptables-restore --noflush`` that turns ``saved`` into ``firewall``: only what differs is written.

    A chain is refilled in the transaction that empties it. The text deletes rules that were seen, so it fails as a
    whole, changing nothing, if they are gone meanwhile; then look again.
    """
    names = names_of(firewall.instance)
    blocks: dict[str, list[str]] = {"nat": [], "filter": []}
    for line in _strays(saved, names):
        blocks.setdefault(line.table, []).append(f"-D {line.chain} {line.spec}")
    for place in places(names):
        wanted = [rule for rule in firewall.rules if rule.chain == place.kind]
        blocks[place.table] += _put_place(saved, place, wanted, tolerated)
    for table, chain in saved.chains:
        if (table, chain) not in {(p.table, p.chain) for p in places(names)}:
            blocks.setdefault(table, []).extend([f"-F {chain}", f"-X {chain}"])
    return _join(blocks)


def _put_place(saved: Saved, place: Place, wanted: list[Rule], tolerated: Collection[str]) -> list[str]:
    exists = (place.table, place.chain) in saved.chains
    base = saved.of(place.table, place.base)
    drop_jumps = [f"-D {place.base} {spec}" for spec in base if place.is_jump(spec)]
    if not wanted:
        return [*drop_jumps, f"-F {place.chain}", f"-X {place.chain}"] if exists else drop_jumps
    text = []
    if [parse_rule(spec, place.kind) for spec in saved.of(place.table, place.chain)] != wanted:
        text.append(f":{place.chain} - [0:0]")  # with --noflush this makes or empties just this chain
        text += [f"-A {place.chain} {render_rule(rule, place.comment)}" for rule in wanted]
    if not exists or any("jump" in defect for defect in _jump_defects(saved, place, tolerated)):
        text += drop_jumps
        text.append(_add_jump(saved, place, tolerated))
    return text


def _add_jump(saved: Saved, place: Place, tolerated: Collection[str]) -> str:
    if place.base == "POSTROUTING":
        return f"-A {place.base} {place.jump}"  # as flannel: after kube-proxy's and Docker's own rules
    ours = {place.comment, place.chain}  # those rules are deleted by the same text: they take no place any more
    others = [spec for spec in saved.of(place.table, place.base) if not ours & set(_words(spec))]
    first = next((i for i, spec in enumerate(others) if not _may_go_first(spec, tolerated)), len(others))
    return f"-I {place.base} {first + 1} {place.jump}"


def render_remove(saved: Saved, instance: str = "") -> str:
    """Input of ``iptables-restore --noflush`` that leaves no trace of us in nat and filter; "" if there is none."""
    names = names_of(instance)
    blocks: dict[str, list[str]] = {}
    ours = [*_strays(saved, names), *_jumps(saved, names)]
    for line in saved.lines:
        if line in ours:
            blocks.setdefault(line.table, []).append(f"-D {line.chain} {line.spec}")
    for table, chain in saved.chains:
        blocks.setdefault(table, []).append(f"-F {chain}")
    for table, chain in saved.chains:
        blocks[table].append(f"-X {chain}")
    return _join(blocks)


def _join(blocks: dict[str, Iterable[str]] | dict[str, list[str]]) -> str:
    text = []
    for table, lines in blocks.items():
        if lines:
            text += [f"*{table}", *lines, "COMMIT"]
    return "\n".join(text) + "\n" if text else ""
