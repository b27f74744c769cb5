"""Whether the system can turn a host's name into an address: gRPC waits for a name server that is silent, and does not
say so."""

from __future__ import annotations

import ipaddress
import socket
import threading

PATIENCE = 2.0
"""Seconds that name servers get, after somebody else has waited for them already."""


def unresolved(host: str) -> str:
    """Why this name has no address, in the system's words; "" if it has one, or is one."""
    try:
        ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        pass
    else:
        return ""
    reasons: list[str] = []

    def look() -> None:
        try:
            socket.getaddrinfo(host, None)
            reasons.append("")
        except (OSError, UnicodeError) as error:
            reasons.append((error.strerror if isinstance(error, OSError) else "") or str(error))

    # The system asks for up to half a minute, and nothing ends that sooner.
    thread = threading.Thread(target=look, name="resolver", daemon=True)
    thread.start()
    thread.join(PATIENCE)
    return reasons[0] if reasons else "no name server answers"
