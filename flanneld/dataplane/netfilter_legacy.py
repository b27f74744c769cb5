"""iptables-legacy without a process: has a table changed, and is one of our chains in it?

The old x_tables interface tells nobody of changes, but it hands out a whole table in one getsockopt. Everything in it
except the packet counters stays the same as long as nobody replaces the table (linux/netfilter_ipv4/ip_tables.h).
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import socket
import struct
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from flanneld.dataplane.netfilter_names import Family


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where things are in one family's ``struct ipt_entry``, in bytes; ``names`` lists the tables in use."""

    domain: int
    level: int
    get_info: int
    get_entries: int
    next_offset: int
    counters: int
    names: str


# The kernel aligns 64-bit counters to 8 bytes on every machine that Debian has but i386.
_LAYOUTS: Final[dict[Family, _Layout]] = {
    4: _Layout(socket.AF_INET, socket.IPPROTO_IP, 64, 65, 90, 96, "ip_tables_names"),
    6: _Layout(socket.AF_INET6, socket.IPPROTO_IPV6, 64, 65, 142, 152, "ip6_tables_names"),
}
_INFO_SIZE: Final = 84
_ENTRIES_HEADER: Final = 40


def digest(family: Family) -> bytes:
    """A fingerprint of the nat and filter tables of this thread's namespace without their counters; b"" for none.

    Raises OSError when the kernel refuses (no CAP_NET_ADMIN).
    """
    sums = hashlib.blake2b(digest_size=16)
    present = tables_in_use(family)
    for table in present:
        layout, blob = _LAYOUTS[family], bytearray(_entries(family, table))
        offset = 0
        while offset + layout.counters + 16 <= len(blob):
            blob[offset + layout.counters : offset + layout.counters + 16] = bytes(16)
            step = struct.unpack_from("=H", blob, offset + layout.next_offset)[0]
            if not step:
                break
            offset += step
        sums.update(table.encode())
        sums.update(blob)
    return sums.digest() if present else b""


def holds_chain(family: Family, chains: Collection[str]) -> bool:
    """Whether one of the chains exists in nat or filter: user chains begin with an entry that holds their name."""
    names = [chain.encode() + b"\0" for chain in chains]
    return any(name in blob for t in tables_in_use(family) if (blob := _entries(family, t)) for name in names)


def tables_in_use(family: Family) -> list[Literal["filter", "nat"]]:
    """Which of our tables exist. Asking the kernel for one that does not would make it."""
    try:
        names = Path("/proc/thread-self/net", _LAYOUTS[family].names).read_text(encoding="ascii").split()
    except FileNotFoundError:
        return []  # the kernel has no iptables-legacy, or has not loaded it
    both: tuple[Literal["filter"], Literal["nat"]] = ("filter", "nat")
    return [table for table in both if table in names]


def _entries(family: Family, table: str) -> bytes:
    layout = _LAYOUTS[family]
    with socket.socket(layout.domain, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.IPPROTO_RAW) as sock:
        for _ in range(10):  # the table may be replaced between the two questions
            info = _getsockopt(sock, layout.level, layout.get_info, table.encode().ljust(_INFO_SIZE, b"\0"))
            size = struct.unpack_from("=I", info, 80)[0]
            query = struct.pack("=32sI", table.encode(), size).ljust(_ENTRIES_HEADER + size, b"\0")
            try:
                return _getsockopt(sock, layout.level, layout.get_entries, query)[_ENTRIES_HEADER:]
            except BlockingIOError:
                continue
    raise OSError(f"iptables-legacy's table {table} changes too fast to be read; trying again later")


def _getsockopt(sock: socket.socket, level: int, option: int, query: bytes) -> bytes:
    """getsockopt whose buffer carries a question, which Python's own cannot."""
    buffer = ctypes.create_string_buffer(query, len(query))
    length = ctypes.c_uint32(len(query))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.getsockopt(sock.fileno(), level, option, buffer, ctypes.byref(length)) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"cannot read iptables-legacy's tables: {os.strerror(code)}")
    return buffer.raw[: length.value]
