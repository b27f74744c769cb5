"""Policy routing for tunnels that cannot be told the interface and the source address of their packets (WireGuard).

    2410: from all iif lo ipproto udp sport 51820 lookup 2410 suppress_prefixlength 0 proto 241
    2411: from all iif lo ipproto udp sport 51820 lookup main suppress_prefixlength 0 proto 241
    2412: from all iif lo ipproto udp sport 51820 lookup 2410 proto 241
    table 2410: default via 172.31.0.1 dev eth1 proto 241 src 172.31.0.11 onlink
                172.31.0.0/24 dev eth1 proto 241 scope link src 172.31.0.11

In words: the chosen interface's own networks, then whatever the operator routes more closely than by default, then the
way out. ``iif lo`` means what this host itself sends (include/net/fib_rules.h, LOOPBACK_IFINDEX); what containers send
from a port of that number is not the tunnel's.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from socket import AF_INET, AF_INET6
from struct import Struct
from typing import Final, Literal, NamedTuple

from backends.kernel_state import (
    ROUTE_PROTOCOL,
    UPLINKS,
    Change,
    Failure,
    Key,
    Link,
    Record,
    Route,
    Scope,
    Uplink,
)
from flanneld.dataplane import rare
from flanneld.dataplane.handler import Answer
from flanneld.dataplane.netlink import Monitor, Netlink, NetlinkError, messages, routes_only_of_high_tables
from flanneld.dataplane.wire import (
    MAIN_TABLE,
    NLM_F_CREATE,
    NLM_F_EXCL,
    NLM_F_REPLACE,
    RTA_TABLE,
    RTM_DELROUTE,
    RTM_DELRULE,
    RTM_GETROUTE,
    RTM_GETRULE,
    RTM_NEWLINK,
    RTM_NEWROUTE,
    RTM_NEWRULE,
    RTMSG,
    U32,
    as_main,
    attribute,
    attributes,
    decode_route,
    route_body,
)
from flanneld.dataplane.write import describe, remedy

GROUPS: Final = (1, 5, 7, 8, 9, 11, 19)
"""RTNLGRP_LINK, IPV4_IFADDR, IPV4_ROUTE, IPV4_RULE, IPV6_IFADDR, IPV6_ROUTE, IPV6_RULE: a route goes without a word of its
own when its interface goes down or its source address is removed."""

_FAMILIES: Final[Mapping[Literal[4, 6], int]] = {4: AF_INET, 6: AF_INET6}
_RULE_SIZE: Final = 12  # struct fib_rule_hdr (include/uapi/linux/fib_rules.h)
FRA_IIFNAME, FRA_PRIORITY, FRA_SUPPRESS_PREFIXLEN, FRA_TABLE = 3, 6, 14, 15
FRA_PROTOCOL, FRA_IP_PROTO, FRA_SPORT_RANGE = 21, 22, 23
_SPORTS: Final = Struct("=HH")
_NARROWER: Final = frozenset({1, 2, 4, 10, 12, 13, 16, 17, 20, 24, 25})
"""FRA_DST, SRC, GOTO, FWMARK, TUN_ID, SUPPRESS_IFGROUP, FWMASK, OIFNAME, UID_RANGE, DPORT_RANGE, DSCP. Other attributes
are told of every rule, and newer kernels tell more of them."""


class _Rule(NamedTuple):
    """What tells one of our rules from another. ``suppress``: only routes longer than that count, -1 for all.

    ``port`` is 0 where a rule is not as we make them.
    """

    priority: int
    table: int
    suppress: int
    port: int


def _wanted_rules(number: int, port: int) -> list[_Rule]:
    """A tunnel's rules. They stand behind the local table (0), before the main one (32766) and whatever else routes."""
    return [
        _Rule(number, number, 0, port),
        _Rule(number + 1, MAIN_TABLE, 0, port),
        _Rule(number + 2, number, -1, port),
    ]


class UplinkHandler:
    """Observes and makes ``Uplink`` records. Listens to the kernel only while there is one."""

    def __init__(self, changed: Callable[[], None] = lambda: None) -> None:
        """``changed`` is called after each change: who remembers a way out must look for it again."""
        self._netlink = Netlink()
        self._changed = changed
        self._monitor: Monitor | None = None
        self._stale = True
        self._seen = Answer()

    def handles(self, record: Record) -> bool:
        return isinstance(record, Uplink)

    def observe(self, scope: Scope, links: Mapping[str, Link]) -> Answer:  # noqa: ARG002 - the protocol's
        self._drain()
        if self._stale:
            seen = self._look()
            if seen and self._monitor is None:
                self._listen()
                seen = self._look()
            self._seen = self._seen.with_only(seen)
            self._stale = False
        return self._seen

    def apply(self, changes: Sequence[Change]) -> list[Failure]:
        failures = []
        self._stale = True
        for change in changes:
            record = change.record
            assert isinstance(record, Uplink)
            try:
                if change.op == "put":
                    self._listen()
                    self._put(record)
                else:
                    self._remove(record.family, UPLINKS[record.tunnel])
            except NetlinkError as error:
                failures.append(Failure(change, error.name, f"{describe(change)}: {error}{_remedy(error)}"))
        self._changed()
        return failures

    def fileno(self) -> int | None:
        return None if self._monitor is None else self._monitor.fileno()

    def invalidate(self) -> None:
        self._stale = True

    def close(self) -> None:
        if self._monitor is not None:
            self._monitor.close()
        self._netlink.close()

    # --- looking ---------------------------------------------------------------------------------------------------

    def _listen(self) -> None:
        if self._monitor is None:
            self._monitor = Monitor(routes_only_of_high_tables(), GROUPS)

    def _drain(self) -> None:
        if self._monitor is None:
            return
        try:
            for _ in self._monitor.receive():
                self._stale = True
        except OSError:  # messages were lost
            self._stale = True

    def _look(self) -> dict[Key, Record]:
        seen: dict[Key, Record] = {}
        for family in _FAMILIES:
            for tunnel, number in UPLINKS.items():
                rules = sorted(rule for rule, _ in self._rules(family, number))
                routes = [route for route, _ in self._routes(family, number) if route is not None]
                if not rules and not routes:
                    continue
                port = rules[0].port if rules else 0
                whole = port != 0 and rules == _wanted_rules(number, port)
                routes.sort(key=lambda route: route.dst)
                record = Uplink(tunnel, family, port, tuple(routes), () if whole else ("rules",))
                seen[record.key] = record
        return seen

    def _rules(self, family: Literal[4, 6], number: int) -> list[tuple[_Rule, bytes]]:
        """A tunnel's rules, by protocol and priority, each with the kernel's own bytes, by which it is removed."""
        found = []
        for body in self._dump(RTM_GETRULE, bytes([_FAMILIES[family]]) + bytes(_RULE_SIZE - 1)):
            said = {kind: body[start:end] for kind, start, end in attributes(body, _RULE_SIZE, len(body))}
            ours = body[0] == _FAMILIES[family] and said.get(FRA_PROTOCOL) == bytes([ROUTE_PROTOCOL])
            if ours and number <= _number(said.get(FRA_PRIORITY)) < number + 3:
                found.append((_rule(body, said), body))
        return found

    def _routes(self, family: Literal[4, 6], number: int) -> list[tuple[Route | None, bytes]]:
        """The routes of a table, None for what no Route can say. The kernel says ENOENT where there is no such table."""
        names: dict[int, str] = {}
        found = []
        table = U32.pack(number)
        ask = RTMSG.pack(_FAMILIES[family], 0, 0, 0, 0, 0, 0, 0, 0) + attribute(RTA_TABLE, table)
        for body in self._dump(RTM_GETROUTE, ask):
            tables = (
                body[start:end] for kind, start, end in attributes(body, RTMSG.size, len(body)) if kind == RTA_TABLE
            )
            # Asked for IPv6 where that is off altogether, the kernel tells of IPv4.
            if body[0] == _FAMILIES[family] and next(tables, b"") == table:
                names = names or dict(socket.if_nameindex())
                main = as_main(body)
                found.append((decode_route(main, 0, len(main), None, names), body))
        return found

    def _dump(self, kind: int, ask: bytes) -> Iterator[bytes]:
        try:
            buffers = self._netlink.dump(kind, ask)
        except NetlinkError as error:
            if error.errno in (errno.ENOENT, errno.EAFNOSUPPORT, errno.EOPNOTSUPP):
                return
            raise
        for data in buffers:
            for answer, _, start, end in messages(data):
                if answer >= RTM_NEWLINK:
                    yield data[start:end]

    # --- changing --------------------------------------------------------------------------------------------------

    def _put(self, want: Uplink) -> None:
        """Rules before routes: a kernel without policy routing refuses them, and would take our table for the main one.

        (A rule whose table is empty is as if it were not there.) What is too much goes last.
        """
        number, family = UPLINKS[want.tunnel], want.family
        wanted, standing = _wanted_rules(number, want.port), self._rules(family, number)
        there = {rule for rule, _ in standing}
        for rule in wanted:
            if rule not in there:
                body = rare.rule_body(
                    _FAMILIES[family], rule.priority, rule.table, rule.suppress, ROUTE_PROTOCOL, rule.port
                )
                self._netlink.request(RTM_NEWRULE, NLM_F_CREATE | NLM_F_EXCL, body)
        for route in want.routes:
            body = route_body(route, _index(route.dev or ""), table=number)
            self._netlink.request(RTM_NEWROUTE, NLM_F_CREATE | NLM_F_REPLACE, body)
        self._delete(RTM_DELRULE, [body for rule, body in standing if rule not in wanted])
        self._delete(RTM_DELROUTE, [body for route, body in self._routes(family, number) if route not in want.routes])

    def _remove(self, family: Literal[4, 6], number: int) -> None:
        self._delete(RTM_DELRULE, [body for _, body in self._rules(family, number)])
        self._delete(RTM_DELROUTE, [body for _, body in self._routes(family, number)])

    def _delete(self, kind: int, bodies: Sequence[bytes]) -> None:
        for body in bodies:
            try:
                self._netlink.request(kind, 0, body)
            except NetlinkError as error:
                if error.errno not in (errno.ENOENT, errno.ESRCH, errno.ENODEV):
                    raise


def _index(name: str) -> int:
    try:
        return socket.if_nametoindex(name)
    except OSError:
        raise NetlinkError(errno.ENODEV, f"there is no interface {name}") from None


def _rule(body: bytes, said: Mapping[int, bytes]) -> _Rule:
    first, last = _SPORTS.unpack(said.get(FRA_SPORT_RANGE, bytes(4)))
    expected = {FRA_IIFNAME: b"lo\0", FRA_IP_PROTO: bytes([socket.IPPROTO_UDP])}
    plain = body[1:4] == bytes(3) and not _NARROWER & said.keys() and expected.items() <= said.items()
    suppress = _number(said.get(FRA_SUPPRESS_PREFIXLEN))
    return _Rule(
        _number(said.get(FRA_PRIORITY)),
        _number(said.get(FRA_TABLE)),
        -1 if suppress == 0xFFFFFFFF else suppress,
        int(first) if plain and first == last else 0,
    )


def _number(raw: bytes | None) -> int:
    return int(U32.unpack(raw)[0]) if raw else 0


def _remedy(error: NetlinkError) -> str:
    if error.errno in (errno.EOPNOTSUPP, errno.EAFNOSUPPORT):
        return ". This kernel has no policy routing (CONFIG_IP_MULTIPLE_TABLES): give the interface the first default route"
    return remedy(error)
