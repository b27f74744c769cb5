"""What the reconciler's answers put into the log."""

from __future__ import annotations

import pytest
from structlog.testing import capture_logs

from backends.kernel_state import Observation
from backends.vxlan import Vxlan
from flanneld.board import Board
from flanneld.desired import Standing
from flanneld.host_claims import HostClaims
from flanneld.status import Health
from flanneld.telemetry import Metrics
from flanneld.wanted import WantedState
from subnet_lease.lease import Lease, LeaseSnapshot
from tests.unit.backend_values import host
from tests.unit.test_desired import FACTS, OWN, lease, snapshot


class NoLookups:
    def lookup(self, address: str) -> None:
        """There is no way to anywhere."""

    def default_routes(self, family: int) -> tuple[()]:
        return ()


class Node:
    """A vxlan node whose store shows what a test says."""

    def __init__(self) -> None:
        self.board = Board()
        self.board.standing = Standing(Vxlan({}), host(facts=FACTS), OWN)
        self.wanted = WantedState(self.board, Health(), Metrics(), NoLookups(), "", lambda _: None)

    def told(self, *leases: Lease) -> list[tuple[str, object, object]]:
        """What is said of peers when the store shows these leases beside our own."""
        config = host().config
        self.board.snapshot = LeaseSnapshot(config, snapshot(OWN, *leases), 1)
        with capture_logs() as lines:
            assert self.wanted.wanted(Observation({}, None, ())) is not None
        about = [line for line in lines if "peer" in line["event"] and "refused" not in line["event"]]
        return [(line["event"], line.get("subnet") or line.get("joined"), line.get("left")) for line in about]


@pytest.fixture
def node(monkeypatch: pytest.MonkeyPatch) -> Node:
    monkeypatch.setattr(HostClaims, "take", lambda *_: None)
    monkeypatch.setattr(HostClaims, "other_networks", lambda _: ())
    monkeypatch.setattr("flanneld.desired.LINGER", 0)
    return Node()


A, B = lease("10.5.2.0/24", 12), lease("10.5.3.0/24", 13)
OTHER_BACKEND = lease("10.5.4.0/24", 14, kind="host-gw")
REFUSED = lease("10.6.5.0/24", 15)


def test_only_peers_come_and_go(node: Node) -> None:
    assert node.told(OTHER_BACKEND, REFUSED) == []
    assert node.told(OTHER_BACKEND, REFUSED, A) == [("peer joined", "10.5.2.0/24", None)]
    assert node.told(REFUSED, A, B) == [("peer joined", "10.5.3.0/24", None)]
    assert node.told(A) == [("peer left", "10.5.3.0/24", None)]
    assert node.told(A, OTHER_BACKEND) == []
    moved = lease("10.5.2.0/24", 12, kind="host-gw")
    assert node.told(moved) == [("peer left", "10.5.2.0/24", None)], "it changed to a backend that we do not speak"


def test_many_that_join_at_once_are_one_line_and_counted_rightly(node: Node) -> None:
    assert node.told(A) == [("peers", 1, 0)]
    others = [lease(f"10.5.{number}.0/24", number, kind="host-gw") for number in range(20, 40)]
    many = [lease(f"10.5.{number}.0/24", number) for number in range(40, 50)]
    assert node.told(A, *others, *many) == [("peers", 10, 0)]


def test_another_standing_of_this_node_is_no_news_of_its_peers(node: Node) -> None:
    assert node.told(A, B) == [("peers", 2, 0)]
    node.board.standing = Standing(Vxlan({"MTU": 1400}), host(facts=FACTS), OWN)
    assert node.told(A, B) == []
    node.board.standing = Standing(Vxlan({}), host(facts=FACTS), OWN)
    assert node.told(A) == [("peers", 0, 1)]
