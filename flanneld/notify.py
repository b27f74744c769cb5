"""sd_notify(3): tell systemd that we are ready, what we do, and that we live."""

from __future__ import annotations

import os
import socket


def notify(*assignments: str) -> None:
    """Send ``READY=1``, ``STATUS=…``, ``WATCHDOG=1``; nothing happens when systemd does not listen."""
    path = os.environ.get("NOTIFY_SOCKET", "")
    if not path:
        return
    if path.startswith("@"):
        path = "\0" + path[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as out:
        try:
            out.connect(path)
            out.sendall("\n".join(assignments).encode())
        except OSError:
            # Whoever started us is gone or deaf; the network does not depend on it.
            return


def watchdog_interval() -> float | None:
    """Seconds between signs of life, half of what systemd allows; None when it does not watch us."""
    if os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    text = os.environ.get("WATCHDOG_USEC", "")
    return int(text) / 2e6 if text.isdecimal() and int(text) else None
