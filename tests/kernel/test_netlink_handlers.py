"""Handlers beside rtnetlink: whose change is whose, whose Link settings count, what wakes; and races with others."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import pytest
from pyroute2 import IPRoute

from backends.kernel_state import (
    Change,
    Failure,
    FdbEntry,
    Foreign,
    Kind,
    Link,
    Neighbour,
    Record,
    Route,
    Scope,
    Wireguard,
    WireguardPeer,
)
from flanneld.dataplane import netlink
from flanneld.dataplane.dataplane import Dataplane
from flanneld.dataplane.handler import Answer
from flanneld.dataplane.wire import RTM_GETROUTE, RTMSG
from tests.kernel.netlink_host import DEV, HOST, Host, open_host, peer, peer6
from tests.testbed.counted import steps

WG = Link("flannel-wg", Wireguard(51820, "a key"), 1420)


class Tunnels:
    """Stands in for the WireGuard handler: its devices are bridges, its peers are remembered."""

    def __init__(self, host_ip: Host | None = None) -> None:
        self.host = host_ip
        self.records = Answer()
        self.ready, self.signal = os.pipe()
        self.invalidated = 0
        self.closed = False

    def handles(self, record: Record) -> bool:
        return isinstance(record, WireguardPeer) or (
            isinstance(record, Link) and isinstance(record.settings, Wireguard)
        )

    def observe(self, scope: Scope, links: Mapping[str, Link]) -> Answer:
        self.links = dict(links)
        return self.records

    def apply(self, changes: Sequence[Change]) -> list[Failure]:
        assert self.host is not None
        for change in changes:
            record = change.record
            if isinstance(record, WireguardPeer) and record.keepalive:
                return [Failure(change, "EINVAL", "this peer cannot be")]
            if change.op == "remove":
                self.records = self.records.with_changes({record.key: None})
                continue
            if isinstance(record, Link) and record.name not in self.links:
                self.host.ip(f"link add {record.name} type bridge")
            self.records = self.records.with_changes({record.key: record})
        return []

    def fileno(self) -> int:
        return self.ready

    def invalidate(self) -> None:
        self.invalidated += 1

    def close(self) -> None:
        os.close(self.ready)
        os.close(self.signal)
        self.closed = True


@pytest.fixture
def host() -> Iterator[Host]:
    with open_host("handlers") as host:
        yield host


@pytest.fixture
def tunnels(host: Host) -> Tunnels:
    handler = Tunnels(host)
    host.dataplane.close()
    host.dataplane = Dataplane([handler])
    return handler


def test_a_handlers_device_gets_its_mtu_and_comes_up(host: Host, tunnels: Tunnels) -> None:
    assert host.put(WG) == []
    seen = host.observe()
    link = seen.state[WG.key]
    assert isinstance(link, Link)
    assert replace(link, mac=None, tx_checksum=None) == WG
    assert tunnels.links["flannel-wg"].settings == Foreign("bridge")
    host.ip("link set flannel-wg mtu 1300")
    seen = host.observe()
    assert seen.changed == {WG.key}
    changed = seen.state[WG.key]
    assert isinstance(changed, Link) and (changed.mtu, changed.settings) == (1300, WG.settings)
    assert host.dataplane.apply([Change("remove", WG, WG)]) == []
    assert WG.key not in host.fresh()
    assert "flannel-wg" not in host.ip("link")


def test_a_handlers_records_come_and_go(host: Host, tunnels: Tunnels) -> None:
    peers = [WireguardPeer("flannel-wg", f"key{n}", "192.0.2.1:51820", ("10.5.1.0/24",)) for n in range(3)]
    assert host.put(WG, *peers, *HOST) == []
    host.observe()
    assert all(host.observe().state[p.key] == p for p in peers)
    (failure,) = host.put(replace(peers[0], keepalive=5))
    assert failure.message == "this peer cannot be"
    altered = replace(peers[1], endpoint="192.0.2.9:1")
    tunnels.records = tunnels.records.with_changes({peers[1].key: altered, peers[2].key: None})
    seen = host.observe()
    assert seen.changed == {peers[1].key, peers[2].key}
    assert peers[2].key not in seen.state and seen.state[peers[1].key] == altered
    assert host.observe().changed == frozenset()


def test_one_of_a_handlers_records_is_learnt_without_a_look_at_the_others(host: Host, tunnels: Tunnels) -> None:
    def cost(count: int) -> int:
        peers = [WireguardPeer("flannel-wg", f"key{n}", "192.0.2.1:51820", ()) for n in range(count)]
        tunnels.records = Answer({p.key: p for p in peers})
        host.observe()
        found = []
        for keepalive in range(1, 6):
            altered = replace(peers[7], keepalive=keepalive)
            tunnels.records = tunnels.records.with_changes({altered.key: altered})
            found.append(steps(host.observe))
            assert host.observe().state[altered.key] == altered
        return min(found)

    assert cost(3000) < cost(30) + 1000


def test_a_handlers_descriptor_ends_the_wait(host: Host, tunnels: Tunnels) -> None:
    host.observe()
    host.quiet()
    begin = time.monotonic()
    os.write(tunnels.signal, b"!")
    host.dataplane.wait(30)
    assert time.monotonic() - begin < 10
    host.dataplane.invalidate()
    assert tunnels.invalidated == 1
    host.dataplane.close()
    host.dataplane.close()
    assert tunnels.closed


@pytest.mark.field_problem(18)
def test_a_storm_of_others_changes_ends_exact(host: Host) -> None:
    """Somebody adds and removes what is ours while we write; at the end the mirror is the kernel."""
    host.establish(*(record for number in range(1, 100) for record in peer(number)))
    stop = threading.Event()
    chance = random.Random(7)

    def disturb() -> None:
        while not stop.is_set():
            lines = []
            for number in chance.sample(range(1, 150), 40):
                lines.append(f"route replace 10.5.{number}.0/24 via 10.5.{number}.0 dev {DEV} onlink")
                lines.append(
                    f"neigh replace 10.5.{number}.0 lladdr 02:00:00:00:00:{number:02x} dev {DEV} nud permanent"
                )
                lines.append(f"route del 10.5.{chance.randrange(1, 150)}.0/24")
                lines.append(f"neigh del 10.5.{chance.randrange(1, 150)}.0 dev {DEV}")
            host.ns.run("ip -force -batch -", stdin="\n".join(lines), check=False)
            host.ip(f"link set {DEV} down")
            host.ip(f"link set {DEV} up")

    thread = threading.Thread(target=disturb)
    thread.start()
    try:
        for round_ in range(15):
            for number in range(1, 100):
                op = "put" if (number + round_) % 3 else "remove"
                host.dataplane.apply([Change(op, record) for record in peer(number)])  # type: ignore[arg-type]
            host.observe()
    finally:
        stop.set()
        thread.join()
    host.quiet()
    seen = dict(host.observe().state)
    assert seen == host.fresh()


def test_our_reading_of_real_dumps_is_pyroute2s(host: Host) -> None:
    records = [record for number in range(1, 30) for record in (*peer(number), *peer6(number))]
    host.establish(*records)
    host.ip("route add 10.5.77.0/24 via 192.168.7.5 metric 77 src 192.168.7.1")
    state = host.fresh()
    with IPRoute() as theirs:
        names = {link["index"]: link.get("ifname") for link in theirs.get_links()}
        routes = {
            (f"{r.get('dst')}/{r['dst_len']}", names.get(r.get("oif")), r.get("gateway"), r.get("prefsrc"), r["proto"])
            for r in theirs.get_routes(table=254)
            if r["dst_len"] and str(r.get("dst")).startswith(("10.5.", "fd05:"))
        }
        neighbours = {
            (names[n["ifindex"]], n.get("dst"), n.get("lladdr"))
            for n in (*theirs.get_neighbours(family=2), *theirs.get_neighbours(family=10))
            if n["state"] & 0x80 and names[n["ifindex"]].startswith("flannel")
        }
        fdb = {
            (names[n["ifindex"]], n.get("lladdr"), n.get("dst"))
            for n in theirs.fdb("dump")
            if n["state"] & 0x80 and n.get("dst") and names[n["ifindex"]].startswith("flannel")
        }
    assert {(r.dst, r.dev, r.via, r.src, r.protocol) for r in state.values() if isinstance(r, Route)} == routes
    assert {(r.dev, r.dst, r.mac) for r in state.values() if isinstance(r, Neighbour)} == neighbours
    assert {(r.dev, r.mac, r.dst) for r in state.values() if isinstance(r, FdbEntry)} == fdb


def test_an_interrupted_dump_is_asked_for_again(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = netlink.Netlink()
    try:
        whole = asked._dump_once
        answers = iter([False, False, True])
        tries = []

        def interrupted(kind: int, body: bytes) -> tuple[list[bytes], bool]:
            tries.append(kind)
            return whole(kind, body)[0], next(answers)

        monkeypatch.setattr(asked, "_dump_once", interrupted)
        assert asked.dump(RTM_GETROUTE, RTMSG.pack(2, 0, 0, 0, 254, 0, 0, 0, 0))
        assert len(tries) == 3
    finally:
        asked.close()


def test_while_looking_fails_waiting_waits(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    host.observe()

    def fails(*_: object) -> list[bytes]:
        raise OSError(12, "no memory")

    with monkeypatch.context() as patched:
        patched.setattr(netlink.Netlink, "dump", fails)
        host.dataplane.invalidate()
        with pytest.raises(OSError, match="no memory"):
            host.observe()
        begin = time.monotonic()
        host.dataplane.wait(0.3)
        assert time.monotonic() - begin >= 0.3
    assert host.observe().changed is None
    assert (Kind.LINK, DEV) not in host.observe().state
