"""Between 64 KiB super-packets, which the kernel trades with the TUN, and wire-size packets, which travel.

``split`` is what a network card does for TCP segmentation offload: it cuts one TCP or UDP packet into packets of the
path's size, each with its own length, identification, sequence number, flags and checksums. ``join`` is the way back.
Both rest on one function, ``_headers``: the headers that the segments of a packet *must* have. ``split`` writes them;
``join`` accepts a run of received packets only if their headers are exactly these, checksums included. So a packet
that was damaged, or cut by other rules, is never joined; it goes on alone, as it came.

Words are summed in the machine's own byte order: the Internet checksum comes out in that order, too (RFC 1071 2B).
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final, cast

import numpy as np
from numpy.typing import NDArray

from flanneld.dataplane.udp_tunnel.packet import (
    MIN_HEADER,
    TCP,
    UDP,
    pseudo_header_sum,
    update_header_checksum,
)

Bytes = NDArray[np.uint8]
Numbers = NDArray[np.uint32]

MAX_ROWS: Final = 1024
"""Segments in one call: a 64 KiB packet in pieces of 64 bytes."""

FIN_PSH: Final = 0x09
CWR: Final = 0x80
FRAGMENT: Final = 0x3FFF
DONT_FRAGMENT: Final = 0x40

_COUNT: Final = np.arange(MAX_ROWS, dtype=np.uint32)
_CHECK_OFFSET: Final = {TCP: 16, UDP: 6}


@dataclass(frozen=True, slots=True)
class Shape:
    """How the packets of one run are built: header lengths in bytes, and how the identification counts."""

    protocol: int
    ip_header: int
    header: int
    id_step: int = 1


@dataclass(frozen=True, slots=True)
class SuperPacket:
    """A joined packet: ``header`` and ``payload``, to be written one after the other, and what the kernel needs."""

    header: bytes
    payload: memoryview
    shape: Shape
    segment_size: int
    rows: int


class NotSegmentable(ValueError):
    """The packet cannot be cut: not TCP or UDP, a fragment, or with lengths that disagree."""


def shape_of(packet: bytearray | memoryview, size: int) -> Shape:
    """The shape of the packet in the first ``size`` bytes."""
    ip_header = (packet[0] & 15) * 4
    protocol = packet[9]
    if packet[0] >> 4 != 4 or ip_header < MIN_HEADER or size < ip_header + 8:
        raise NotSegmentable("no IPv4 packet with a transport header")
    if (packet[6] << 8 | packet[7]) & FRAGMENT:
        raise NotSegmentable("a fragment")
    if protocol == UDP:
        return Shape(UDP, ip_header, ip_header + 8)
    if protocol == TCP and size >= ip_header + 20:
        header = ip_header + (packet[ip_header + 12] >> 4) * 4
        if ip_header + 20 <= header <= size:
            return Shape(TCP, ip_header, header)
    raise NotSegmentable("neither TCP nor UDP")


class Segmenter:
    """Buffers for one direction, made once. What ``split`` and ``join`` hand out is valid until the next call."""

    def __init__(self) -> None:
        # 64 KiB of payload, and a header for each of its pieces.
        self._out: Bytes = np.zeros(65536 + MAX_ROWS * 120, np.uint8)
        self._out_view = memoryview(cast(Any, self._out))

    def split(self, packet: Bytes, size: int, segment_size: int) -> tuple[memoryview, int]:
        """Cut ``packet[:size]`` into pieces of ``segment_size`` payload bytes.

        Returns the segments, one directly after the other, and the length of each in bytes (the last may be shorter).
        """
        shape = shape_of(memoryview(cast(Any, packet)), size)
        if segment_size < 1:
            raise NotSegmentable("segments of no bytes")
        start, length = shape.header, size - shape.header
        rows, last = _rows(length, segment_size)
        if rows > MAX_ROWS:
            raise NotSegmentable(f"{rows} segments of {segment_size} bytes, more than {MAX_ROWS}")
        stride = start + segment_size
        table = self._out[: rows * stride].reshape(rows, stride)
        full = rows - 1
        payload = packet[start:size]
        whole = payload[: full * segment_size].reshape(full, segment_size)
        table[:full, start:] = whole
        table[full, start : start + last] = payload[full * segment_size :]
        flags = None
        if shape.protocol == TCP:
            whole_flags = int(packet[shape.ip_header + 13])
            flags = np.full(rows, whole_flags & ~(FIN_PSH | CWR), np.uint8)
            flags[0] |= whole_flags & CWR
            flags[-1] |= whole_flags & FIN_PSH
        sums = _payload_sums(whole, payload[full * segment_size :])
        table[:, :start] = _headers(packet[:start], shape, rows, segment_size, last, sums, flags)
        return self._out_view[: (rows - 1) * stride + start + last], stride

    def join(self, data: Bytes, begin: int, end: int, stride: int) -> SuperPacket | None:
        """Join packets of ``stride`` bytes (the last may be shorter) that lie in ``data[begin:end]``, from the first on.

        Returns a super-packet of the first ``rows`` of them, as many as belong together; None if not even two do.
        ``data`` must reach one stride beyond ``end``: what lies there is overwritten.
        """
        first = memoryview(cast(Any, data))[begin:end]
        try:
            shape = shape_of(first, min(stride, end - begin))
        except NotSegmentable:
            return None
        start, segment_size = shape.header, stride - shape.header
        rows, last = _rows(end - begin, stride)
        last -= start
        if last < 1:
            rows, last = rows - 1, segment_size
        if rows < 2 or segment_size < 1 or (first[2] << 8 | first[3]) != stride:
            return None
        if first[6] & DONT_FRAGMENT and first[4:6] == first[stride + 4 : stride + 6]:
            shape = Shape(shape.protocol, shape.ip_header, shape.header, id_step=0)

        table = data[begin : begin + rows * stride].reshape(rows, stride)
        full = rows - 1
        payload = self._out[: full * segment_size + last]
        whole = payload[: full * segment_size].reshape(full, segment_size)
        whole[:] = table[:full, start:]
        payload[full * segment_size :] = table[full, start : start + last]
        flags = table[:, shape.ip_header + 13] if shape.protocol == TCP else None
        expected = _headers(
            table[0, :start],
            shape,
            rows,
            segment_size,
            last,
            _payload_sums(whole, payload[full * segment_size :]),
            flags,
        )
        good = _leading((table[:, :start] == expected).all(axis=1))
        if flags is not None:
            good = min(good, _until_last(flags[:good]))
        if good < 2:
            return None
        if good < rows:
            last = segment_size
        length = (good - 1) * segment_size + last
        ends = int(flags[good - 1]) & FIN_PSH if flags is not None else 0
        header = _super_header(first, shape, start + length, ends)
        return SuperPacket(header, self._out_view[:length], shape, segment_size, good)


def _rows(length: int, step: int) -> tuple[int, int]:
    """How many steps a length takes, and the length of the last."""
    rows = max(1, -(-length // step))
    return rows, length - (rows - 1) * step


def _leading(good: NDArray[np.bool_]) -> int:
    """How many of the first rows are good."""
    return good.size if good.all() else int(good.argmin())


def _until_last(flags: Bytes) -> int:
    """How many rows there are up to and with the first that ends something (FIN, PSH).

    A CWR beyond the first row starts something new, as a sender sets it once.
    """
    count = flags.size
    marked = np.flatnonzero(flags & (FIN_PSH | CWR)).tolist()
    for row in marked:
        flag = int(flags[row])
        if flag & CWR and row > 0:
            return min(count, row)
        if flag & FIN_PSH:
            return min(count, row + 1)
    return count


def _payload_sums(whole: Bytes, rest: Bytes) -> Numbers:
    """The sum of the 16-bit words of each segment's payload, an odd last byte padded with zero; not folded."""
    rows, width = whole.shape
    sums = np.empty(rows + 1, np.uint32)
    if width & 1:
        padded = np.zeros((rows, width + 1), np.uint8)
        padded[:, :width] = whole
        whole = padded
    whole.view(np.uint16).sum(axis=1, dtype=np.uint32, out=sums[:rows])
    even = rest.size & ~1
    tail = int(rest[:even].view(np.uint16).sum(dtype=np.uint32))
    if rest.size & 1:
        tail += int.from_bytes(bytes((int(rest[-1]), 0)), sys.byteorder)
    sums[rows] = tail
    return sums


def _headers(
    header: Bytes, shape: Shape, rows: int, segment_size: int, last: int, payload_sums: Numbers, flags: Bytes | None
) -> Bytes:
    """The headers of all segments of a packet with this ``header``, one a row.

    ``flags`` are the segments' TCP flags (None for UDP), ``last`` is the payload of the last one in bytes.
    """
    ip_header, protocol = shape.ip_header, shape.protocol
    table: Bytes = np.empty((rows, header.size), np.uint8)
    table[:] = header
    words, native = table.view(">u2"), table.view(np.uint16)
    transport = ip_header // 2
    check = transport + _CHECK_OFFSET[protocol] // 2

    words[:, 1] = header.size + segment_size
    words[-1, 1] = header.size + last
    if shape.id_step:
        words[:, 2] = (int(header[4]) << 8 | int(header[5])) + _COUNT[:rows] & 0xFFFF
    native[:, 5] = 0
    native[:, check] = 0
    if flags is not None:
        sequence = int.from_bytes(header[ip_header + 4 : ip_header + 8].tobytes(), "big")
        table.view(">u4")[:, ip_header // 4 + 1] = np.uint32(sequence) + _COUNT[:rows] * np.uint32(segment_size)
        table[:, ip_header + 13] = flags
    else:
        words[:, transport + 2] = 8 + segment_size
        words[-1, transport + 2] = 8 + last

    native[:, 5] = _negated(native[:, :transport].sum(axis=1, dtype=np.uint32))
    sums = native[:, transport:].sum(axis=1, dtype=np.uint32)
    sums += payload_sums % np.uint32(0xFFFF)
    pseudo = _pseudo(header, protocol, header.size - ip_header + segment_size)
    sums[:-1] += np.uint32(pseudo)
    sums[-1] += np.uint32(_pseudo(header, protocol, header.size - ip_header + last))
    checks = _negated(sums)
    if protocol == UDP:
        checks[checks == 0] = 0xFFFF  # zero would mean "no checksum" (RFC 768)
    native[:, check] = checks
    return table


def _negated(sums: Numbers) -> Numbers:
    """The one's complement of each folded sum."""
    return (np.uint32(0xFFFF) - sums % np.uint32(0xFFFF)) % np.uint32(0xFFFF)


def _pseudo(header: Bytes, protocol: int, length: int) -> int:
    """The pseudo header's sum in the machine's byte order, folded."""
    words = cast(
        "tuple[int, ...]", struct.unpack("=6H", header[12:20].tobytes() + struct.pack("!HH", protocol, length))
    )
    return sum(words) % 0xFFFF


def _super_header(first: memoryview, shape: Shape, size: int, end_flags: int) -> bytes:
    """The header of a joined packet of ``size`` bytes; its transport checksum is left for the kernel to finish."""
    header = bytearray(first[: shape.header])
    struct.pack_into("!H", header, 2, size)
    update_header_checksum(header)
    if shape.protocol == TCP:
        header[shape.ip_header + 13] |= end_flags
    else:
        struct.pack_into("!H", header, shape.ip_header + 4, size - shape.ip_header)
    partial = pseudo_header_sum(header, shape.protocol, size - shape.ip_header)
    partial = (partial & 0xFFFF) + (partial >> 16)
    partial = (partial & 0xFFFF) + (partial >> 16)
    struct.pack_into("!H", header, shape.ip_header + _CHECK_OFFSET[shape.protocol], partial)
    return bytes(header)


def flow_runs(data: Bytes, begin: int, end: int, stride: int) -> Iterator[tuple[int, int]]:
    """Cut the packets in ``data[begin:end]`` where one flow follows another: (begin, end) of each run of one flow.

    A flow is told by addresses and ports, as they lie in a header without options.
    """
    rows, _ = _rows(end - begin, stride)
    keys = data[begin : begin + rows * stride].reshape(rows, stride)[:, 12:24]
    breaks = np.flatnonzero((keys[1:] != keys[:-1]).any(axis=1)) + 1
    edges = [begin, *(begin + breaks * stride).tolist(), end]
    yield from zip(edges, edges[1:], strict=False)
