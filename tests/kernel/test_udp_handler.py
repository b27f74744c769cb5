"""The udp backend through the real dataplane: what is applied is what is observed, repaired, adopted and removed."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Any

import pytest

from backends.backend import Host, Underlay
from backends.kernel_state import Change, KernelState, Link, Record, Scope, Tun, UdpPeer, state_of
from backends.udp import Udp
from flanneld.dataplane.dataplane import Dataplane
from flanneld.dataplane.udp import UdpHandler
from flanneld.dataplane.udp_tunnel import control
from flanneld.lab.netns import Namespace, veth
from flanneld.lab.ping import ping
from flanneld.lab.wait import wait_until
from flanneld.plan import plan
from subnet_lease.lease import Lease, LeaseAttrs
from subnet_lease.network_config import NetworkConfig

NETWORK = IPv4Network("10.5.0.0/16")


class Node:
    """One host, with a dataplane that can be thrown away and made anew, as a daemon that restarts does."""

    def __init__(self, namespace: Namespace, number: int) -> None:
        self.namespace, self.number, self.backend = namespace, number, Udp({})
        self.dataplane: Dataplane | None = None
        self.start()

    def start(self) -> None:
        with self.namespace.inside():
            self.handler = UdpHandler()
            self.dataplane = Dataplane([self.handler])

    def stop(self) -> None:
        if self.dataplane is not None:
            self.dataplane.close()
            self.dataplane = None

    @property
    def host(self) -> Host:
        local: Any = {4: IPv4Address(f"192.168.9.{self.number}")}
        config = NetworkConfig(network=NETWORK, backend_type="udp")
        return Host(Underlay("eth0", 1500, local, local), config, {4: IPv4Network(f"10.5.{self.number}.0/24")})

    @property
    def lease(self) -> Lease:
        return Lease(IPv4Network(f"10.5.{self.number}.0/24"), None, LeaseAttrs(IPv4Address(f"192.168.9.{self.number}")))

    def desired(self, *peers: Lease) -> dict[Any, Record]:
        records: list[Record] = [*self.backend.host_state(self.host)]
        for peer in peers:
            records += self.backend.peer_state(self.host, peer)
        return state_of(*records)

    def one_pass(self, desired: KernelState) -> list[Change]:
        """Observe, plan, apply; the changes that were needed."""
        assert self.dataplane is not None
        with self.namespace.inside():
            seen = self.dataplane.observe(Scope(frozenset({"flannel0"}), (str(NETWORK),)))
            changes = plan(desired, seen.state, lambda record: getattr(record, "protocol", None) != 2)
            assert self.dataplane.apply(changes) == []
        return changes

    def converge(self, desired: KernelState) -> None:
        wait_until(lambda: not self.one_pass(desired), 20, "no more changes")

    def worker(self) -> int:
        return int(self.handler.status()["flannel0"]["worker"])

    def ask(self, op: str) -> dict[str, Any]:
        with self.namespace.inside(), contextlib.closing(control.Client("flannel0")) as client:
            return client.ask(op)

    def end_processes(self) -> None:
        for pid in self.namespace.run(["ip", "netns", "pids", self.namespace.name], check=False).split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)


@pytest.fixture
def nodes() -> Iterator[tuple[Node, Node]]:
    with contextlib.ExitStack() as stack:
        left, right = (stack.enter_context(Namespace(f"udph{side}")) for side in "ab")
        veth(left, "eth0", right, "eth0")
        made = []
        for number, namespace in ((1, left), (2, right)):
            namespace.run(f"ip addr add 192.168.9.{number}/24 dev eth0")
            node = Node(namespace, number)
            stack.callback(node.end_processes)
            stack.callback(node.stop)
            made.append(node)
        yield made[0], made[1]


@pytest.fixture
def joined(nodes: tuple[Node, Node]) -> tuple[Node, Node]:
    a, b = nodes
    a.converge(a.desired(b.lease))
    b.converge(b.desired(a.lease))
    wait_until(lambda: ping(a.namespace, "10.5.2.0").ok, 20, "a ping")
    return nodes


def test_what_was_applied_is_what_is_observed_and_idle_writes_nothing(joined: tuple[Node, Node]) -> None:
    a, b = joined
    assert a.one_pass(a.desired(b.lease)) == []
    assert a.handler.status()["flannel0"]["peers"] == 1
    with a.namespace.inside():
        counted = a.handler.counters()
        assert counted["tx_packets"] > 0 and counted["drop_unknown_sender"] == 0
        assert a.handler.counters("flannel9") == {}
    a.dataplane.invalidate()  # type: ignore[union-attr]
    assert a.one_pass(a.desired(b.lease)) == []


@pytest.mark.field_problem(1)
@pytest.mark.parametrize("sig", [signal.SIGKILL, signal.SIGTERM])
def test_a_worker_that_ends_wakes_the_daemon_and_comes_back_with_its_peers(
    joined: tuple[Node, Node], sig: signal.Signals
) -> None:
    a, b = joined
    before = a.worker()
    os.kill(before, sig)
    a.dataplane.wait(10)  # type: ignore[union-attr]
    a.converge(a.desired(b.lease))
    assert a.worker() != before
    assert len(a.ask("state")["peers"]) == 1
    wait_until(lambda: ping(a.namespace, "10.5.2.0").ok, 10, "a ping after the repair")


@pytest.mark.field_problem(2)
def test_a_deleted_device_comes_back(joined: tuple[Node, Node]) -> None:
    a, b = joined
    a.namespace.run("ip link del flannel0")
    a.converge(a.desired(b.lease))
    wait_until(lambda: ping(a.namespace, "10.5.2.0").ok, 10, "a ping after the repair")


def test_a_peer_that_leaves_or_moves_is_followed_without_a_new_worker(joined: tuple[Node, Node]) -> None:
    a, b = joined
    before = a.worker()
    moved = replace(b.lease, attrs=LeaseAttrs(IPv4Address("192.168.9.9")))
    a.converge(a.desired(moved))
    assert a.ask("state")["peers"] == [["10.5.2.0/24", "192.168.9.9", 8285]]
    a.converge(a.desired())
    assert a.ask("state")["peers"] == []
    a.converge(a.desired(b.lease))
    assert a.worker() == before
    wait_until(lambda: ping(a.namespace, "10.5.2.0").ok, 10, "a ping")


@pytest.mark.field_problem(28)
def test_a_daemon_that_restarts_adopts_the_worker_and_writes_nothing(joined: tuple[Node, Node]) -> None:
    a, b = joined
    before = a.worker()
    a.stop()
    wait_until(lambda: ping(a.namespace, "10.5.2.0", count=3).ok, 5, "a ping")
    a.start()
    assert a.one_pass(a.desired(b.lease)) == []
    assert a.worker() == before


@pytest.mark.field_problem(28)
def test_a_worker_of_another_version_is_replaced(joined: tuple[Node, Node], monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = joined
    before = a.worker()
    a.stop()
    # The daemon, not the worker, is the odd one here: it takes every version but one that it never sees for wrong.
    monkeypatch.setattr("flanneld.dataplane.udp.VERSION", -1)
    a.start()
    with a.namespace.inside():
        seen = a.dataplane.observe(Scope(frozenset({"flannel0"}), (str(NETWORK),)))  # type: ignore[union-attr]
        link = next(record for record in seen.state.values() if isinstance(record, Link))
        assert not isinstance(link.settings, Tun)
        assert not any(isinstance(record, UdpPeer) for record in seen.state.values())
    monkeypatch.undo()
    with a.namespace.inside():
        assert a.handler.apply([Change("put", next(iter(a.desired().values())), link)]) == []
    a.converge(a.desired(b.lease))
    assert a.worker() != before
    wait_until(lambda: ping(a.namespace, "10.5.2.0").ok, 10, "a ping through the new worker")


@pytest.mark.field_problem(22)
def test_another_address_or_port_is_taken_without_a_new_worker(joined: tuple[Node, Node]) -> None:
    a, b = joined
    before = a.worker()
    a.backend = b.backend = Udp({"Port": 8286})
    for node, peer in ((a, b), (b, a)):
        node.converge(node.desired(peer.lease))
    assert a.worker() == before
    assert a.ask("state")["settings"]["port"] == 8286
    wait_until(lambda: ping(a.namespace, "10.5.2.0").ok, 10, "a ping over the new port")


def test_an_underlay_of_another_name_is_taken_without_a_new_worker(joined: tuple[Node, Node]) -> None:
    a, b = joined
    worker, desired = a.worker(), a.desired(b.lease)
    a.namespace.run("ip -batch -", stdin="link set eth0 down\nlink set eth0 name lan0\nlink set lan0 up")
    link = next(record for record in desired.values() if isinstance(record, Link))
    assert isinstance(link.settings, Tun)
    a.converge({**desired, link.key: replace(link, settings=replace(link.settings, underlay="lan0"))})
    assert a.worker() == worker
    wait_until(lambda: ping(a.namespace, "10.5.2.0").ok, 20, "a ping by lan0")


def test_a_port_in_use_is_named_and_nothing_is_lost(joined: tuple[Node, Node]) -> None:
    import socket

    a, b = joined
    with a.namespace.inside():
        taken = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        taken.bind(("192.168.9.1", 9999))
        link = next(iter(a.desired().values()))
        assert isinstance(link, Link) and isinstance(link.settings, Tun)
        wanted = replace(link, settings=replace(link.settings, port=9999))
        with taken:
            failures = a.handler.apply([Change("put", wanted, link)])
    assert [f.message for f in failures] == [
        "cannot bind UDP 192.168.9.1:9999 on eth0: another process uses that port; stop it, "
        "or set another Port in the network configuration"
    ]
    wait_until(lambda: ping(a.namespace, "10.5.2.0").ok, 5, "a ping")
    assert a.one_pass(a.desired(b.lease)) == []


def test_an_address_that_is_not_here_keeps_the_worker_from_starting_and_is_named(nodes: tuple[Node, Node]) -> None:
    a, _ = nodes
    wanted = Link("flannel0", Tun("192.168.9.200", 8285, "eth0", str(NETWORK)), 1472)
    with a.namespace.inside():
        (failure,) = a.handler.apply([Change("put", wanted)])
    assert "192.168.9.200:8285" in failure.message and "eth0 does not have that address" in failure.message


def test_a_device_of_another_kind_is_left_alone(nodes: tuple[Node, Node]) -> None:
    a, _ = nodes
    a.namespace.run("ip link add flannel0 type bridge")
    with a.namespace.inside():
        seen = a.dataplane.observe(Scope(frozenset({"flannel0"}), (str(NETWORK),)))  # type: ignore[union-attr]
        failures = a.dataplane.apply(plan(a.desired(), seen.state, lambda _: True))  # type: ignore[union-attr]
    assert any("of kind bridge stands in the way" in failure.message for failure in failures)
    assert "flannel0" in a.namespace.run("ip link show type bridge")


@pytest.mark.field_problem(18)
def test_five_thousand_peers_come_go_and_are_adopted(nodes: tuple[Node, Node]) -> None:
    a, _ = nodes
    wanted = a.desired()
    crowd = state_of(
        *(
            UdpPeer("flannel0", f"10.{n >> 8}.{n & 255}.0/24", f"172.16.{n >> 8}.{n & 255}", 8285)
            for n in range(1, 5001)
        )
    )
    a.converge(wanted | crowd)
    a.stop()
    a.start()
    assert a.one_pass(wanted | crowd) == []
    assert len(a.ask("state")["peers"]) == 5000
    a.converge(wanted)
    assert a.ask("state")["peers"] == []


@pytest.mark.field_problem(42)
def test_removal_ends_the_worker_and_its_device(joined: tuple[Node, Node]) -> None:
    a, _ = joined
    worker = a.worker()
    a.converge({})
    assert "flannel0" not in a.namespace.run("ip -brief link")
    wait_until(lambda: not Path(f"/proc/{worker}").exists(), 10, "the worker's end")


def test_a_left_over_device_without_a_worker_is_removed(joined: tuple[Node, Node]) -> None:
    a, _ = joined
    os.kill(a.worker(), signal.SIGKILL)
    a.converge({})
    assert "flannel0" not in a.namespace.run("ip -brief link")
