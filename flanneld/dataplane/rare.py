"""The messages that are sent now and then, for links, addresses and policy rules, encoded by pyroute2's tables.

pyroute2 is imported when the first of them is sent. A daemon that finds everything in its place needs none, and what
is sent by the thousand (routes, neighbours, forwarding entries) is packed in ``wire``: encoding through pyroute2 takes
0.45 ms a message, ten times what the kernel needs for it.
"""

from __future__ import annotations

import threading
from socket import AF_INET, AF_INET6, IPPROTO_UDP
from typing import Any, Final

Attrs = list[tuple[str, Any]]

HEADER: Final = 16
"""Bytes of struct nlmsghdr, which ``Netlink`` writes itself."""

IFF_UP: Final = 0x1
IFA_F_NODAD: Final = 0x02


_loading = threading.Lock()
"""pyroute2's modules import one another in a circle: two threads that load them at once get a _DeadlockError."""


def prepare() -> None:
    """Import pyroute2 now (0.2 s), so that the first message does not wait for it. From any thread."""
    with _loading:
        import pyroute2.netlink.rtnl.ifaddrmsg
        import pyroute2.netlink.rtnl.ifinfmsg  # noqa: F401


def link_body(attrs: Attrs, index: int = 0, *, up: bool | None = None) -> bytes:
    """struct ifinfomsg and its attributes. ``index`` 0 makes a link; ``up`` None leaves that flag alone."""
    prepare()
    from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg

    message = ifinfmsg()
    message["index"] = index
    if up is not None:
        message["flags"] = IFF_UP if up else 0
        message["change"] = IFF_UP
    message["attrs"] = attrs
    message.encode()
    return bytes(message.data[HEADER:])


def address_body(address: str, index: int) -> bytes:
    """struct ifaddrmsg for an address in CIDR form."""
    prepare()
    from pyroute2.netlink.rtnl.ifaddrmsg import ifaddrmsg

    text, _, length = address.partition("/")
    v6 = ":" in text
    message = ifaddrmsg()
    message["family"] = AF_INET6 if v6 else AF_INET
    message["prefixlen"] = int(length)
    # Duplicate address detection on a tunnel finds nobody, and would keep the address from being used for a second.
    message["flags"] = IFA_F_NODAD if v6 else 0
    message["index"] = index
    message["attrs"] = [("IFA_LOCAL", text), ("IFA_ADDRESS", text)]
    message.encode()
    return bytes(message.data[HEADER:])


def rule_body(family: int, priority: int, table: int, suppress: int, protocol: int, port: int) -> bytes:
    """struct fib_rule_hdr for: what this host itself sends from UDP ``port`` takes ``table``.

    ``family``: AF_INET or AF_INET6. ``suppress``: only by routes longer than that, -1 for by all.
    """
    with _loading:
        from pyroute2.netlink.rtnl.fibmsg import FR_ACT_TO_TBL, fibmsg

    message = fibmsg()
    message["family"] = family
    message["action"] = FR_ACT_TO_TBL
    message["attrs"] = [
        ("FRA_PRIORITY", priority),
        ("FRA_IIFNAME", "lo"),
        ("FRA_TABLE", table),
        ("FRA_PROTOCOL", protocol),
        ("FRA_IP_PROTO", IPPROTO_UDP),
        ("FRA_SPORT_RANGE", f"{port}:{port}"),
        ("FRA_SUPPRESS_PREFIXLEN", suppress & 0xFFFFFFFF),
    ]
    message.encode()
    return bytes(message.data[HEADER:])
