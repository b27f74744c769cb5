"""Arithmetic on single IPv4 packets, in place: checks, TTL, checksums, ICMP errors (RFC 791, 792, 1071, 1624).

Packets are bytearrays or writable memoryviews that start at the IPv4 header.
"""

from __future__ import annotations

import socket
import struct
from typing import Final

Buffer = bytearray | memoryview

MIN_HEADER: Final = 20
ICMP: Final = 1
TCP: Final = 6
UDP: Final = 17

NET_UNREACHABLE: Final = (3, 0)
TIME_EXCEEDED: Final = (11, 0)

ICMP_TTL: Final = 8
"""What flannel's proxy gives its ICMP errors: enough to cross this host and a peer."""


def is_ipv4(packet: Buffer, size: int) -> bool:
    """Whether the first ``size`` bytes hold a whole IPv4 packet: version, header length and total length agree."""
    if size < MIN_HEADER or packet[0] >> 4 != 4:
        return False
    header = (packet[0] & 15) * 4
    return MIN_HEADER <= header <= (packet[2] << 8 | packet[3]) <= size


def destination(packet: Buffer) -> int:
    """The destination address as a number."""
    return packet[16] << 24 | packet[17] << 16 | packet[18] << 8 | packet[19]


def source(packet: Buffer) -> int:
    return packet[12] << 24 | packet[13] << 16 | packet[14] << 8 | packet[15]


def decrement_ttl(packet: Buffer) -> bool:
    """One hop less, with the checksum patched (RFC 1624); False, and nothing changed, if that was the last hop."""
    ttl = packet[8]
    if ttl <= 1:
        return False
    packet[8] = ttl - 1
    check = (packet[10] << 8 | packet[11]) + 0x100
    if check >= 0xFFFF:
        check = check + 1 & 0xFFFF
    packet[10], packet[11] = check >> 8, check & 255
    return True


def checksum(data: bytes | Buffer, initial: int = 0) -> int:
    """The Internet checksum of ``data`` in network order.

    A sum with end-around carry is the number modulo 65535, since 2**16 leaves 1, and Python divides long numbers
    faster than it adds short ones.
    """
    total = int.from_bytes(data, "big")
    if len(data) & 1:
        total <<= 8
    return -(total + initial) % 0xFFFF


def pseudo_header_sum(packet: Buffer, protocol: int, length: int) -> int:
    """What TCP and UDP add to their sum: both addresses, the protocol and their own length; not folded."""
    return int.from_bytes(packet[12:20], "big") % 0xFFFF + protocol + length


def complete_checksum(packet: Buffer, size: int, start: int, offset: int) -> bool:
    """Finish a checksum that the kernel left to the hardware: the sum over ``start``.. goes to ``start + offset``.

    The field already holds the pseudo header's share. False if the numbers point outside the packet.
    """
    field = start + offset
    if start < MIN_HEADER or field + 2 > size:
        return False
    value = checksum(packet[start:size])
    if value == 0 and packet[9] == UDP:
        value = 0xFFFF  # zero would mean "no checksum" (RFC 768)
    struct.pack_into("!H", packet, field, value)
    return True


def update_header_checksum(packet: Buffer) -> None:
    header = (packet[0] & 15) * 4
    packet[10] = packet[11] = 0
    struct.pack_into("!H", packet, 10, checksum(packet[:header]))


def icmp_error(kind: tuple[int, int], packet: Buffer, size: int, sender: str) -> bytes | None:
    """The ICMP error of ``kind`` (type, code) about ``packet``, from address ``sender``; None where there must be none.

    There is none about ICMP errors, later fragments, or packets to or from addresses that are no single host's
    (RFC 1122 3.2.2). As in flannel, the offender's header and its first 8 bytes come back.
    """
    header = (packet[0] & 15) * 4
    to, back = destination(packet), source(packet)
    is_error = packet[9] == ICMP and (size <= header or packet[header] not in (0, 8, 13, 14))
    later_fragment = (packet[6] << 8 | packet[7]) & 0x1FFF
    if is_error or later_fragment or to >= 0xE0000000 or back >= 0xE0000000 or back >> 24 in (0, 127):
        return None
    quoted = bytes(packet[: min(size, header + 8)])
    body = struct.pack("!BBHI", *kind, 0, 0) + quoted
    body = body[:2] + struct.pack("!H", checksum(body)) + body[4:]
    head = bytearray(struct.pack("!BBHHHBBH", 0x45, 0, MIN_HEADER + len(body), 0, 0, ICMP_TTL, ICMP, 0))
    head += socket.inet_aton(sender) + bytes(packet[12:16])
    update_header_checksum(head)
    return bytes(head) + body
