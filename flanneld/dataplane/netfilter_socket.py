"""nf_tables over netlink, without a process: which chains exist, and who has just changed what.

iptables-nft keeps its tables in nf_tables, too, so that one socket tells of both. iptables-legacy tells nobody; see
``netfilter_legacy``. Only headers and a few names are decoded (include/uapi/linux/netfilter/nf_tables.h).
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

_NETLINK_NETFILTER: Final = 12
_SUBSYS_NFTABLES: Final = 10
_GROUP_NFTABLES: Final = 7
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_REQUEST, _REQUEST_DUMP = 0x1, 0x301
_DUMP_INTERRUPTED: Final = 0x10
_NEWTABLE, _GETTABLE, _DELTABLE, _NEWCHAIN, _GETCHAIN, _DELCHAIN, _NEWRULE, _DELRULE = 0, 1, 2, 3, 4, 5, 6, 8
_NEWGEN, _GETGEN = 15, 16
_SO_RCVBUFFORCE: Final = 33
_BUFFER: Final = 1 << 18

FAMILIES: Final = {1: "inet", 2: "ip", 3: "arp", 5: "netdev", 7: "bridge", 10: "ip6"}
HOOKS: Final = {0: "prerouting", 1: "input", 2: "forward", 3: "output", 4: "postrouting"}


@dataclass(frozen=True, slots=True)
class Chain:
    """A chain of any table. ``hook`` is None for a chain that is only jumped to; ``policy`` 0 is drop, 1 accept."""

    family: str
    table: str
    name: str
    hook: str | None = None
    policy: int | None = None


@dataclass(frozen=True, slots=True)
class Touched:
    """A change that the kernel told of: the table, and the chain unless it was the table itself that came or went."""

    family: str
    table: str
    chain: str | None = None
    forward_hook: bool = False


class Monitor:
    """Hears every change to nf_tables in the network namespace in which it was made.

    Raises OSError from the constructor where the kernel has no nfnetlink.
    """

    def __init__(self) -> None:
        self._socket = _open(1 << (_GROUP_NFTABLES - 1))
        self._socket.setblocking(False)
        with contextlib.suppress(OSError):  # needs CAP_NET_ADMIN; a loss is noticed either way
            self._socket.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, 4 << 20)
        self._generation = generation()

    def fileno(self) -> int:
        return self._socket.fileno()

    def drain(self) -> set[Touched] | None:
        """All changes since the last call; None when some were lost and anything may have changed."""
        touched: set[Touched] = set()
        lost = False
        while True:
            try:
                data = self._socket.recv(_BUFFER)
            except BlockingIOError:
                return None if lost else touched
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                lost = True
                continue
            for kind, _, payload in _messages(data):
                if kind == _SUBSYS_NFTABLES << 8 | _NEWGEN:
                    self._generation = _generation(payload)
                elif kind >> 8 == _SUBSYS_NFTABLES and (change := _touched(kind & 0xFF, payload)):
                    touched.add(change)

    def behind(self) -> bool:
        """Whether the kernel's ruleset is newer than the last change we heard of. Call ``drain`` afterwards."""
        now = generation()
        pending = self._generation is None or now is None or (now - self._generation) & 0xFFFFFFFF
        self._generation = now
        return bool(pending)

    def close(self) -> None:
        self._socket.close()


def list_chains() -> list[Chain]:
    """Every chain of this thread's network namespace; empty where the kernel has no nf_tables. Raises OSError."""
    return [_chain(payload) for payload in _ask(_GETCHAIN, _REQUEST_DUMP, _NEWCHAIN)]


def list_tables() -> list[tuple[str, str]]:
    """(family, name) of every table of this thread's network namespace. Raises OSError."""
    answers = _ask(_GETTABLE, _REQUEST_DUMP, _NEWTABLE)
    return [(FAMILIES.get(payload[0], "?"), _first_text(payload, 1)) for payload in answers]


def generation() -> int | None:
    """A number that grows with every change to nf_tables; None where the kernel has none. Raises OSError."""
    answers = _ask(_GETGEN, _REQUEST, _NEWGEN)
    return _generation(answers[0]) if answers else None


def _ask(question: int, flags: int, answer: int) -> list[bytes]:
    for _ in range(10):
        with contextlib.suppress(InterruptedError), contextlib.closing(_open(0)) as sock:
            sock.settimeout(10)
            sock.send(struct.pack("=IHHIIBBH", 20, _SUBSYS_NFTABLES << 8 | question, flags, 1, 0, 0, 0, 0))
            return _answers(sock, flags == _REQUEST_DUMP, answer)
    raise OSError(errno.EAGAIN, "the firewall's tables change too fast to be listed; trying again later")


def _answers(sock: socket.socket, dump: bool, answer: int) -> list[bytes]:
    """The payloads of the answers; InterruptedError when the kernel says that a dump is not consistent."""
    answers: list[bytes] = []
    while True:
        for kind, flags, payload in _messages(sock.recv(_BUFFER)):
            if flags & _DUMP_INTERRUPTED:
                raise InterruptedError
            if kind == _NLMSG_DONE:
                return answers
            if kind == _NLMSG_ERROR:
                code = -struct.unpack_from("=i", payload)[0]
                if code in (errno.EOPNOTSUPP, errno.EINVAL, errno.EPROTONOSUPPORT):
                    return []  # no nf_tables in this kernel
                raise OSError(code, f"cannot list the firewall's tables: {os.strerror(code)}")
            if kind == _SUBSYS_NFTABLES << 8 | answer:
                answers.append(payload)
                if not dump:
                    return answers


def _open(groups: int) -> socket.socket:
    sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_NETFILTER)
    try:
        sock.bind((0, groups))
    except OSError:
        sock.close()
        raise
    return sock


def _messages(data: bytes) -> Iterator[tuple[int, int, bytes]]:
    """(type, flags, payload) of each message in a datagram."""
    offset = 0
    while offset + 16 <= len(data):
        length, kind, flags = struct.unpack_from("=IHH", data, offset)
        if length < 16:
            return
        yield kind, flags, data[offset + 16 : offset + length]
        offset += (length + 3) & ~3


def _attributes(data: bytes, offset: int = 0) -> Iterator[tuple[int, bytes]]:
    while offset + 4 <= len(data):
        length, kind = struct.unpack_from("=HH", data, offset)
        if length < 4:
            return
        yield kind & 0x3FFF, data[offset + 4 : offset + length]
        offset += (length + 3) & ~3


def _text(value: bytes) -> str:
    return value.rstrip(b"\0").decode(errors="replace")


def _chain(payload: bytes) -> Chain:
    table, name, hook, policy = "", "", None, None
    for kind, value in _attributes(payload, 4):
        if kind == 1:
            table = _text(value)
        elif kind == 3:
            name = _text(value)
        elif kind == 4:
            number = next((struct.unpack(">I", v)[0] for k, v in _attributes(value) if k == 1), -1)
            hook = HOOKS.get(number)
        elif kind == 5:
            policy = struct.unpack(">I", value)[0]
    return Chain(FAMILIES.get(payload[0], "?"), table, name, hook, policy)


def _touched(message: int, payload: bytes) -> Touched | None:
    family = FAMILIES.get(payload[0], "?")
    if message in (_NEWTABLE, _DELTABLE):
        return Touched(family, _first_text(payload, 1))
    if message in (_NEWCHAIN, _DELCHAIN):
        chain = _chain(payload)
        return Touched(family, chain.table, chain.name, chain.hook == "forward")
    if message in (_NEWRULE, _DELRULE):
        return Touched(family, _first_text(payload, 1), _first_text(payload, 2))
    return None


def _first_text(payload: bytes, attribute: int) -> str:
    return next((_text(value) for kind, value in _attributes(payload, 4) if kind == attribute), "")


def _generation(payload: bytes) -> int | None:
    return next((struct.unpack(">I", value)[0] for kind, value in _attributes(payload, 4) if kind == 1), None)
