"""What the keeper of our lease does when something else is wrong, against a store that exists only here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network, IPv6Network
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from backends.kernel_state import Interface, InterfaceAddress, RouteLookup
from flanneld.board import Board
from flanneld.lease_keeper import LeaseKeeper
from flanneld.options import parse
from flanneld.status import Health
from flanneld.underlay import View
from subnet_lease.lease import Lease, LeaseAttrs, LeaseSnapshot, NodeHints
from subnet_lease.network_config import NetworkConfig, parse_network_config, validate_for_allocation
from subnet_lease.persistent_map import PersistentMap
from subnet_lease.store import ConfigInvalid, LeaseLost, LeaseRequest, StoreUnavailable


class MemoryStore:
    """Hands out one lease; ``broken`` is raised by every call, ``invalid`` by whoever reads the configuration."""

    def __init__(self, config: str) -> None:
        self.config = config
        self.broken: Exception | None = None
        self.renewals = 0
        self.claims = 0
        self.connections = 1

    def _answer(self) -> None:
        if self.broken is not None:
            raise self.broken

    def read_config(self) -> NetworkConfig:
        self._answer()
        return validate_for_allocation(parse_network_config(self.config))

    def hints(self) -> NodeHints:
        return NodeHints()

    def find_own(self, request: LeaseRequest) -> Lease | None:
        self._answer()
        return None

    def acquire(self, config: NetworkConfig, request: LeaseRequest) -> Lease:
        self._answer()
        self.claims += 1
        attrs = replace(request.attrs, node=request.identity)
        v6 = IPv6Network("fd05:0:0:7::/64") if config.network_of(6) else None
        return Lease(IPv4Network("10.5.7.0/24"), v6, attrs, revision=self.claims, store_ref=1)

    def renew(self, lease: Lease) -> float:
        self._answer()
        self.renewals += 1
        return 0.0

    def publish(self, lease: Lease, attrs: object) -> Lease:
        raise AssertionError("nothing to publish")

    def reconnect(self) -> None:
        self.connections += 1


NETWORK = '{"Network":"10.5.0.0/16"}'


class Node:
    """A keeper with one interface, stepped by hand."""

    def __init__(self, directory: Path, store: MemoryStore) -> None:
        options, _ = parse([f"--subnet-file={directory / 'subnet.env'}", "--node-name=n"], {})
        self.store, self.board, self.health = store, Board(), Health()
        self.board.view = view()
        self.keeper = LeaseKeeper(options, store, self.board, self.health, lambda _: None)  # type: ignore[arg-type]

    def step(self) -> bool:
        """Whether the step went well."""
        return not self.keeper._try_step()[1]

    def show(self, config: str) -> None:
        """As the watch would: a new configuration beside our lease."""
        lease = self.board.lease
        assert lease is not None
        parsed = validate_for_allocation(parse_network_config(config))
        self.board.snapshot = LeaseSnapshot(parsed, PersistentMap({lease.key: lease}), lease.revision)


def view(*, mtu: int = 1500, up: bool = True, address: str = "192.168.9.2") -> View:
    addresses = (InterfaceAddress(f"{address}/24"),)
    eth0 = Interface("eth0", 2, mtu=mtu, mac="02:00:00:00:00:02", up=up, addresses=addresses)
    return View((eth0,), {4: (RouteLookup("eth0", None, "192.168.9.2"),)} if up else {})


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    node = Node(tmp_path, MemoryStore(NETWORK))
    assert node.step()
    assert node.board.standing is not None
    assert node.board.lease is not None and node.board.lease.attrs.public_ip == IPv4Address("192.168.9.2")
    yield node


def spoil_backend(node: Node) -> None:
    node.show('{"Network":"10.5.0.0/16","Backend":{"Type":"nonsense"}}')


def spoil_network(node: Node) -> None:
    node.show('{"Network":"10.9.0.0/16"}')


def spoil_reload(node: Node) -> None:
    node.store.config = "{"
    node.board.reload = True


def spoil_interface(node: Node) -> None:
    node.board.view = view(up=False)


def spoil_mtu(node: Node) -> None:
    node.board.view = view(mtu=100)


@pytest.mark.field_problem(11)
@pytest.mark.parametrize(
    ("spoil", "condition"),
    [
        (spoil_backend, "config"),
        (spoil_network, "config"),
        (spoil_reload, "config"),
        (spoil_mtu, "config"),
        (spoil_interface, "underlay"),
    ],
)
def test_the_lease_is_renewed_whatever_else_is_wrong(node: Node, spoil, condition: str) -> None:
    standing, renewals = node.board.standing, node.store.renewals
    spoil(node)
    for _ in range(3):
        assert not node.step()
    assert node.health.reason(condition)
    assert node.board.standing is standing, "the old data path stays"
    assert node.store.renewals > renewals, "an expired lease is free for another node"


@pytest.mark.field_problem(22)
def test_connections_from_an_address_that_is_gone_are_left_before_the_new_one_is_published(node: Node) -> None:
    published: list[int] = []

    def publish(lease: Lease, attrs: LeaseAttrs) -> Lease:
        published.append(node.store.connections)
        return replace(lease, attrs=attrs)

    node.store.publish = publish  # type: ignore[method-assign]
    assert node.step() and node.store.connections == 1
    node.board.view = view(address="192.168.9.77")
    assert node.step() and node.step()
    assert published == [2] and node.store.connections == 2
    assert node.board.standing is not None
    assert node.board.standing.host.underlay.local[4] == IPv4Address("192.168.9.77")


def test_a_hangup_connects_anew_once_so_that_certificates_are_read_again(node: Node) -> None:
    node.board.reload = True
    assert node.step() and node.step()
    assert node.store.connections == 2


@pytest.mark.field_problem(22)
@pytest.mark.parametrize("away", [True, False])
def test_after_a_hangup_that_could_not_be_served_the_interface_is_followed_all_the_same(node: Node, away: bool) -> None:
    node.board.reload = True
    node.board.view = view(address="192.168.9.77")
    if away:
        node.store.broken = StoreUnavailable("etcd is away")
    else:
        node.store.config = "{"
    assert not node.step()
    assert node.health.reason("lease" if away else "config")
    assert node.board.standing is not None
    assert node.board.standing.host.underlay.local[4] == IPv4Address("192.168.9.77")
    node.store.broken, node.store.config = None, NETWORK
    node.store.publish = lambda lease, attrs: replace(lease, attrs=attrs)  # type: ignore[method-assign]
    assert node.step() and node.health.reason("lease") is None


def test_an_outage_that_is_over_is_not_told_for_as_long_as_something_else_is_wrong(node: Node) -> None:
    spoil_backend(node)
    node.store.broken = StoreUnavailable("etcd is away")
    assert not node.step()
    assert "away" in (node.health.reason("lease") or "")
    node.store.broken = None
    assert not node.step()
    assert node.health.reason("lease") is None and node.health.reason("config")


def test_a_lease_lost_meanwhile_is_told(node: Node) -> None:
    spoil_backend(node)
    node.store.broken = LeaseLost("lease 10.5.7.0-24 is another node's now")
    assert not node.step()
    assert "another node's" in (node.health.reason("lease") or "")
    assert "nonsense" in (node.health.reason("config") or "")


def test_a_reason_that_is_over_is_not_shown_beside_the_new_one(tmp_path: Path) -> None:
    node = Node(tmp_path, MemoryStore(NETWORK))
    node.store.broken = StoreUnavailable("etcd does not answer")
    assert not node.step()
    assert "etcd" in (node.health.reason("lease") or "")
    node.store.broken, node.board.view = None, view(up=False)
    assert not node.step()
    assert node.health.reason("lease") == "no lease yet"
    assert node.health.reason("underlay")


def test_a_network_too_large_for_its_underlay_claims_nothing(tmp_path: Path) -> None:
    node = Node(tmp_path, MemoryStore('{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan","MTU":20}}'))
    assert not node.step()
    assert "MTU of 20" in (node.health.reason("config") or "")
    assert node.store.claims == 0


def test_an_invalid_configuration_names_itself_and_not_the_lease(tmp_path: Path) -> None:
    node = Node(tmp_path, MemoryStore("{"))
    assert not node.step()
    with pytest.raises(ConfigInvalid):
        node.store.read_config()
    assert "not JSON" in (node.health.reason("config") or "")
    assert node.health.reason("lease") == "no lease yet"


@pytest.mark.parametrize("carried_out", [False, True])
def test_an_answer_that_got_lost_while_the_families_changed_is_no_lost_lease(node: Node, carried_out: bool) -> None:
    """With ``carried_out`` etcd has done what it never answered, and the watch shows it before we ask again."""
    (eth0,) = view().interfaces
    both = (*eth0.addresses, InterfaceAddress("2001:db8::2/64"))
    node.board.view = replace(view(), interfaces=(replace(eth0, addresses=both),))
    node.show('{"Network":"10.5.0.0/16","EnableIPv6":true,"IPv6Network":"fd05::/48"}')
    node.store.broken = StoreUnavailable("etcd does not answer")
    assert not node.step()
    node.store.broken = None
    if carried_out:
        assert node.board.snapshot is not None and node.board.lease is not None
        moved = replace(node.board.lease, ipv6_subnet=IPv6Network("fd05:0:0:7::/64"), revision=9)
        node.board.snapshot = replace(node.board.snapshot, leases={moved.key: moved}, revision=9)
    with capture_logs() as lines:
        assert node.step()
    assert [line["event"] for line in lines if "lease" in line["event"]] == [
        "lease follows the address families of the network"
    ]
