"""Between 64 KiB super-packets, which the kernel trades with the TUN, and wire-size packets, which travel.

``split`` is what a network card does for segmentation offload: it cuts one TCP or UDP packet into packets of the
path's size, each with its own length, identification, sequence number, flags and checksums. ``join`` is the way back.
Both rest on one function, ``_fill``: the headers that the segments of a packet *must* have. ``split`` writes them;
``join`` accepts a run of received packets only if their headers are exactly these, checksums included. So a packet
that was damaged, or cut by other rules, is never joined; it goes on alone, as it came.

Checksums are sums modulo 65535 (one's complement with end-around carry), so a whole number adds as its 16-bit words
do, and bytes in the other order are the same sum times 256 (RFC 1071).
"""

from __future__ import annotations

import functools
import itertools
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Final, cast

import numpy as np
from numpy.typing import NDArray

from flanneld.dataplane.udp_tunnel.packet import MIN_HEADER, TCP, UDP, pseudo_header_sum, update_header_checksum

Bytes = NDArray[np.uint8]
Numbers = NDArray[np.int64]

MAX_ROWS: Final = 1024
"""Segments in one call: a 64 KiB packet in pieces of 64 bytes."""

MAX_HEADER: Final = 120
"""IPv4 and TCP headers with all their options, in bytes."""

FIN_PSH: Final = 0x09
CWR: Final = 0x80
FRAGMENT: Final = 0x3FFF
DONT_FRAGMENT: Final = 0x40
MODULUS: Final = 0xFFFF

_COUNT: Final = np.arange(MAX_ROWS, dtype=np.int64)
_SWAP: Final = 256 if sys.byteorder == "little" else 1
_PAYLOAD_AT: Final = 136


class Buffer:
    """Memory that is both an array, for arithmetic, and a view, for system calls and single bytes."""

    def __init__(self, size: int) -> None:
        self.array: Bytes = np.zeros(size, np.uint8)
        self.view = memoryview(cast(Any, self.array))

    def after(self, offset: int) -> Buffer:
        """The same memory from ``offset`` on."""
        part = Buffer.__new__(Buffer)
        part.array, part.view = self.array[offset:], self.view[offset:]
        return part


@dataclass(frozen=True, slots=True)
class Shape:
    """How the packets of one run are built: header lengths in bytes, and how the identification counts."""

    protocol: int
    ip_header: int
    header: int
    id_step: int = 1

    @property
    def check_at(self) -> int:
        """Where the transport checksum lies."""
        return self.ip_header + (16 if self.protocol == TCP else 6)


@dataclass(frozen=True, slots=True)
class SuperPacket:
    """``rows`` packets in one: ``frame`` holds ``room`` free bytes, then the packet."""

    frame: memoryview
    shape: Shape
    segment_size: int
    rows: int


class NotSegmentable(ValueError):
    """The packet cannot be cut: not TCP or UDP, a fragment, or with lengths that disagree."""


def shape_of(packet: memoryview, size: int) -> Shape:
    """The shape of the packet in the first ``size`` bytes."""
    ip_header = (packet[0] & 15) * 4
    if packet[0] >> 4 != 4 or ip_header < MIN_HEADER or size < ip_header + 8:
        raise NotSegmentable("no IPv4 packet with a transport header")
    if (packet[6] << 8 | packet[7]) & FRAGMENT:
        raise NotSegmentable("a fragment")
    header = ip_header + 8
    if packet[9] == TCP and size >= ip_header + 20:
        header = ip_header + (packet[ip_header + 12] >> 4) * 4
        if not ip_header + 20 <= header <= size:
            raise NotSegmentable("a TCP header longer than the packet, or shorter than itself")
    elif packet[9] != UDP:
        raise NotSegmentable("neither TCP nor UDP")
    return _shape(packet[9], ip_header, header)


@functools.lru_cache(256)
def _shape(protocol: int, ip_header: int, header: int) -> Shape:
    return Shape(protocol, ip_header, header)


@functools.lru_cache(256)
def _fields(shape: Shape, stride: int) -> np.dtype[Any]:
    """The fields that differ between segments, in packets that lie ``stride`` bytes apart."""
    transport = shape.ip_header
    fields = {"length": (2, ">u2"), "id": (4, ">u2"), "ip_check": (10, ">u2"), "check": (shape.check_at, ">u2")}
    if shape.protocol == TCP:
        fields |= {"sequence": (transport + 4, ">u4"), "flags": (transport + 13, "u1")}
    else:
        fields |= {"udp_length": (transport + 4, ">u2")}
    return np.dtype(
        {
            "names": list(fields),
            "offsets": [at for at, _ in fields.values()],
            "formats": [kind for _, kind in fields.values()],
            "itemsize": stride,
        }
    )


class Segmenter:
    """Buffers for one direction, made once. What ``split`` and ``join`` hand out is valid until the next call."""

    def __init__(self, room: int = 0) -> None:
        """``room``: bytes that a joined packet is to leave free in front."""
        self._room = room
        self._out = Buffer(_PAYLOAD_AT + 65536 + MAX_ROWS * MAX_HEADER)

    def split(self, packet: Buffer, size: int, segment_size: int) -> tuple[memoryview, int]:
        """Cut the packet in the first ``size`` bytes into pieces of ``segment_size`` payload bytes.

        Returns the segments, one directly after the other, and the length of each in bytes (the last may be shorter).
        """
        view = packet.view
        shape = shape_of(view, size)
        header = shape.header
        if segment_size < 1 or size <= header:
            raise NotSegmentable("nothing to cut")
        rows = -(-(size - header) // segment_size)
        if rows > MAX_ROWS:
            raise NotSegmentable(f"{rows} segments of {segment_size} bytes, more than {MAX_ROWS}")
        stride = header + segment_size
        full, rest = divmod(size - header, segment_size)
        edge = header + full * segment_size

        whole = packet.array[header:edge].reshape(full, segment_size)
        table = self._out.array[: rows * stride].reshape(rows, stride)
        table[:full, header:] = whole
        if rest:
            table[full, header : header + rest] = packet.array[edge:size]
        table[:, :header] = packet.array[:header]
        flags = None
        if shape.protocol == TCP:
            whole_flags = view[shape.ip_header + 13]
            flags = np.full(rows, whole_flags & ~(FIN_PSH | CWR), np.int64)
            flags[0] |= whole_flags & CWR
            flags[-1] |= whole_flags & FIN_PSH
        sums = _payload_sums(whole, bytes(view[edge:size]))
        _fill(table.reshape(-1).view(_fields(shape, stride)), view, shape, (segment_size, rest), sums, flags)
        return self._out.view[: full * stride + (header + rest if rest else 0)], stride

    def join(self, data: Buffer, begin: int, end: int, stride: int) -> SuperPacket | None:
        """Join packets of ``stride`` bytes (the last may be shorter) that lie in ``data`` from ``begin`` to ``end``.

        Returns a super-packet of the first ``rows`` of them, as many as belong together; None if not even two do.
        ``data`` must reach one stride beyond ``end``, whatever lies there.
        """
        view = data.view[begin:end]
        try:
            shape = shape_of(view, min(stride, end - begin))
        except NotSegmentable:
            return None
        header, segment_size = shape.header, stride - shape.header
        full, rest = divmod(end - begin, stride)
        rest = max(0, rest - header)
        rows = full + (rest > 0)
        if rows < 2 or segment_size < 1 or view[2] << 8 | view[3] != stride:
            return None
        if view[6] & DONT_FRAGMENT and view[4:6] == view[stride + 4 : stride + 6]:
            shape = replace(shape, id_step=0)

        table = data.array[begin : begin + rows * stride].reshape(rows, stride)
        payload = self._out.array[_PAYLOAD_AT:]
        whole = payload[: full * segment_size].reshape(full, segment_size)
        whole[:] = table[:full, header:]
        if rest:
            payload[full * segment_size : full * segment_size + rest] = table[full, header : header + rest]
        sums = _payload_sums(whole, bytes(view[full * stride + header :]) if rest else b"")

        found = table[:, :header]
        flags = found[:, shape.ip_header + 13].astype(np.int64) if shape.protocol == TCP else None
        expected: Bytes = np.empty((rows, header), np.uint8)
        expected[:] = found[0]
        _fill(expected.reshape(-1).view(_fields(shape, header)), view, shape, (segment_size, rest), sums, flags)
        good = rows if found.tobytes() == expected.tobytes() else _leading((found == expected).all(axis=1))
        if flags is not None:
            good = min(good, _until_last(flags[:good].tolist()))
        if good < 2:
            return None
        length = (full * segment_size + rest) if good == rows else good * segment_size
        start = _PAYLOAD_AT - header
        packet = self._out.view[start : _PAYLOAD_AT + length]
        packet[:header] = view[:header]
        _complete(packet, shape, int(flags[good - 1]) & FIN_PSH if flags is not None else 0)
        return SuperPacket(self._out.view[start - self._room : _PAYLOAD_AT + length], shape, segment_size, good)


def _leading(good: NDArray[np.bool_]) -> int:
    """How many of the first rows are good."""
    return good.size if good.all() else int(good.argmin())


def _until_last(flags: list[int]) -> int:
    """How many packets go together by their TCP flags: FIN and PSH end a run, CWR stands only in its first."""
    for row, flag in enumerate(flags):
        if flag & CWR and row:
            return row
        if flag & FIN_PSH:
            return row + 1
    return len(flags)


def _payload_sums(whole: Bytes, rest: bytes) -> Numbers:
    """The sum of each segment's payload as 16-bit words, an odd last byte padded with zero; ``rest`` is one more."""
    rows, width = whole.shape
    if width & 1:
        padded = np.zeros((rows, width + 1), np.uint8)
        padded[:, :width] = whole
        whole = padded
    sums = np.empty(rows + bool(rest), np.int64)
    sums[:rows] = np.add.reduce(whole.view(np.uint16), 1, np.uint32)
    sums *= _SWAP
    if rest:
        sums[rows] = (int.from_bytes(rest, "big") << 8 * (len(rest) & 1)) % MODULUS
    return sums


def _fill(
    table: NDArray[np.void],
    header: memoryview,
    shape: Shape,
    sizes: tuple[int, int],
    payload_sums: Numbers,
    flags: Numbers | None,
) -> None:
    """Write the fields in which the segments of the packet with this ``header`` differ.

    ``sizes`` are the payload bytes of a whole segment and of a shorter last one (0: there is none); ``flags`` are the
    TCP flags of each (None for UDP).
    """
    rows, (segment_size, rest) = len(table), sizes
    transport = shape.ip_header
    length = shape.header + segment_size
    less = segment_size - rest if rest else 0
    base = bytearray(header[: shape.header])
    struct.pack_into("!H", base, 2, length)
    base[10:12] = base[shape.check_at : shape.check_at + 2] = b"\0\0"

    table["length"] = length
    ip_sums: Any = int.from_bytes(base[:transport], "big") % MODULUS
    if shape.id_step:
        identification = int.from_bytes(base[4:6], "big")
        ids = identification + _COUNT[:rows] & 0xFFFF
        table["id"] = ids
        ip_sums = ids + (ip_sums - identification)
    table["ip_check"] = -ip_sums % MODULUS

    if flags is not None:
        base[transport + 13] = 0
        sequence = int.from_bytes(base[transport + 4 : transport + 8], "big")
        base[transport + 4 : transport + 8] = b"\0\0\0\0"
        sequences = sequence + _COUNT[:rows] * segment_size & 0xFFFFFFFF
        table["sequence"] = sequences
        table["flags"] = flags
        payload_sums += sequences
        payload_sums += flags
    else:
        struct.pack_into("!H", base, transport + 4, 8 + segment_size)
        table["udp_length"] = 8 + segment_size
    payload_sums += pseudo_header_sum(base, shape.protocol, length - transport)
    payload_sums += int.from_bytes(base[transport:], "big") % MODULUS
    if less:
        last = table[-1]
        last["length"] = length - less
        last["ip_check"] = (int(last["ip_check"]) + less) % MODULUS
        payload_sums[-1] -= less
        if flags is None:
            last["udp_length"] = 8 + rest
            payload_sums[-1] -= less
    checks = -payload_sums % MODULUS
    if flags is None:
        checks[checks == 0] = MODULUS  # zero would mean "no checksum" (RFC 768)
    table["check"] = checks


def _complete(packet: memoryview, shape: Shape, end_flags: int) -> None:
    """Make the first segment's header that of the whole; the transport checksum is left for the kernel to finish."""
    size, transport = len(packet), shape.ip_header
    struct.pack_into("!H", packet, 2, size)
    update_header_checksum(packet)
    if shape.protocol == TCP:
        packet[transport + 13] |= end_flags
    else:
        struct.pack_into("!H", packet, transport + 4, size - transport)
    partial = pseudo_header_sum(packet, shape.protocol, size - transport) % MODULUS
    struct.pack_into("!H", packet, shape.check_at, partial)


def flow_runs(data: Bytes, begin: int, end: int, stride: int) -> Iterator[tuple[int, int]]:
    """Cut the packets in ``data[begin:end]`` where one flow follows another: (begin, end) of each run of one flow.

    A flow is told by addresses and ports, as they lie in a header without options.
    """
    rows = -(-(end - begin) // stride)
    keys = data[begin : begin + rows * stride].reshape(rows, stride)[:, 12:24]
    breaks = np.flatnonzero((keys[1:] != keys[:-1]).any(axis=1)) + 1
    return itertools.pairwise([begin, *(begin + breaks * stride).tolist(), end])
