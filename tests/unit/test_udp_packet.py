"""Single packets: checks, TTL, checksums and ICMP errors, with scapy as the judge."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.packet import Raw

from flanneld.dataplane.udp_tunnel import packet
from flanneld.dataplane.udp_tunnel.peers import PeerTable


def raw(layers: Any) -> bytearray:
    return bytearray(bytes(layers))


@given(st.integers(2, 255), st.integers(0, 0xFFFF), st.integers(0, 0xFFFFFFFF))
def test_one_hop_less_leaves_the_checksum_that_a_new_sum_would_give(ttl: int, identification: int, to: int) -> None:
    data = raw(IP(src="10.5.1.2", dst=".".join(map(str, to.to_bytes(4, "big"))), ttl=ttl, id=identification))
    assert packet.decrement_ttl(data)
    seen = IP(bytes(data))
    assert seen.ttl == ttl - 1
    check = seen.chksum
    del seen.chksum
    assert IP(bytes(seen)).chksum == check


@pytest.mark.parametrize("ttl", [0, 1])
def test_the_last_hop_changes_nothing(ttl: int) -> None:
    data = raw(IP(ttl=ttl))
    before = bytes(data)
    assert not packet.decrement_ttl(data)
    assert data == before


@given(st.binary(max_size=2000))
def test_the_checksum_is_the_sum_of_rfc_1071(data: bytes) -> None:
    total = 0
    padded = data + b"\0" * (len(data) & 1)
    for at in range(0, len(padded), 2):
        total += int.from_bytes(padded[at : at + 2], "big")
        total = (total & 0xFFFF) + (total >> 16)
    expected = ~total & 0xFFFF
    got = packet.checksum(data)
    # Of nothing but zeros the sum has two spellings; no packet is all zeros.
    assert got == expected or (not any(data) and got == 0)


@pytest.mark.parametrize("layer", [TCP(sport=1, dport=2), UDP(sport=1, dport=2)])
@pytest.mark.parametrize("size", [0, 1, 2, 333, 1400])
def test_a_checksum_left_to_the_hardware_is_finished(layer: Any, size: int) -> None:
    whole = IP(src="10.5.1.2", dst="10.5.2.3") / layer / Raw((bytes(range(256)) * 6)[:size])
    good = raw(whole)
    data, offset = bytearray(good), 16 if layer.name == "TCP" else 6
    partial = packet.pseudo_header_sum(data, data[9], len(data) - 20) % 0xFFFF
    data[20 + offset : 22 + offset] = partial.to_bytes(2, "big")
    assert packet.complete_checksum(data, len(data), 20, offset)
    assert data == good


def test_a_checksum_field_outside_the_packet_is_refused() -> None:
    assert not packet.complete_checksum(bytearray(40), 40, 20, 19)
    assert not packet.complete_checksum(bytearray(40), 40, 4, 0)


@pytest.mark.parametrize(
    ("data", "good"),
    [
        (raw(IP() / Raw(b"x")), True),
        (raw(IP())[:19], False),
        (b"", False),
        (b"\x65" + bytes(30), False),
        (raw(IP(len=60) / Raw(b"x")), False),
        (raw(IP(ihl=4, len=20)), False),
        (raw(IP(ihl=15, len=30) / Raw(b"x" * 10)), False),
        (raw(IP(len=20) / Raw(b"padding")), True),
    ],
)
def test_lengths_must_agree(data: bytes, good: bool) -> None:
    assert packet.is_ipv4(bytearray(data), len(data)) is good


@pytest.mark.parametrize("kind", [packet.NET_UNREACHABLE, packet.TIME_EXCEEDED])
def test_an_icmp_error_is_what_a_router_sends(kind: tuple[int, int]) -> None:
    offender = raw(IP(src="10.5.1.2", dst="10.5.9.9") / UDP(sport=7, dport=8) / Raw(b"payload"))
    error = packet.icmp_error(kind, offender, len(offender), "10.5.1.0")
    assert error is not None
    seen = IP(error)
    assert (seen.src, seen.dst, seen.ttl) == ("10.5.1.0", "10.5.1.2", 8)
    assert (seen[ICMP].type, seen[ICMP].code) == kind
    assert error[28:] == bytes(offender[:28])
    again = IP(error)
    del again.chksum, again[ICMP].chksum
    assert bytes(again) == error


@pytest.mark.parametrize(
    "offender",
    [
        IP(src="10.5.1.2", dst="10.5.9.9") / ICMP(type=3),
        IP(src="10.5.1.2", dst="10.5.9.9") / ICMP(type=11),
        IP(src="10.5.1.2", dst="10.5.9.9", frag=10) / Raw(b"later fragment"),
        IP(src="10.5.1.2", dst="224.0.0.1") / UDP(),
        IP(src="0.0.0.0", dst="10.5.9.9") / UDP(),
        IP(src="127.0.0.1", dst="10.5.9.9") / UDP(),
    ],
)
def test_there_is_no_error_about_what_must_not_be_answered(offender: Any) -> None:
    data = raw(offender)
    assert packet.icmp_error(packet.NET_UNREACHABLE, data, len(data), "10.5.1.0") is None


def test_there_is_an_error_about_a_ping() -> None:
    data = raw(IP(src="10.5.1.2", dst="10.5.9.9") / ICMP(type=8))
    assert packet.icmp_error(packet.NET_UNREACHABLE, data, len(data), "10.5.1.0") is not None


def number(address: str) -> int:
    return int.from_bytes(bytes(map(int, address.split("."))), "big")


def test_the_longest_subnet_wins_and_removal_uncovers_the_shorter() -> None:
    peers = PeerTable()
    peers.update([("10.5.0.0/16", "192.0.2.1", 8285), ("10.5.7.0/24", "192.0.2.7", 8285)], [])
    assert peers.next_hop(number("10.5.7.9")) == ("192.0.2.7", 8285)
    peers.update([], ["10.5.7.0/24", "10.5.8.0/24"])
    assert peers.next_hop(number("10.5.7.9")) == ("192.0.2.1", 8285)
    assert peers.next_hop(number("10.6.0.1")) is None


def test_only_addresses_and_ports_of_peers_may_send() -> None:
    peers = PeerTable()
    peers.update([("10.5.1.0/24", "192.0.2.1", 8285), ("10.5.2.0/24", "192.0.2.1", 8285)], [])
    peers.remove("10.5.1.0/24")
    assert ("192.0.2.1", 8285) in peers.senders and ("192.0.2.1", 9999) not in peers.senders
    peers.remove("10.5.2.0/24")
    assert not peers.senders


@given(st.dictionaries(st.integers(0, 255), st.integers(1, 254), max_size=40), st.integers(0, 255))
def test_lookups_equal_a_search_through_the_list(subnets: dict[int, int], third: int) -> None:
    peers = PeerTable()
    for subnet, last in subnets.items():
        peers.put(f"10.5.{subnet}.0/24", (f"192.0.2.{last}", 8285))
    expected = (f"192.0.2.{subnets[third]}", 8285) if third in subnets else None
    assert peers.next_hop(number(f"10.5.{third}.77")) == expected
    assert sorted(peers.entries()) == sorted((f"10.5.{n}.0/24", f"192.0.2.{a}", 8285) for n, a in subnets.items())


@pytest.mark.parametrize("entry", [("10.5.1.1/24", "192.0.2.1"), ("10.5.1.0/24", "not an address"), ("x", "192.0.2.1")])
def test_what_is_no_address_is_refused_and_changes_nothing(entry: tuple[str, str]) -> None:
    peers = PeerTable()
    with pytest.raises((ValueError, OSError)):
        peers.put(entry[0], (entry[1], 8285))
    assert peers.entries() == []
