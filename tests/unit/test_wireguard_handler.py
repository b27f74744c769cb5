"""The WireGuard handler against an engine in memory: what it writes, what it reports, what it leaves alone."""

from __future__ import annotations

import errno
import itertools
import select
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.kernel_state import (
    Change,
    Failure,
    Foreign,
    Key,
    Link,
    Record,
    Scope,
    Wireguard,
    WireguardPeer,
    state_of,
)
from flanneld.dataplane import wireguard
from flanneld.dataplane.handler import Answer
from flanneld.dataplane.wireguard import STALE_SECONDS, WireguardHandler
from flanneld.dataplane.wireguard_device import DeviceState, NotHere, PeerState, PeerWrite, canonical
from flanneld.plan import plan
from tests.testbed.counted import allocated, steps

DEV = "flannel-wg"
LINK = Link(DEV, Wireguard(51820, "private"), mtu=1420)


@dataclass
class MemoryEngine:
    """Keeps devices as a kernel would, and counts what it is asked."""

    name: str = "memory"
    clings_to_source: bool = True
    devices: dict[str, DeviceState] = field(default_factory=dict)
    reads: int = 0
    written: list[PeerWrite] = field(default_factory=list)
    refuse: str = ""

    def create(self, dev: str) -> None:
        self.devices[dev] = DeviceState()

    def holds(self, dev: str, kind: str) -> bool:
        return dev in self.devices

    def read(self, dev: str) -> DeviceState:
        self.reads += 1
        state = self.devices[dev]
        return replace(state, peers={key: replace(peer) for key, peer in state.peers.items()})

    def configure(self, dev: str, private_key: str, listen_port: int) -> None:
        self.devices[dev].private_key, self.devices[dev].listen_port = private_key, listen_port

    def write(self, dev: str, peers: Sequence[PeerWrite]) -> None:
        for peer in peers:
            if peer.public_key == self.refuse:
                raise OSError(errno.EINVAL, f"{dev} does not like {peer.public_key}")
            self.written.append(peer)
            if peer.remove:
                self.devices[dev].peers.pop(peer.public_key, None)
                continue
            have = self.devices[dev].peers.setdefault(peer.public_key, PeerState())
            if peer.endpoint is not None:
                have.endpoint = peer.endpoint
            if peer.allowed_ips is not None:
                have.allowed_ips = peer.allowed_ips
            if peer.keepalive is not None:
                have.keepalive = peer.keepalive
            if peer.preshared_key is not None:
                have.preshared_key = peer.preshared_key or None

    def close(self) -> None:
        pass


class Bench:
    """A handler, its engine and a clock."""

    def __init__(self) -> None:
        self.engine, self.now = MemoryEngine(), 1000.0
        self.handler = WireguardHandler((self.engine,), clock=lambda: self.now, look_seconds=3600)
        self.sources: tuple[str, ...] = ()

    def links(self) -> dict[str, Link]:
        return {name: Link(name, Foreign("wireguard"), 1420) for name in self.engine.devices}

    def observe(self) -> Answer:
        return self.handler.observe(Scope(sources=self.sources), self.links())

    def converge(self, *records: Record) -> list[Change]:
        """One pass; what it changed. A look at everything first, as after a tick."""
        self.handler.invalidate()
        changes = plan(state_of(*records), self.observe(), lambda _: True)
        assert self.handler.apply(changes) == []
        return changes

    def peer(self, key: str) -> PeerState:
        return self.engine.devices[DEV].peers[key]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(wireguard, "check_free", lambda port: None)
    monkeypatch.setattr(wireguard, "listens", lambda port: True)
    made = Bench()
    yield made
    made.handler.close()


def peer(key: str = "p1", endpoint: str = "192.0.2.1:51820", net: str = "10.5.1.0/24", **more: Any) -> WireguardPeer:
    return WireguardPeer(DEV, key, endpoint, (net,), **more)


def test_apply_then_observe_is_what_was_asked(bench: Bench) -> None:
    bench.converge(LINK, peer(), peer("p2", net="10.5.2.0/24", keepalive=25, preshared_key="psk"))
    assert bench.observe() == state_of(LINK, peer(), peer("p2", net="10.5.2.0/24", keepalive=25, preshared_key="psk"))
    assert bench.converge(LINK, peer(), peer("p2", net="10.5.2.0/24", keepalive=25, preshared_key="psk")) == []


def test_nothing_is_read_again_without_a_reason_and_the_answer_is_the_same_object(bench: Bench) -> None:
    bench.converge(LINK, peer())
    first = bench.observe()
    reads = bench.engine.reads
    for _ in range(5):
        assert bench.observe() is first
    assert bench.engine.reads == reads
    bench.handler.invalidate()
    assert bench.observe() is first, "a look that finds nothing new changes nothing"
    assert bench.engine.reads == reads + 1


def test_only_what_differs_is_written(bench: Bench) -> None:
    bench.converge(LINK, peer())
    bench.engine.written.clear()
    bench.converge(LINK, peer(keepalive=25))
    assert bench.engine.written == [PeerWrite("p1", keepalive=25)]
    bench.converge(LINK, peer(keepalive=25, preshared_key="psk"))
    bench.converge(LINK, peer(keepalive=25))
    assert bench.engine.written[1:] == [PeerWrite("p1", preshared_key="psk"), PeerWrite("p1", preshared_key="")]


@pytest.mark.parametrize("what", [steps, allocated])
def test_a_changed_peer_costs_the_same_among_many(what: Callable[[Callable[[], None]], int]) -> None:
    def cost(count: int) -> int:
        bench = Bench()
        bench.converge(LINK, *(peer(f"p{n}", net=f"10.{n >> 8}.{n & 255}.0/24") for n in range(count)))
        before = bench.observe()
        keepalive = itertools.count(1)

        def change() -> None:
            nonlocal before
            wanted = peer("p7", net="10.0.7.0/24", keepalive=next(keepalive))
            assert bench.handler.apply([Change("put", wanted)]) == []
            answer = bench.observe()
            assert answer.differences(before) == {wanted.key}
            before = answer

        found = min(what(change) for _ in range(5))
        bench.handler.close()
        return found

    assert cost(3000) < cost(30) + 3000


@pytest.mark.field_problem(32)
def test_a_roamed_endpoint_with_fresh_handshakes_is_equal(bench: Bench) -> None:
    bench.converge(LINK, peer())
    bench.peer("p1").endpoint, bench.peer("p1").handshake = "198.51.100.9:4444", bench.now
    bench.now += STALE_SECONDS - 1
    assert bench.converge(LINK, peer()) == []
    bench.now += 2
    assert len(bench.converge(LINK, peer())) == 1
    assert bench.peer("p1").endpoint == "192.0.2.1:51820"
    assert bench.converge(LINK, peer()) == [], "pinned once, not for ever"


@pytest.mark.field_problem(32)
def test_an_endpoint_that_never_shook_hands_is_put_back(bench: Bench) -> None:
    bench.converge(LINK, peer())
    bench.peer("p1").endpoint = "198.51.100.9:4444"
    assert len(bench.converge(LINK, peer())) == 1
    assert bench.peer("p1").endpoint == "192.0.2.1:51820"


def test_a_daemon_without_memory_leaves_a_live_roamed_peer_alone(bench: Bench) -> None:
    bench.engine.devices[DEV] = DeviceState("private", 51820)
    bench.engine.devices[DEV].peers["p1"] = PeerState("198.51.100.9:4444", ("10.5.1.0/24",), handshake=bench.now)
    bench.converge(LINK, peer())
    assert bench.peer("p1").endpoint == "198.51.100.9:4444"
    assert bench.converge(LINK, peer()) == []


def test_a_changed_lease_is_followed_though_handshakes_are_fresh(bench: Bench) -> None:
    bench.converge(LINK, peer())
    bench.peer("p1").handshake = bench.now
    bench.converge(LINK, peer(endpoint="192.0.2.7:51820"))
    assert bench.peer("p1").endpoint == "192.0.2.7:51820"


@pytest.mark.field_problem(22)
@pytest.mark.parametrize("clings", [True, False])
def test_a_changed_address_of_ours_is_told_to_an_engine_that_clings_to_the_old_one(bench: Bench, clings: bool) -> None:
    bench.engine.clings_to_source = clings
    bench.sources = ("192.0.2.9",)
    bench.converge(LINK, peer(), peer("p2", net="10.5.2.0/24"))
    bench.peer("p2").endpoint, bench.peer("p2").handshake = "198.51.100.9:4444", bench.now
    assert bench.converge(LINK, peer(), peer("p2", net="10.5.2.0/24")) == []
    bench.engine.written.clear()
    bench.sources = ("192.0.2.10",)
    assert bench.converge(LINK, peer(), peer("p2", net="10.5.2.0/24")) == [], "no record is another one"
    written = {(write.public_key, write.endpoint) for write in bench.engine.written}
    assert written == ({("p1", "192.0.2.1:51820"), ("p2", "198.51.100.9:4444")} if clings else set())
    bench.engine.written.clear()
    assert bench.converge(LINK, peer(), peer("p2", net="10.5.2.0/24")) == [] == bench.engine.written


@pytest.mark.field_problem(34)
def test_another_way_out_is_told_to_an_engine_that_clings_to_the_old_one(bench: Bench) -> None:
    bench.sources = ("192.0.2.9",)
    bench.converge(LINK, peer())
    bench.engine.written.clear()
    bench.handler.forget_sources()
    bench.observe()
    bench.observe()
    assert bench.engine.written == [PeerWrite("p1", endpoint="192.0.2.1:51820")]


@pytest.mark.field_problem(22)
def test_at_the_start_the_address_that_was_used_before_is_not_known_and_left(bench: Bench) -> None:
    bench.engine.devices[DEV] = DeviceState("private", 51820)
    bench.engine.devices[DEV].peers["p1"] = PeerState("198.51.100.9:4444", ("10.5.1.0/24",), handshake=bench.now)
    bench.observe()
    assert bench.engine.written == [], "who only looks writes nothing"
    bench.sources = ("192.0.2.9",)
    bench.observe()
    assert bench.engine.written == [PeerWrite("p1", endpoint="198.51.100.9:4444")]
    bench.observe()
    assert len(bench.engine.written) == 1


@pytest.mark.field_problem(22)
def test_an_engine_that_could_not_be_told_of_our_address_is_told_again(bench: Bench) -> None:
    bench.sources = ("192.0.2.9",)
    bench.converge(LINK, peer())
    bench.sources, bench.engine.refuse = ("192.0.2.10",), "p1"
    with pytest.raises(OSError, match="does not like p1"):
        bench.observe()
    bench.engine.refuse = ""
    bench.engine.written.clear()
    bench.observe()
    assert bench.engine.written == [PeerWrite("p1", endpoint="192.0.2.1:51820")]


def test_one_refused_peer_among_many_is_the_only_failure(bench: Bench) -> None:
    bench.converge(LINK)
    bench.engine.refuse = "p3"
    changes = [Change("put", peer(f"p{n}", net=f"10.5.{n}.0/24")) for n in range(6)]
    (failure,) = bench.handler.apply(changes)
    assert failure == Failure(changes[3], "EINVAL", f"{DEV} does not like p3")
    assert sorted(bench.engine.devices[DEV].peers) == ["p0", "p1", "p2", "p4", "p5"]
    assert {r.public_key for r in bench.observe().values() if isinstance(r, WireguardPeer)} == set(
        bench.engine.devices[DEV].peers
    )


def test_peers_without_their_device_fail_by_name_and_removals_are_done_already(bench: Bench) -> None:
    failures = bench.handler.apply([Change("put", peer()), Change("remove", peer("p2"))])
    assert [(f.change.op, f.cause, f.message) for f in failures] == [
        ("put", "ENODEV", "there is no WireGuard device flannel-wg")
    ]


def test_a_host_without_wireguard_names_all_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    class Missing(MemoryEngine):
        def create(self, dev: str) -> None:
            raise NotHere(errno.ENOENT, f"{self.name} is not installed")

    monkeypatch.setattr(wireguard, "check_free", lambda port: None)
    handler = WireguardHandler((Missing("module"), Missing("program")))
    (failure,) = handler.apply([Change("put", LINK)])
    handler.close()
    assert "module is not installed, and program is not installed; install one of them" in failure.message


def test_a_second_implementation_serves_where_the_first_is_missing(bench: Bench) -> None:
    class Missing(MemoryEngine):
        def create(self, dev: str) -> None:
            raise NotHere(errno.EOPNOTSUPP, "no module")

    bench.handler.close()
    bench.handler = WireguardHandler((Missing("module"), bench.engine), look_seconds=3600)
    bench.converge(LINK)
    bench.handler.invalidate()
    bench.observe()
    assert bench.handler.status()[DEV] == {"engine": "memory", "listen_port": 51820, "peers": 0, "alive": 0}


def test_a_device_that_lost_its_port_differs(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.converge(LINK, peer())
    monkeypatch.setattr(wireguard, "listens", lambda port: False)
    bench.handler.invalidate()
    assert bench.observe()[LINK.key] == replace(LINK, settings=Wireguard(0, "private"))


def test_the_ticker_makes_it_look_by_itself() -> None:
    engine = MemoryEngine(devices={DEV: DeviceState("private", 51820)})
    handler = WireguardHandler((engine,), look_seconds=0.01)
    links = {DEV: Link(DEV, Foreign("wireguard"), 1420, up=False)}
    try:
        assert handler.fileno() is None, "no device, no clock"
        handler.observe(Scope(), links)
        descriptor = handler.fileno()
        assert descriptor is not None
        for _ in range(2):
            reads = engine.reads
            assert select.select([descriptor], [], [], 20)[0]
            handler.observe(Scope(), links)
            assert engine.reads == reads + 1
    finally:
        handler.close()


peers = st.builds(
    lambda n, endpoint, keepalive, psk: peer(
        f"p{n}", f"192.0.2.{endpoint}:51820", f"10.5.{n}.0/24", keepalive=keepalive, preshared_key=psk
    ),
    st.integers(0, 5),
    st.integers(1, 3),
    st.sampled_from([0, 25]),
    st.sampled_from([None, "psk"]),
)
states = st.lists(peers, max_size=6).map(lambda found: {record.key: record for record in found})


@given(st.lists(states, min_size=1, max_size=4))
def test_any_walk_through_states_ends_in_each_of_them(walk: list[dict[Key, WireguardPeer]]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wireguard, "check_free", lambda port: None)
        patch.setattr(wireguard, "listens", lambda port: True)
        bench = Bench()
        try:
            for state in walk:
                bench.converge(LINK, *state.values())
                assert bench.converge(LINK, *state.values()) == []
                assert {k: p.endpoint for k, p in bench.engine.devices[DEV].peers.items()} == {
                    record.public_key: record.endpoint for record in state.values()
                }
        finally:
            bench.handler.close()


def test_allowed_ips_have_one_order() -> None:
    assert canonical(["fc00::/64", "10.5.9.0/24", "10.5.2.0/24"]) == ("10.5.2.0/24", "10.5.9.0/24", "fc00::/64")
