"""WireGuard for real: two hosts, the records of the backend, and what stands, adopts, roams and goes."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from backends.kernel_state import Change, Link, Scope, WireguardPeer, state_of
from flanneld.dataplane.wireguard_device import PeerWrite
from flanneld.wireguard_key import clamped
from tests.kernel.wireguard_lab import DEVICES, Node, engine, poll, two_nodes

Pair = tuple[Node, Node]


@pytest.fixture(params=["wireguard-go", "kernel"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def nodes(kind: str, tmp_path: Path) -> Iterator[Pair]:
    with two_nodes(lambda: engine(kind, tmp_path)) as pair:
        yield pair


@pytest.fixture
def joined(nodes: Pair) -> Pair:
    a, b = nodes
    a.converge(a.desired(b.lease))
    b.converge(b.desired(a.lease))
    a.sees("10.5.3.0")
    return nodes


def pid_of(node: Node) -> int:
    """wireguard-go's process of flannel-wg."""
    for pid in node.namespace.run(["ip", "netns", "pids", node.namespace.name]).split():
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        if words[0].endswith(b"wireguard-go") and words[1] == b"flannel-wg":
            return int(pid)
    raise AssertionError("no wireguard-go for flannel-wg")


def test_full_size_packets_pass_both_ways_in_both_families(joined: Pair) -> None:
    a, b = joined
    for node, v4, v6 in ((a, "10.5.3.0", "fc00:0:0:3::"), (b, "10.5.2.0", "fc00:0:0:2::")):
        node.sees(v4)
        node.sees(v6)


def test_what_was_applied_is_what_is_observed_and_idle_writes_nothing(joined: Pair, kind: str) -> None:
    a, b = joined
    desired = a.desired(b.lease)
    assert a.one_pass(desired) == []
    assert a.handler is not None
    a.handler.invalidate()
    a.one_pass(desired)
    assert a.handler.status() == {
        "flannel-wg": {"engine": kind, "listen_port": 51820, "peers": 1, "alive": 1},
        "flannel-wg-v6": {"engine": kind, "listen_port": 51821, "peers": 1, "alive": 0},
    }


def test_nothing_travels_in_the_clear(joined: Pair) -> None:
    a, b = joined
    with b.namespace.inside():
        wire = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x0003))
    with wire:
        wire.bind(("eth0", 0x0003))
        wire.settimeout(0.2)
        a.namespace.run("ping -c 3 -i 0.05 -p c0ffee -s 300 10.5.3.0")
        seen: list[bytes] = []
        while len(seen) < 500:
            try:
                seen.append(wire.recv(2048))
            except TimeoutError:
                break
    tunnel = [packet for packet in seen if (51820).to_bytes(2, "big") in packet[34:38]]
    assert len(tunnel) >= 6
    assert not any(bytes.fromhex("c0ffee" * 3) in packet for packet in seen)


@pytest.mark.parametrize("mode", ["auto", "ipv4", "ipv6"])
def test_one_device_for_both_families(kind: str, tmp_path: Path, mode: str) -> None:
    with two_nodes(lambda: engine(kind, tmp_path), {"Mode": mode, "PSK": "A" * 42 + "8="}) as (a, b):
        for node, peer in ((a, b), (b, a)):
            node.converge(node.desired(peer.lease))
        a.sees("10.5.3.0")
        b.sees("fc00:0:0:2::")
        assert "flannel-wg-v6" not in a.namespace.run("ip link")


@pytest.mark.field_problem(28)
def test_a_restarted_daemon_finds_all_in_place(joined: Pair) -> None:
    a, b = joined
    a.stop()
    a.sees("10.5.3.0")  # the device does not need the daemon
    a.start()
    assert a.one_pass(a.desired(b.lease)) == []
    a.sees("10.5.3.0")


def test_a_killed_wireguard_go_is_replaced(joined: Pair, kind: str) -> None:
    if kind == "kernel":
        pytest.skip("the kernel's module has no process")
    a, b = joined
    os.kill(pid_of(a), signal.SIGKILL)
    poll(lambda: "flannel-wg:" not in a.namespace.run("ip link"), "its device goes with it")
    a.converge(a.desired(b.lease))
    a.sees("10.5.3.0")
    b.sees("10.5.2.0")


@pytest.mark.field_problem(2)
def test_a_deleted_device_comes_back_with_all_that_was_on_it(joined: Pair) -> None:
    a, b = joined
    a.namespace.run("ip link del flannel-wg")
    a.converge(a.desired(b.lease))
    a.sees("10.5.3.0")


@pytest.mark.field_problem(32)
def test_peers_equal_leases(joined: Pair) -> None:
    a, b = joined
    stranger = PeerWrite("B" * 42 + "A=", endpoint="192.168.64.9:1", allowed_ips=("10.5.9.0/24",))
    (own,) = a.peers().values()
    with a.namespace.inside():
        a.engines[0].write("flannel-wg", [stranger, PeerWrite(own.public_key, remove=True)])
    changes = poll(lambda: a.one_pass(a.desired(b.lease)), "the alteration is noticed without being told")
    assert {(change.op, change.record.key[2]) for change in changes} == {
        ("put", own.public_key),
        ("remove", stranger.public_key),
    }
    a.sees("10.5.3.0")
    a.converge(a.desired())
    assert a.peers() == {}


@pytest.mark.field_problem(32)
def test_a_roamed_endpoint_is_left_while_fresh_and_put_back_when_stale(joined: Pair) -> None:
    a, b = joined
    b.namespace.run("ip addr add 192.168.64.77/24 dev eth0")
    desired = a.desired(b.lease)
    (peer,) = a.peers().values()
    with a.namespace.inside():
        a.engines[0].write("flannel-wg", [PeerWrite(peer.public_key, endpoint="192.168.64.77:51820")])

    def endpoint() -> str:
        with a.namespace.inside():
            return str(a.engines[0].read("flannel-wg").peers[peer.public_key].endpoint)

    a.sees("10.5.3.0")
    assert_quiet(a, desired)
    a.stop()
    a.start()
    assert_quiet(a, desired, "a daemon without memory does not disturb it, either", known=False)
    assert endpoint() == "192.168.64.77:51820"
    real = a.now
    a.now = lambda: real() + 200
    changes = poll(lambda: a.one_pass(desired), "put back when the handshake is stale")
    assert [change.record.key[2] for change in changes] == [peer.public_key]
    assert endpoint() == "192.168.64.3:51820"
    assert_quiet(a, desired)


def assert_quiet(node: Node, desired: Any, why: str = "no endless rewriting", known: bool = True) -> None:
    """Several looks at the device lead to no change; the first pass of a new daemon may take note of an endpoint."""
    assert node.handler is not None
    if not known:
        node.one_pass(desired)
    for _ in range(3):
        node.handler.invalidate()
        assert node.one_pass(desired) == [], why


def test_a_lease_with_a_new_address_is_followed_at_once(joined: Pair) -> None:
    a, b = joined
    b.namespace.run("ip addr add 192.168.64.77/24 dev eth0")
    moved = {
        key: replace(record, endpoint="192.168.64.77:51820")
        if isinstance(record, WireguardPeer) and record.dev == "flannel-wg"
        else record
        for key, record in a.desired(b.lease).items()
    }
    a.converge(moved)
    assert list(a.peers()) == ["192.168.64.77:51820"]
    a.sees("10.5.3.0")


def test_a_new_key_of_a_peer_leaves_no_old_peer(joined: Pair) -> None:
    a, b = joined
    b.key = clamped(bytes(range(32)))
    a.converge(a.desired(b.lease))
    b.converge(b.desired(a.lease))
    assert len(a.peers()) == 1
    a.sees("10.5.3.0")


def test_removal_ends_the_program_and_its_socket(joined: Pair, kind: str) -> None:
    a, _ = joined
    pid = pid_of(a) if kind == "wireguard-go" else 0
    a.converge({})
    assert not any(device in a.namespace.run("ip link") for device in DEVICES)
    if pid:
        poll(lambda: not Path(f"/proc/{pid}").exists(), "wireguard-go ends")


def test_a_taken_port_is_named(nodes: Pair) -> None:
    a, _ = nodes
    with a.namespace.inside(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as squatter:
        squatter.bind(("", 51820))
        failures = put_devices(a)
    assert [failure.cause for failure in failures] == ["EADDRINUSE"]
    assert "UDP port 51820 is taken" in failures[0].message
    a.converge(a.desired())


def test_a_device_of_another_kind_in_the_way_is_named_and_left(nodes: Pair) -> None:
    a, _ = nodes
    a.namespace.run("ip link add flannel-wg type bridge")
    with a.namespace.inside():
        failures = put_devices(a)
    assert "a device flannel-wg of kind bridge stands in the way" in failures[0].message
    assert "ip link del flannel-wg" in failures[0].message
    assert "bridge" in a.namespace.run("ip -d link show flannel-wg")


def put_devices(node: Node) -> list[Any]:
    assert node.dataplane is not None
    seen = node.dataplane.observe(Scope(DEVICES)).state
    links = [record for record in node.desired().values() if isinstance(record, Link)]
    return node.dataplane.apply([Change("put", link, state_of(*seen.values()).get(link.key)) for link in links])


def test_a_socket_of_another_namespace_is_never_spoken_to(joined: Pair, kind: str) -> None:
    if kind == "kernel":
        pytest.skip("the kernel's module has no socket")
    a, b = joined
    with b.namespace.inside():
        b.engines[0].configure("flannel-wg", b.key, 51820)
    b.stop()
    b.remove_devices()
    with b.namespace.inside():
        poll(lambda: not b.engines[0].holds("flannel-wg", "tun"), "gone here, though the other host's has its name")
        with pytest.raises(OSError, match="does not answer for flannel-wg"):
            b.engines[0].read("flannel-wg")
    a.sees("192.168.64.3")
    assert len(a.peers()) == 1


def test_no_key_shows_in_the_process_table(joined: Pair, kind: str) -> None:
    if kind == "kernel":
        pytest.skip("the kernel's module has no process")
    a, _ = joined
    pid = pid_of(a)
    shown = Path(f"/proc/{pid}/cmdline").read_bytes() + Path(f"/proc/{pid}/environ").read_bytes()
    assert a.key.encode() not in shown
