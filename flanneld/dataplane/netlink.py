"""One rtnetlink socket for requests: single, batched, dumps. And the socket that listens to the kernel's messages.

Requests are packed many to a system call, and every one is acknowledged; the acknowledgement is matched by sequence
number, so that one refusal among thousands is known for what it is. Both sockets belong to one thread.
"""

from __future__ import annotations

import array
import errno
import os
import socket
import struct
from collections.abc import Iterator, Sequence
from typing import Final

from flanneld.dataplane.wire import (
    COMPAT_TABLE,
    HEADER,
    NLM_F_ACK,
    NLM_F_DUMP,
    NLM_F_DUMP_INTR,
    NLM_F_REQUEST,
    NLMSG_DONE,
    NLMSG_ERROR,
    RTM_DELROUTE,
    RTM_NEWNEIGH,
    RTM_NEWROUTE,
    attributes,
)

SOL_NETLINK: Final = 270
NETLINK_ADD_MEMBERSHIP, NETLINK_CAP_ACK, NETLINK_EXT_ACK, NETLINK_GET_STRICT_CHK = 1, 10, 11, 12
SO_RCVBUFFORCE: Final = 33
SO_ATTACH_FILTER: Final = 26
NLMSGERR_ATTR_MSG: Final = 1
NLM_F_CAPPED: Final = 0x100
NLM_F_ACK_TLVS: Final = 0x200
GROUPS: Final = (1, 3, 5, 7, 9, 11)
"""RTNLGRP_LINK, NEIGH, IPV4_IFADDR, IPV4_ROUTE, IPV6_IFADDR, IPV6_ROUTE. FDB messages come in NEIGH."""

CHUNK: Final = 250
"""Messages to a system call: their acknowledgements (about 1 KiB each as the kernel counts) fit the receive buffer."""
RECEIVE_BUFFER: Final = 1 << 20
MONITOR_BUFFER: Final = 16 << 20
"""Room for about 15,000 messages: the flush of a whole device. It is a limit, not memory that is taken."""
ANSWER_SECONDS: Final = 30
DUMP_TRIES: Final = 8

Program = tuple[tuple[int, int, int, int], ...]
"""Classic BPF: code, jump if true, jump if false, constant. BPF loads in network order, netlink writes in host order:
htons and htonl make the constants match."""

Message = tuple[int, int, bytes]
"""Type, flags beyond NLM_F_REQUEST, body."""


class NetlinkError(OSError):
    """The kernel refused a request. ``hint`` is its own explanation (extended ack), "" if it gave none."""

    def __init__(self, number: int, hint: str = "") -> None:
        super().__init__(number, os.strerror(number))
        self.hint = hint

    @property
    def name(self) -> str:
        """EINVAL and the like."""
        return errno.errorcode.get(self.errno or 0, str(self.errno))

    def __str__(self) -> str:
        return f"{self.hint or self.strerror} ({self.name})"


def messages(data: bytes) -> Iterator[tuple[int, int, int, int]]:
    """Type, flags, start and end of the body of each message in a datagram."""
    offset, size = 0, len(data)
    while offset + 16 <= size:
        length, kind, flags, _, _ = HEADER.unpack_from(data, offset)
        if length < 16 or offset + length > size:
            return
        yield kind, flags, offset + 16, offset + length
        offset += (length + 3) & ~3


def _open(receive_buffer: int, protocol: int = socket.NETLINK_ROUTE) -> socket.socket:
    sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol)
    try:
        try:
            sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, receive_buffer)
        except PermissionError:  # without CAP_NET_ADMIN one can still look
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        sock.bind((0, 0))
    except OSError:
        sock.close()
        raise
    return sock


class Netlink:
    """The socket for requests, in the network namespace in which it was made. ``protocol``: NETLINK_ROUTE or another."""

    def __init__(self, protocol: int = socket.NETLINK_ROUTE) -> None:
        self._sock = _open(RECEIVE_BUFFER, protocol)
        try:
            for option in (NETLINK_CAP_ACK, NETLINK_EXT_ACK, NETLINK_GET_STRICT_CHK):
                self._sock.setsockopt(SOL_NETLINK, option, 1)
        except OSError as error:
            self._sock.close()
            text = f"this kernel ({os.uname().release}) is too old: flanneld needs Linux 4.20 or newer"
            raise OSError(error.errno, text) from None
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("@ll", ANSWER_SECONDS, 0))
        self._seq = 0

    @property
    def port_id(self) -> int:
        """What the kernel's messages about our own requests carry as nlmsg_pid."""
        return int(self._sock.getsockname()[0])

    def close(self) -> None:
        self._sock.close()

    def batch(self, requests: Sequence[Message]) -> list[NetlinkError | None]:
        """Send all, in order, without stopping at refusals. One result for each request."""
        results: list[NetlinkError | None] = []
        pack = HEADER.pack
        for first in range(0, len(requests), CHUNK):
            chunk = requests[first : first + CHUNK]
            start = self._seq + 1
            self._seq += len(chunk)
            seq = start
            parts: list[bytes] = []
            for kind, flags, body in chunk:
                parts.append(pack(16 + len(body), kind, flags | NLM_F_REQUEST | NLM_F_ACK, seq, 0))
                parts.append(body)
                seq += 1
            self._sock.send(b"".join(parts))
            results += self._acks(start, len(chunk))
        return results

    def request(self, kind: int, flags: int, body: bytes) -> None:
        """Send one request. Raises NetlinkError."""
        (error,) = self.batch([(kind, flags, body)])
        if error is not None:
            raise error

    def get(self, kind: int, body: bytes) -> bytes:
        """Ask for one object; the datagram that answers. Raises NetlinkError."""
        self._seq += 1
        self._sock.send(HEADER.pack(16 + len(body), kind, NLM_F_REQUEST, self._seq, 0) + body)
        while True:
            data = self._sock.recv(1 << 16)
            _, answer, flags, seq, _ = HEADER.unpack_from(data)
            if seq != self._seq:
                continue
            if answer == NLMSG_ERROR and (error := _error(data, flags)):
                raise error
            return data

    def dump(self, kind: int, body: bytes) -> list[bytes]:
        """The datagrams of a dump. One that changes interrupted is asked for again, a few times.

        After those the last one is taken as it is: what changed meanwhile is told by the kernel's own messages.
        """
        buffers: list[bytes] = []
        for _ in range(DUMP_TRIES):
            buffers, whole = self._dump_once(kind, body)
            if whole:
                break
        return buffers

    def _dump_once(self, kind: int, body: bytes) -> tuple[list[bytes], bool]:
        self._seq += 1
        self._sock.send(HEADER.pack(16 + len(body), kind, NLM_F_REQUEST | NLM_F_DUMP, self._seq, 0) + body)
        buffers: list[bytes] = []
        whole = True
        while True:
            data = self._sock.recv(1 << 16)
            if HEADER.unpack_from(data)[3] != self._seq:
                continue
            for answer, flags, start, _ in messages(data):
                if flags & NLM_F_DUMP_INTR:
                    whole = False
                if answer == NLMSG_ERROR:
                    if error := _error(data[start - 16 :], flags):
                        raise error
                    return buffers, whole
                if answer == NLMSG_DONE:
                    (status,) = struct.unpack_from("=i", data, start)
                    if status < 0:
                        raise NetlinkError(-status)
                    buffers.append(data)
                    return buffers, whole
            buffers.append(data)

    def _acks(self, start: int, count: int) -> list[NetlinkError | None]:
        results: list[NetlinkError | None] = [None] * count
        missing = count
        receive, unpack = self._sock.recv, struct.Struct("=IHHIIi").unpack_from
        while missing:
            data = receive(8192)
            _, kind, flags, seq, _, code = unpack(data)
            if kind != NLMSG_ERROR or not start <= seq < start + count:
                continue  # the rest of an answer that nobody waited for
            if code:
                results[seq - start] = _error(data, flags)
            missing -= 1
        return results


def _error(data: bytes, flags: int) -> NetlinkError | None:
    """The refusal in an NLMSG_ERROR datagram, None if it is a plain acknowledgement."""
    length, *_ = HEADER.unpack_from(data)
    (code,) = struct.unpack_from("=i", data, 16)
    if not code:
        return None
    hint = ""
    if flags & NLM_F_ACK_TLVS:
        (echoed,) = struct.unpack_from("=I", data, 20)
        begin = 36 if flags & NLM_F_CAPPED else 20 + ((echoed + 3) & ~3)
        for kind, start, end in attributes(data, begin, length):
            if kind == NLMSGERR_ATTR_MSG:
                hint = data[start:end].rstrip(b"\0").decode(errors="replace")
    return NetlinkError(-code, hint)


class Monitor:
    """What the kernel says to some groups, as far as a socket filter lets it through.

    By default: links, addresses, routes, neighbours and forwarding entries, but for what ``leaves_out`` says.
    """

    def __init__(self, program: Program, groups: Sequence[int] = GROUPS, receive_buffer: int = MONITOR_BUFFER) -> None:
        self._sock = _open(receive_buffer)
        self._sock.setblocking(False)
        held = array.array("B", b"".join(struct.pack("=HBBI", *instruction) for instruction in program))
        self._sock.setsockopt(
            socket.SOL_SOCKET, SO_ATTACH_FILTER, struct.pack("@HP", len(program), held.buffer_info()[0])
        )
        for group in groups:
            self._sock.setsockopt(SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, group)

    def fileno(self) -> int:
        return self._sock.fileno()

    def close(self) -> None:
        self._sock.close()

    def receive(self) -> Iterator[bytes]:
        """Everything that waits now. Raises OSError with ENOBUFS when messages were lost."""
        receive = self._sock.recv
        while True:
            try:
                yield receive(1 << 16)
            except BlockingIOError:
                return


def own_changes_left_out(port_id: int) -> Program:
    """Drop routes and new neighbours that the socket ``port_id`` put, and routes that it removed.

    We know them from their acknowledgements. (What the kernel says about a removed neighbour, or about forwarding
    entries, does not tell who asked.)
    """
    return (
        (0x28, 0, 0, 4),  # ldh [4]: nlmsg_type
        (0x15, 2, 0, socket.htons(RTM_NEWROUTE)),  # jeq: look at the sender
        (0x15, 1, 0, socket.htons(RTM_DELROUTE)),
        (0x15, 0, 3, socket.htons(RTM_NEWNEIGH)),  # else accept
        (0x20, 0, 0, 12),  # ld [12]: nlmsg_pid
        (0x15, 0, 1, socket.htonl(port_id)),  # jeq: drop, else accept
        (0x06, 0, 0, 0),  # ret 0: drop
        (0x06, 0, 0, 0xFFFFFFFF),  # ret all: accept
    )


def routes_only_of_high_tables() -> Program:
    """Drop the routes of the tables below 256, which are those of the main table and of the host's addresses."""
    return (
        (0x28, 0, 0, 4),  # ldh [4]: nlmsg_type
        (0x15, 1, 0, socket.htons(RTM_NEWROUTE)),  # jeq: look at the table
        (0x15, 0, 2, socket.htons(RTM_DELROUTE)),  # else accept
        (0x30, 0, 0, 20),  # ldb [20]: rtm_table
        (0x15, 0, 1, COMPAT_TABLE),  # jeq: accept, else drop
        (0x06, 0, 0, 0xFFFFFFFF),  # ret all: accept
        (0x06, 0, 0, 0),  # ret 0: drop
    )
