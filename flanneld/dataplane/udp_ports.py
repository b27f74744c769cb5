"""UDP ports of this thread's network namespace: is one free, is one in use."""

from __future__ import annotations

import errno
import socket
import time
from pathlib import Path


def check_free(port: int) -> None:
    """Raise OSError if somebody else has the UDP port: wireguard-go would come up and never say that it hears nothing."""
    for family in (socket.AF_INET, socket.AF_INET6):
        try:
            with socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as probe:
                if family == socket.AF_INET6:
                    probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                probe.bind(("", port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise OSError(
                    errno.EADDRINUSE,
                    f"UDP port {port} is taken by another program of this host (ss -ulpn shows which); "
                    "end it, or set ListenPort of the backend to a free port on all nodes",
                ) from error
            if error.errno not in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):
                raise


def listens(port: int) -> bool:
    """Whether any UDP socket of this network namespace is bound to the port; waits a moment for one that is just made."""
    suffix = f":{port:04X}"
    for _ in range(20):
        for table in ("udp", "udp6"):
            try:
                with Path(f"/proc/thread-self/net/{table}").open(encoding="ascii") as lines:
                    if any(words[1].endswith(suffix) for line in lines if len(words := line.split(None, 2)) > 1):
                        return True
            except FileNotFoundError:
                continue
        time.sleep(0.02)
    return False
