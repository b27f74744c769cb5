"""Cutting and joining: segments carry the same stream, every checksum is right, and what is not sound stays alone."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scapy.layers.inet import IP, TCP, UDP
from scapy.packet import Raw

from flanneld.dataplane.udp_tunnel.segments import Buffer, NotSegmentable, Segmenter, flow_runs

OPTIONS: list[Any] = [("Timestamp", (7, 9)), ("NOP", None), ("NOP", None)]
ROOM = 10


def buffer_of(data: bytes) -> Buffer:
    buffer = Buffer(max(2 * 65536, len(data)))
    buffer.view[: len(data)] = data
    return buffer


def payload_of(size: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(size)


def tcp(payload: bytes, **fields: Any) -> bytes:
    ip = {key: fields.pop(key) for key in ("id", "ttl", "tos") if key in fields}
    head = IP(src="10.5.1.2", dst="10.5.2.3", flags="DF", **ip)
    return bytes(head / TCP(**{"sport": 1000, "dport": 80, "flags": "A", "options": OPTIONS, **fields}) / Raw(payload))


def udp(payload: bytes) -> bytes:
    return bytes(IP(src="10.5.1.2", dst="10.5.2.3", id=7) / UDP(sport=5, dport=6) / Raw(payload))


def split(whole: bytes, segment_size: int) -> tuple[list[bytes], int]:
    data, stride = Segmenter().split(buffer_of(whole), len(whole), segment_size)
    return [bytes(data[at : at + stride]) for at in range(0, len(data), stride)], stride


def join_all(segments: list[bytes], stride: int) -> list[bytes]:
    """What a receiver makes of segments that lie behind one another, as packets."""
    data = b"".join(segments)
    buffer, begin, out = buffer_of(data), 0, []
    while begin < len(data):
        joined = Segmenter(ROOM).join(buffer, begin, len(data), stride)
        if joined is None:
            out.append(data[begin : begin + stride])
            begin += stride
        else:
            out.append(bytes(joined.frame[ROOM:]))
            begin += joined.rows * stride
    return out


def check_sound(segment: bytes) -> Any:
    """scapy finds the lengths and both checksums that it would have written itself; the packet as scapy sees it."""
    seen, fresh = IP(segment), IP(segment)
    layer = TCP if TCP in fresh else UDP
    del fresh.chksum, fresh.len, fresh[layer].chksum
    if layer is UDP:
        del fresh[UDP].len
    assert bytes(fresh) == segment
    return seen


@settings(deadline=None, max_examples=60)
@given(
    size=st.integers(1, 20000),
    segment_size=st.integers(500, 2000),
    seq=st.one_of(st.integers(0, 2**32 - 1), st.integers(2**32 - 9000, 2**32 - 1)),
    first_id=st.integers(0, 0xFFFF),
    flags=st.sampled_from(["A", "PA", "FPA", "FA", "CA", "CPA", "EA"]),
    seed=st.integers(0, 99),
)
def test_tcp_segments_carry_the_stream(
    size: int, segment_size: int, seq: int, first_id: int, flags: str, seed: int
) -> None:
    stream = payload_of(size, seed)
    whole = tcp(stream, seq=seq, flags=flags, id=first_id)
    segments, _ = split(whole, segment_size)
    seen = [check_sound(segment) for segment in segments]
    assert b"".join(bytes(p[TCP].payload) for p in seen) == stream
    assert [p[TCP].seq for p in seen] == [(seq + n * segment_size) % 2**32 for n in range(len(seen))]
    assert [p.id for p in seen] == [(first_id + n) % 2**16 for n in range(len(seen))]
    for position, p in enumerate(seen):
        last, first = position == len(seen) - 1, position == 0
        assert ("F" in p[TCP].flags, "P" in p[TCP].flags) == (last and "F" in flags, last and "P" in flags)
        assert ("C" in p[TCP].flags) == (first and "C" in flags)
        assert ("E" in p[TCP].flags) == ("E" in flags)


@settings(deadline=None, max_examples=40)
@given(size=st.integers(1, 20000), segment_size=st.integers(300, 2000), seed=st.integers(0, 99))
def test_udp_segments_carry_the_datagrams(size: int, segment_size: int, seed: int) -> None:
    stream = payload_of(size, seed)
    segments, _ = split(udp(stream), segment_size)
    seen = [check_sound(segment) for segment in segments]
    assert [bytes(p[UDP].payload) for p in seen] == [
        stream[at : at + segment_size] for at in range(0, size, segment_size)
    ]


@settings(deadline=None, max_examples=60)
@given(
    size=st.integers(2, 20000),
    segment_size=st.integers(500, 2000),
    seq=st.integers(0, 2**32 - 1),
    flags=st.sampled_from(["A", "PA", "FPA", "CA"]),
    make=st.sampled_from(["tcp", "udp"]),
)
def test_joining_undoes_cutting(size: int, segment_size: int, seq: int, flags: str, make: str) -> None:
    whole = tcp(payload_of(size), seq=seq, flags=flags, id=99) if make == "tcp" else udp(payload_of(size))
    segments, stride = split(whole, segment_size)
    joined = join_all(segments, stride)
    assert len(joined) == 1
    got = bytearray(joined[0])
    if len(segments) > 1:  # the transport checksum is the kernel's to finish
        at = 20 + (16 if make == "tcp" else 6)
        got[at : at + 2] = whole[at : at + 2]
    assert got == whole


@settings(deadline=None, max_examples=60)
@given(row=st.integers(0, 9), at=st.integers(0, 1471), bit=st.integers(0, 7))
def test_a_damaged_segment_is_handed_on_as_it_came(row: int, at: int, bit: int) -> None:
    segments, stride = split(tcp(payload_of(14200), seq=5), 1420)
    damaged = bytearray(segments[row])
    damaged[at] ^= 1 << bit
    segments[row] = bytes(damaged)
    joined = join_all(segments, stride)
    assert bytes(damaged) in joined
    stream = b"".join(bytes(IP(p)[TCP].payload) for p in joined if p != bytes(damaged))
    assert stream == b"".join(bytes(IP(s)[TCP].payload) for n, s in enumerate(segments) if n != row)


def test_a_hole_in_the_stream_ends_a_run() -> None:
    segments, stride = split(tcp(payload_of(14200), seq=5), 1420)
    del segments[4]
    assert [len(p) for p in join_all(segments, stride)] == [52 + 4 * 1420, 52 + 5 * 1420]


def test_a_push_ends_a_run_and_is_kept() -> None:
    first, stride = split(tcp(payload_of(4260), seq=5, flags="PA", id=1), 1420)
    second, _ = split(tcp(payload_of(4260), seq=5 + 4260, flags="A", id=4), 1420)
    joined = join_all(first + second, stride)
    assert [str(IP(p)[TCP].flags) for p in joined] == ["PA", "A"]


@pytest.mark.parametrize("step", [0, 1])
def test_identifications_that_stand_still_join_only_with_dont_fragment(step: int) -> None:
    segments, stride = split(tcp(payload_of(4260), id=0), 1420)
    for number, segment in enumerate(segments):
        alike = IP(segment)
        alike.id, alike.flags = number * step, "DF" if step == 0 else 0
        del alike.chksum
        segments[number] = bytes(alike)
    assert len(join_all(segments, stride)) == 1
    still = [IP(segment) for segment in segments]
    for p in still:
        p.id, p.flags = 0, 0
        del p.chksum
    assert len(join_all([bytes(p) for p in still], stride)) == 3


@pytest.mark.parametrize("payload", [TCP(), UDP()])
def test_fragments_are_neither_cut_nor_joined(payload: Any) -> None:
    for fields in ({"flags": "MF"}, {"frag": 100}):
        fragment = bytes(IP(src="10.5.1.2", dst="10.5.2.3", **fields) / payload / Raw(bytes(3000)))
        with pytest.raises(NotSegmentable):
            split(fragment, 1400)
        assert Segmenter(ROOM).join(buffer_of(fragment * 2), 0, 2 * len(fragment), len(fragment)) is None


@pytest.mark.parametrize(
    "packet",
    [
        bytes(IP(proto=47) / Raw(bytes(3000))),
        bytes(IP() / TCP(dataofs=3) / Raw(bytes(3000))),
        bytes(IP() / TCP(dataofs=15))[:41],
        b"\x60" + bytes(3000),
        b"\x41" + bytes(3000),
        bytes(IP() / TCP()),
    ],
)
def test_what_cannot_be_cut_is_refused(packet: bytes) -> None:
    with pytest.raises(NotSegmentable):
        split(packet, 1400)


@pytest.mark.parametrize("segment_size", [0, 1])
def test_absurd_segment_sizes_are_refused(segment_size: int) -> None:
    with pytest.raises(NotSegmentable):
        split(tcp(payload_of(3000)), segment_size)


def test_ip_options_travel_with_every_segment() -> None:
    head = IP(src="10.5.1.2", dst="10.5.2.3", options=[Raw(b"\x94\x04\x00\x00")])
    segments, _ = split(bytes(head / TCP(flags="A") / Raw(payload_of(4000))), 1400)
    assert [check_sound(s).ihl for s in segments] == [6, 6, 6]


@settings(deadline=None, max_examples=100)
@given(st.binary(min_size=1, max_size=3000), st.integers(1, 1500))
def test_joining_noise_loses_nothing(data: bytes, stride: int) -> None:
    assert Segmenter(ROOM).join(buffer_of(data), 0, len(data), stride) is None
    if stride >= 24:
        runs = list(flow_runs(buffer_of(data).array, 0, len(data), stride))
        assert runs[0][0] == 0 and runs[-1][1] == len(data)
        assert all(a[1] == b[0] for a, b in itertools.pairwise(runs))


def test_flows_are_told_apart() -> None:
    a, stride = split(tcp(payload_of(2840), sport=1), 1420)
    b, _ = split(tcp(payload_of(2840), sport=2), 1420)
    data = b"".join([*a, *b, a[0]])
    assert list(flow_runs(buffer_of(data).array, 0, len(data), stride)) == [
        (0, 2 * stride),
        (2 * stride, 4 * stride),
        (4 * stride, 5 * stride),
    ]
