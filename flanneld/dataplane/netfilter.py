"""The firewall handler: observes and applies Firewall records, in both modes, as one caller sees them.

Ownership: chains and tables by name (``netfilter_names``), plus rules elsewhere that carry our comment or jump to our
chains. Both modes are observed, so that the plan can put the wanted one and remove what the other left.

Cost: nothing here starts a process unless something of ours may have changed. nf_tables tells of every change over
netlink (also of iptables-nft's), iptables-legacy is asked for a fingerprint of its tables. Then one ``iptables-save``
or ``nft -j list table`` for each family concerned, and one ``iptables-restore`` or ``nft -f -`` to mend it.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Final, Literal

from backends.kernel_state import Change, Failure, Firewall, Link, Record, Scope
from flanneld.dataplane import netfilter_iptables, netfilter_legacy, netfilter_nft, netfilter_socket
from flanneld.dataplane.handler import Answer
from flanneld.dataplane.netfilter_foreign import ForeignChains
from flanneld.dataplane.netfilter_iptables import Saved
from flanneld.dataplane.netfilter_names import FAMILIES, Family, names_of
from flanneld.dataplane.netfilter_nft import NFT_FAMILY
from flanneld.dataplane.netfilter_socket import Chain, Monitor, Touched
from flanneld.dataplane.netfilter_tools import VARIANTS, Iptables, ToolFailed, ToolMissing, Tools, Variant, run

Part = tuple[Literal["iptables", "nftables"], Family]
PARTS: Final[tuple[Part, ...]] = (("iptables", 4), ("iptables", 6), ("nftables", 4), ("nftables", 6))

LEGACY_POLL: Final = 1.0
"""Seconds between two looks at iptables-legacy's fingerprint, at least."""
LEGACY_SHARE: Final = 50
"""A look that takes t seconds (tens of thousands of rules) is not repeated within LEGACY_SHARE × t."""
RIVAL_PUTS: Final = 5
RIVAL_SECONDS: Final = 600.0
"""A rule that comes back before our jump more often than RIVAL_PUTS in RIVAL_SECONDS is let stand: someone else
insists, and two would fight for ever."""


class Netfilter:
    """Implements ``flanneld.dataplane.handler.Handler`` for Firewall records. Made and used by one thread."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.blocking: tuple[str, ...] = ()
        """Sentences about what drops our traffic or fights with us, each with the remedy; any thread may read them."""
        self._clock = clock
        self._tools = Tools()
        self._instance = ""
        self._wanted: dict[Part, Firewall] = {}
        self._known: set[Part] = set()
        self._stale: set[Part] = set(PARTS)
        self._seen: dict[Part, Firewall] = {}
        self._answer = Answer()
        self._saved: dict[Family, list[tuple[Iptables, Saved]]] = {}
        self._recheck = False
        self._legacy: dict[Family, bytes] = {}
        self._legacy_due = 0.0
        self._rivals: dict[str, list[float]] = {}
        self._tolerated: set[str] = set()
        self._put: dict[Part, Firewall] = {}
        self._misread: Counter[tuple[Firewall, Firewall]] = Counter()
        self._foreign = ForeignChains(self._tools, clock)
        try:
            self._monitor: Monitor | None = Monitor()
        except OSError:
            self._monitor = None  # a kernel without nf_tables; iptables-legacy may still be there

    def handles(self, record: Record) -> bool:
        return isinstance(record, Firewall)

    def fileno(self) -> int | None:
        return self._monitor.fileno() if self._monitor else None

    def invalidate(self) -> None:
        """The next ``observe`` asks the kernel whether it missed a change; it looks at the rules only if so."""
        self._recheck = True

    def close(self) -> None:
        if self._monitor:
            self._monitor.close()

    # Observing

    def observe(self, scope: Scope, links: Mapping[str, Link]) -> Answer:  # noqa: ARG002
        self._follow(scope)
        self._hear()
        self._poll_legacy()
        if self._stale:
            self._look_at_stale()
        dropping = self._foreign.search(scope.networks, self._instance)
        self.blocking = (*dropping, *self._quarrels())
        return self._answer

    def _follow(self, scope: Scope) -> None:
        wanted: dict[Part, Firewall] = {(firewall.mode, firewall.family): firewall for firewall in scope.firewall}
        if scope.instance != self._instance:
            self._instance = scope.instance
            self._known.clear()
            self._stale.update(PARTS)
        self._stale |= wanted.keys() - self._wanted.keys()
        self._wanted = wanted

    def _hear(self) -> None:
        """Find out which parts may have changed, without a process."""
        if self._monitor is None:
            return
        touched = self._monitor.drain()
        if self._recheck and self._monitor.behind():
            touched = None
        self._recheck = False
        if touched is None:
            self._stale.update(PARTS)
            self._foreign.invalidate()
            return
        names = names_of(self._instance)
        for change in touched:
            family: Family | None = {"ip": 4, "ip6": 6}.get(change.family)  # type: ignore[assignment]
            self._foreign.touched(change)
            if family is None:
                continue
            if change.table == names.table(family):
                self._stale.add(("nftables", family))
            elif change.table in ("nat", "filter") and self._concerns_iptables(change, family):
                self._stale.add(("iptables", family))

    def _concerns_iptables(self, change: Touched, family: Family) -> bool:
        ours = names_of(self._instance).chains
        if ("iptables", family) in self._wanted or ("iptables", family) in self._seen:
            return change.chain is None or change.chain in (*ours, "POSTROUTING", "FORWARD")
        return change.chain in ours

    def _poll_legacy(self) -> None:
        now = self._clock()
        if now < self._legacy_due:
            return
        for family in FAMILIES:
            if self._legacy_changed(family):
                self._stale.add(("iptables", family))
        self._legacy_due = now + max(LEGACY_POLL, LEGACY_SHARE * (self._clock() - now))

    def _legacy_changed(self, family: Family) -> bool:
        digest = netfilter_legacy.digest(family)
        if digest == self._legacy.get(family, b""):
            return False
        self._legacy[family] = digest
        self._foreign.legacy_changed(family)
        return True

    def _look_at_stale(self) -> None:
        tables, chains = set(netfilter_socket.list_tables()), netfilter_socket.list_chains()
        for part in sorted(self._stale):
            mode, family = part
            try:
                found = self._look_nft(family, tables) if mode == "nftables" else self._look_iptables(family, chains)
            except ToolFailed as failed:
                # Not wanted and broken: nothing to complain of. Wanted: the attempt to write it tells.
                wanted = part in self._wanted
                found = Firewall(family, mode, (), self._instance, (f"cannot be read: {failed}",)) if wanted else None
            self._seen.pop(part, None)
            if found is not None:
                self._seen[part] = self._trusted(part, found)
            self._known.add(part)
            self._stale.discard(part)
        self._answer = self._answer.with_only({firewall.key: firewall for firewall in self._seen.values()})

    def _trusted(self, part: Part, found: Firewall) -> Firewall:
        """What was found; what was written, if the kernel keeps showing that in a way that is not understood.

        A later iptables or nft may print rules in another way: better blind to a difference than writing for ever.
        """
        put = self._put.pop(part, None)
        if put == found:
            self._misread = Counter({pair: n for pair, n in self._misread.items() if pair[0] != put})
        elif put is not None:
            self._misread[put, found] += 1
        return next((p for (p, f), n in self._misread.items() if f == found and n > RIVAL_PUTS), found)

    def _look_nft(self, family: Family, tables: set[tuple[str, str]]) -> Firewall | None:
        name, nft_family = names_of(self._instance).table(family), NFT_FAMILY[family]
        if (nft_family, name) not in tables:
            return None
        try:
            listing = json.loads(run([self._tools.nft(), "-j", "list", "table", nft_family, name]))
        except ToolMissing as missing:
            wanted = ("nftables", family) in self._wanted
            return Firewall(family, "nftables", (), self._instance, (str(missing),)) if wanted else None
        except ToolFailed:
            if (nft_family, name) not in netfilter_socket.list_tables():
                return None  # deleted between the two questions
            raise
        return netfilter_nft.parse_table(listing, family, self._instance)

    def _look_iptables(self, family: Family, chains: list[Chain]) -> Firewall | None:
        self._saved.pop(family, None)
        self._legacy_changed(family)  # before reading, so that a change meanwhile is seen at the next poll
        wanted = ("iptables", family) in self._wanted
        traces = {variant for variant in VARIANTS if self._has_traces(variant, family, chains)}
        if not wanted and not traces:
            return None
        try:
            main = self._tools.iptables(family)
        except ToolMissing:
            return None
        names = names_of(self._instance)
        saved = Saved()
        if wanted or main.variant in traces:
            saved = netfilter_iptables.parse_save(self._save(main), names)
        self._saved[family] = [(main, saved)]
        firewall = netfilter_iptables.firewall_of(saved, family, self._instance, self._tolerated)
        if firewall and not main.random_fully and self._wants_random_fully(family):
            firewall = _with_random_fully(firewall, True)  # it has all of it that this iptables knows
        other = self._tools.other_iptables(main) if traces - {main.variant} else None
        if other:
            left = netfilter_iptables.parse_save(self._save(other), names)
            if netfilter_iptables.firewall_of(left, family, self._instance):
                self._saved[family].append((other, left))
                firewall = firewall or Firewall(family, "iptables", (), self._instance)
                firewall = replace(firewall, defects=(*firewall.defects, f"rules left in {other.prefix}"))
        return firewall

    def _save(self, tool: Iptables) -> str:
        text = tool.save()
        if tool.variant == "legacy":
            self._foreign.keep_legacy(tool, text)
        return text

    def _wants_random_fully(self, family: Family) -> bool:
        wanted = self._wanted.get(("iptables", family))
        return wanted is not None and any(rule.random_fully for rule in wanted.rules)

    def _has_traces(self, variant: Variant, family: Family, chains: list[Chain]) -> bool:
        """Whether iptables-save of that variant may show something of ours.

        At the first look also rules outside chains of ours are of interest: flannel made such before it had chains.
        """
        ours = names_of(self._instance).chains
        first = ("iptables", family) not in self._known
        if variant == "legacy":
            return bool(netfilter_legacy.tables_in_use(family)) if first else netfilter_legacy.holds_chain(family, ours)
        names = (*ours, "POSTROUTING", "FORWARD") if first else ours
        mine = (c for c in chains if c.family == NFT_FAMILY[family] and c.table in ("nat", "filter"))
        return any(chain.name in names for chain in mine)

    # Applying

    def apply(self, changes: Sequence[Change]) -> list[Failure]:
        failures: list[Failure] = []
        nft = [c for c in changes if isinstance(c.record, Firewall) and c.record.mode == "nftables"]
        if nft:
            failures += self._apply_nft(nft)
        for change in changes:
            if isinstance(change.record, Firewall) and change.record.mode == "iptables":
                failures += self._attempt(change, partial(self._apply_iptables, change))
        return failures

    def _apply_nft(self, changes: list[Change]) -> list[Failure]:
        """Both families by one process; one by one if that fails, to know whose fault it is."""
        if len(changes) > 1:
            with contextlib.suppress(ToolMissing, ToolFailed):
                self._run_nft("".join(_nft_text(change) for change in changes))
                for change in changes:
                    self._note(change)
                return []
        return [f for c in changes for f in self._attempt(c, partial(self._run_nft, _nft_text(c)))]

    def _attempt(self, change: Change, action: Callable[[], None]) -> list[Failure]:
        try:
            action()
        except ToolMissing as missing:
            return [Failure(change, "missing", str(missing))] if change.op == "put" else []
        except ToolFailed as failed:
            self._note(change, failed=True)
            return [Failure(change, failed.cause, str(failed))]
        self._note(change)
        return []

    def _note(self, change: Change, *, failed: bool = False) -> None:
        """Look at what came of it in the next ``observe``."""
        assert isinstance(change.record, Firewall)
        part = (change.record.mode, change.record.family)
        self._stale.add(part)
        self._put.pop(part, None)
        if change.op == "put" and not failed:
            self._put[part] = change.record

    def _run_nft(self, text: str) -> None:
        run([self._tools.nft(), "-f", "-"], text)

    def _apply_iptables(self, change: Change) -> None:
        firewall = change.record
        assert isinstance(firewall, Firewall)
        family, instance = firewall.family, firewall.instance
        if family not in self._saved:
            main = self._tools.iptables(family)
            self._saved[family] = [(main, netfilter_iptables.parse_save(self._save(main), names_of(instance)))]
        for index, (tool, saved) in enumerate(self._saved.pop(family)):
            if change.op == "put" and index == 0:
                self._count_rivals(saved, instance)
                able = firewall if tool.random_fully else _with_random_fully(firewall, False)
                text = netfilter_iptables.render_put(able, saved, self._tolerated)
            else:
                text = netfilter_iptables.render_remove(saved, instance)
            if text:
                tool.restore(text)

    def _count_rivals(self, saved: Saved, instance: str) -> None:
        now = self._clock()
        for rule in netfilter_iptables.rules_before_jump(saved, instance):
            recent = [then for then in self._rivals.get(rule, ()) if now - then < RIVAL_SECONDS]
            self._rivals[rule] = [*recent, now]
            if len(recent) >= RIVAL_PUTS:
                self._tolerated.add(rule)

    # What works against us

    def _quarrels(self) -> list[str]:
        rivals = [
            f"this rule of FORWARD keeps being put before ours and may drop our traffic: {rule}; stop what puts it there"
            for rule in sorted(self._tolerated)
        ]
        misread = [
            f"{put.mode} shows other rules than were written ({', '.join(found.defects) or 'or in another order'}): "
            "changes to them may go unnoticed; report this with the version of iptables or nft"
            for (put, found), count in self._misread.items()
            if count > RIVAL_PUTS
        ]
        return rivals + misread


def _with_random_fully(firewall: Firewall, on: bool) -> Firewall:
    rules = (replace(rule, random_fully=on) if rule.verdict == "masquerade" else rule for rule in firewall.rules)
    return replace(firewall, rules=tuple(rules))


def _nft_text(change: Change) -> str:
    assert isinstance(change.record, Firewall)
    if change.op == "put":
        return netfilter_nft.render_put(change.record)
    return netfilter_nft.render_remove(change.record.family, change.record.instance)
