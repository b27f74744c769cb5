"""The udp tunnel on the wire: two hosts, what they send, what they refuse, and who else they understand."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.packet import Raw

from flanneld.lab.netns import Namespace
from flanneld.lab.ping import ping
from flanneld.lab.udp_hosts import PORT, Carrier, NoCompiler, TunnelHost, compile_reference, tunnel, two_hosts
from flanneld.lab.wait import wait_until

Pair = tuple[TunnelHost, TunnelHost]


@pytest.fixture
def hosts() -> Iterator[Pair]:
    with two_hosts() as pair:
        yield pair


@pytest.fixture
def joined(hosts: Pair) -> Iterator[Pair]:
    with tunnel(*hosts, "worker"):
        wait_until(lambda: ping(hosts[0].namespace, hosts[1].address).ok, 20, "a ping")
        yield hosts


def open_in(namespace: Namespace, kind: socket.SocketKind) -> socket.socket:
    with namespace.inside():
        made = socket.socket(socket.AF_INET, kind)
    made.settimeout(30)
    return made


def send_stream(sender: TunnelHost, receiver: TunnelHost, data: bytes) -> None:
    """Send bytes by TCP through the tunnel, and check that they arrive as they left."""
    with (
        open_in(receiver.namespace, socket.SOCK_STREAM) as listener,
        open_in(sender.namespace, socket.SOCK_STREAM) as out,
    ):
        listener.bind((receiver.address, 0))
        listener.listen()
        out.connect(listener.getsockname())
        arrived, _ = listener.accept()
        with arrived:
            arrived.settimeout(60)
            writer = threading.Thread(target=lambda: (out.sendall(data), out.shutdown(socket.SHUT_WR)))
            writer.start()
            digest = hashlib.sha256()
            while chunk := arrived.recv(1 << 18):
                digest.update(chunk)
            writer.join()
    assert digest.digest() == hashlib.sha256(data).digest()


def counters(host: TunnelHost) -> dict[str, int]:
    return host.ask("counters")


def test_packets_of_the_full_mtu_pass_unfragmented_both_ways(joined: Pair) -> None:
    a, b = joined
    for here, there in ((a, b), (b, a)):
        wait_until(lambda: ping(here.namespace, there.address, size=1472 - 28, dont_fragment=True).ok, 5, "a ping")
        assert not ping(here.namespace, there.address, size=1473 - 28, dont_fragment=True).ok


@pytest.mark.parametrize("carrier", ["worker", "worker without offloads"])
def test_tcp_streams_arrive_as_they_left(hosts: Pair, carrier: Carrier) -> None:
    a, b = hosts
    data = os.urandom(8 << 20)
    with tunnel(a, b, carrier):
        send_stream(a, b, data)
        send_stream(b, a, data)
        if carrier == "worker":
            # Fewer system calls than packets is the point of it all; no packet may have been dropped as unsound.
            assert counters(b)["drop_malformed"] == counters(a)["drop_malformed"] == 0


@pytest.mark.parametrize("worker_is_sender", [True, False])
def test_the_plain_c_loop_understands_us_and_we_it(hosts: Pair, worker_is_sender: bool, tmp_path: Path) -> None:
    try:
        reference = compile_reference(tmp_path)
    except NoCompiler as missing:
        pytest.skip(str(missing))
    a, b = hosts
    try:
        a.start(b, "worker")
        b.start(a, "c", reference)
        wait_until(lambda: ping(a.namespace, b.address).ok, 20, "a ping to the C loop")
        wait_until(lambda: ping(b.namespace, a.address, size=1444, dont_fragment=True).ok, 5, "a ping")
        sender, receiver = (a, b) if worker_is_sender else (b, a)
        send_stream(sender, receiver, os.urandom(4 << 20))
    finally:
        a.stop()
        b.stop()


def test_big_datagrams_cross_as_fragments(joined: Pair) -> None:
    a, b = joined
    wait_until(lambda: ping(a.namespace, b.address, size=8000, count=3).ok, 5, "a ping")


def test_udp_arrives_whole_and_in_order(joined: Pair) -> None:
    a, b = joined
    with open_in(b.namespace, socket.SOCK_DGRAM) as there, open_in(a.namespace, socket.SOCK_DGRAM) as here:
        there.bind((b.address, 0))
        sent = [os.urandom(size) for size in (0, 1, 1444, 1443, 700, 700, 700, 5, 1444, 3000)]
        for datagram in sent:
            here.sendto(datagram, there.getsockname())
        assert [there.recv(65536) for _ in sent] == sent


def test_udp_super_packets_of_the_sender_are_cut(joined: Pair) -> None:
    a, b = joined
    with open_in(b.namespace, socket.SOCK_DGRAM) as there, open_in(a.namespace, socket.SOCK_DGRAM) as here:
        there.bind((b.address, 0))
        here.setsockopt(socket.IPPROTO_UDP, 103, 1200)  # UDP_SEGMENT
        data = os.urandom(12 * 1200 + 77)
        here.sendto(data, there.getsockname())
        assert b"".join(there.recv(65536) for _ in range(13)) == data


def test_on_the_wire_is_the_bare_packet_with_one_hop_less(hosts: Pair) -> None:
    """The other host is a plain socket here: what it gets is what any implementation would get."""
    a, b = hosts
    with open_in(b.namespace, socket.SOCK_DGRAM) as wire:
        wire.bind((b.underlay, PORT))
        a.start(b, "worker")
        wait_until(lambda: a.ask("state")["peers"], 20, "the peer")
        a.namespace.run(["ping", "-c", "1", "-W", "1", "-t", "33", "-p", "ab", b.address], check=False)
        while True:
            payload, sender = wire.recvfrom(65536)
            if payload[0] >> 4 == 4:
                break
    assert sender == (a.underlay, PORT)
    inner = IP(payload)
    assert (inner.src, inner.dst, inner.ttl, len(payload)) == (a.address, b.address, 32, 84)
    assert inner[ICMP].type == 8
    check = inner.chksum
    del inner.chksum
    assert IP(bytes(inner)).chksum == check


def test_large_segments_are_ordinary_packets_on_the_wire(joined: Pair) -> None:
    """A card without UDP segmentation shows what travels: whole inner packets of the path's size, sound by scapy."""
    a, b = joined
    if shutil.which("ethtool") is None:
        pytest.skip("ethtool is not installed")
    a.namespace.run("ethtool -K eth0 tx-udp-segmentation off gso off")
    with b.namespace.inside():
        sniffer = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(0x0800))
    with sniffer:
        sniffer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
        sniffer.bind(("eth0", 0x0800))
        send_stream(a, b, os.urandom(100_000))
        sniffer.setblocking(False)
        frames = []
        with contextlib.suppress(BlockingIOError):
            while True:
                frames.append(sniffer.recv(65536))
    outer = [IP(frame) for frame in frames]
    tunnelled = [p for p in outer if UDP in p and (p.src, p[UDP].dport) == (a.underlay, PORT)]
    assert {p[UDP].sport for p in tunnelled} == {PORT}
    inner = [bytes(p[UDP].payload) for p in tunnelled]
    full = [data for data in inner if len(data) == 1472]
    assert len(full) > 50 and max(map(len, inner)) == 1472
    for data in full:
        seen = IP(data)
        del seen.chksum, seen[TCP].chksum
        assert bytes(seen) == data


@pytest.mark.parametrize(("ttl", "router"), [(1, "10.5.1.0"), (2, "10.5.2.0")], ids=["on the way out", "on the way in"])
def test_a_packet_at_its_last_hop_is_answered_by_the_router_that_drops_it(joined: Pair, ttl: int, router: str) -> None:
    a, b = joined
    told = a.namespace.run(["ping", "-c", "1", "-W", "20", "-t", str(ttl), b.address], check=False)
    assert f"From {router}" in told and "Time to live exceeded" in told
    wait_until(lambda: ping(a.namespace, b.address).ok, 5, "a ping")


def test_an_address_without_a_peer_is_unreachable_and_counted(joined: Pair) -> None:
    a, _ = joined
    told = a.namespace.run(["ping", "-c", "1", "-W", "20", "10.5.77.1"], check=False)
    assert "Destination Net Unreachable" in told
    assert counters(a)["drop_no_peer"] == 1


def good_packet(a: TunnelHost, b: TunnelHost, **fields: Any) -> bytes:
    return bytes(IP(src=b.address, dst=a.address, **fields) / UDP(sport=1, dport=9) / Raw(b"hello"))


def test_senders_that_are_no_peer_are_dropped_and_counted(joined: Pair) -> None:
    a, b = joined
    before = counters(a)
    b.namespace.run("ip addr add 192.168.9.77/24 dev eth0")
    for source in (("192.168.9.77", PORT), (b.underlay, 0)):
        with open_in(b.namespace, socket.SOCK_DGRAM) as stranger:
            stranger.bind(source)
            stranger.sendto(good_packet(a, b), (a.underlay, PORT))
    wait_until(lambda: counters(a)["drop_unknown_sender"] == 2, 10, "both counted")
    assert counters(a)["rx_packets"] == before["rx_packets"]


def test_what_is_no_packet_is_dropped_and_counted_by_cause(hosts: Pair) -> None:
    a, b = hosts
    a.namespace.run("sysctl -qw net.ipv6.conf.default.disable_ipv6=1")  # or the kernel's own IPv6 would be counted, too
    a.start(b, "worker")
    with open_in(b.namespace, socket.SOCK_DGRAM) as peer, open_in(a.namespace, socket.SOCK_DGRAM) as target:
        peer.bind((b.underlay, PORT))
        target.bind((a.address, 9))
        good = good_packet(a, b)
        odd = {
            "drop_malformed": [b"", b"E", good[:19], bytes(IP(len=999)), b"\x44" + good[1:], b"\x4f" + good[1:]],
            "drop_not_ipv4": [b"\x60" + bytes(60), bytes(40), b"\xff" * 100],
            "drop_ttl_expired": [good_packet(a, b, ttl=1), good_packet(a, b, ttl=0)],
        }
        for packets in odd.values():
            for data in packets:
                peer.sendto(data, (a.underlay, PORT))
        peer.sendto(good + b"trailing bytes", (a.underlay, PORT))
        assert target.recv(100) == b"hello"
    for cause, packets in odd.items():
        assert counters(a)[cause] == len(packets), cause


@pytest.mark.field_problem(34)
def test_a_narrower_path_fragments_outside_and_loses_nothing(joined: Pair) -> None:
    a, b = joined
    a.namespace.run("ip route replace 192.168.9.2/32 dev eth0 mtu 1300")
    wait_until(lambda: ping(a.namespace, b.address, size=1444, dont_fragment=True, count=3).ok, 5, "a ping")
    send_stream(a, b, os.urandom(1 << 20))
    assert counters(a)["drop_send_failed"] == 0


def test_an_idle_worker_uses_no_cpu_and_a_device_that_is_down_costs_none(joined: Pair) -> None:
    a, b = joined

    def idles() -> bool:
        before = a.cpu_seconds()
        threading.Event().wait(1)
        return a.cpu_seconds() - before <= 0.02

    assert wait_until(idles, 15, "an idle worker")
    a.namespace.run("ip link set flannel0 down")
    with open_in(b.namespace, socket.SOCK_DGRAM) as sender:
        for _ in range(20):
            sender.sendto(b"x", (b.address, 1))
    assert wait_until(idles, 15, "an idle worker while the device is down")
    a.namespace.run("ip link set flannel0 up")
    a.namespace.run("ip route replace 10.5.0.0/16 dev flannel0")
    wait_until(lambda: ping(a.namespace, b.address).ok, 10, "a ping after the device came back")
