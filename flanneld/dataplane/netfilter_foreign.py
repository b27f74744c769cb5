"""Looks for foreign chains that drop our traffic, and only when something on the forward hook has changed.

``netfilter_blocking`` judges; here is when to look, and at what: the nf_tables tables that have a base chain on the
forward hook, each listed again only after it was touched, and iptables-legacy's filter table, which drops beside them.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping
from typing import Any, Final

from flanneld.dataplane import netfilter_legacy, netfilter_socket
from flanneld.dataplane.netfilter_blocking import blocking_chains, ruleset_of_save
from flanneld.dataplane.netfilter_names import FAMILIES, Family, names_of
from flanneld.dataplane.netfilter_socket import Touched
from flanneld.dataplane.netfilter_tools import Iptables, ToolFailed, ToolMissing, Tools, run, which

INTERVAL: Final = 10.0
"""Seconds between two searches, at least."""
SHARE: Final = 50
"""A search that takes t seconds is not repeated within SHARE × t: at most 2 % of a core with any ruleset."""

Ruleset = list[Mapping[str, Any]]


class ForeignChains:
    """What drops packets of our networks, as sentences; see ``blocking_chains``."""

    def __init__(self, tools: Tools, clock: Callable[[], float]) -> None:
        self._tools = tools
        self._clock = clock
        self._tables: dict[tuple[str, str], Ruleset] = {}
        self._legacy: dict[Family, Ruleset] = {}
        self._stale = True
        self._due = 0.0
        self._asked: tuple[object, ...] = ()
        self._found: tuple[str, ...] = ()

    def invalidate(self) -> None:
        """Anything may have changed."""
        self._tables.clear()
        self._legacy.clear()
        self._stale = True

    def touched(self, change: Touched) -> None:
        """A table of nf_tables was changed."""
        listed = self._tables.pop((change.family, change.table), None)
        self._stale |= change.forward_hook or listed is not None

    def legacy_changed(self, family: Family) -> None:
        self._legacy.pop(family, None)
        self._stale = True

    def keep_legacy(self, tool: Iptables, text: str) -> None:
        """Someone has just read iptables-legacy: spare us the process."""
        self._legacy[tool.family] = ruleset_of_save(text, tool.family, tool.prefix)

    def search(self, networks: tuple[str, ...], instance: str) -> tuple[str, ...]:
        """The sentences; from memory unless something has changed and a search is due."""
        now = self._clock()
        if (networks, instance) != self._asked:
            self._asked, self._stale = (networks, instance), True
        if not self._stale or now < self._due or not networks:
            return self._found
        names = names_of(instance)
        ours = {("ip", names.table(4)), ("ip6", names.table(6))}
        hooked = {(c.family, c.table) for c in netfilter_socket.list_chains() if c.hook == "forward"} - ours
        self._tables = {
            (family, table): self._tables.get((family, table)) or _list_table(family, table)
            for family, table in sorted(hooked)
            if family in ("ip", "ip6", "inet")
        }
        rulesets = [[item for items in self._tables.values() for item in items]]
        rulesets += [self._legacy_ruleset(family) for family in FAMILIES]
        self._found = tuple(sentence for ruleset in rulesets for sentence in blocking_chains(ruleset, networks))
        self._stale = False
        self._due = now + max(INTERVAL, SHARE * (self._clock() - now))
        return self._found

    def _legacy_ruleset(self, family: Family) -> Ruleset:
        if "filter" not in netfilter_legacy.tables_in_use(family):
            return []
        if family not in self._legacy:
            with contextlib.suppress(ToolMissing, ToolFailed):
                main = self._tools.iptables(family)
                legacy = main if main.variant == "legacy" else self._tools.other_iptables(main)
                if legacy:
                    self.keep_legacy(legacy, legacy.save())
        return self._legacy.get(family, [])


def _list_table(family: str, table: str) -> Ruleset:
    """One table at a time: nft 1.0 shows only the last of several that one call asks for."""
    if which("nft") is None:
        return []
    try:
        items: Ruleset = json.loads(run(["nft", "-j", "list", "table", family, table]))["nftables"]
    except (ToolFailed, ToolMissing):
        return []  # gone meanwhile, or not for nft to read
    return items
