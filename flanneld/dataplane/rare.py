"""The messages that are sent now and then, for links and addresses, encoded by pyroute2's tables.

pyroute2 is imported when the first of them is sent. A daemon that finds everything in its place needs none, and what
is sent by the thousand (routes, neighbours, forwarding entries) is packed in ``wire``: encoding through pyroute2 takes
0.45 ms a message, ten times what the kernel needs for it.
"""

from __future__ import annotations

import threading
from socket import AF_INET, AF_INET6
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
