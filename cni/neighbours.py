"""Which addresses answer ARP on a bridge, asked through the kernel: a datagram makes it resolve the address."""

from __future__ import annotations

import _socket
import time

WAIT_SECONDS = 0.5  # a container on the same host answers within a millisecond
_DISCARD_PORT = 9
_COMPLETE = 0x2


def answering(addresses: list[str], device: str) -> set[str] | None:
    """The IPv4 addresses among ``addresses`` that answer on ``device``; None where there is no such device."""
    probe = _socket.socket(_socket.AF_INET, _socket.SOCK_DGRAM | _socket.SOCK_CLOEXEC, 0)
    try:
        probe.setsockopt(_socket.SOL_SOCKET, _socket.SO_BINDTODEVICE, device.encode() + b"\0")
        probe.setblocking(False)
        for address in addresses:
            if ":" in address:
                continue
            try:
                probe.sendto(b"", (address, _DISCARD_PORT))
            except OSError:
                pass  # no way there, or the queue is full: the neighbour table tells
    except OSError:
        return None
    finally:
        probe.close()
    time.sleep(WAIT_SECONDS)
    return _complete(device) & set(addresses)


def _complete(device: str) -> set[str]:
    """The kernel's resolved neighbours on the device (/proc/net/arp shows this process's network namespace)."""
    with open("/proc/net/arp", "rb") as file:
        rows = [line.split() for line in file.read().decode("ascii", "replace").splitlines()[1:]]
    return {row[0] for row in rows if len(row) >= 6 and row[5] == device and int(row[2], 16) & _COMPLETE}
