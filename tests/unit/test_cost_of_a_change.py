"""One changed lease costs as much among thousands as among few. Counted, not timed: steps of the interpreter, and bytes.

Steps show a loop over all peers, bytes a copy of them that is made in one step. What one event in a while pays for many
(a table that grows) is left out by taking the cheapest of a few.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from structlog.testing import capture_logs

from backends.kernel_state import Change, Failure, Observation, Scope
from backends.vxlan import Vxlan
from flanneld.board import Board
from flanneld.dataplane.mirror import Mirror
from flanneld.desired import Standing
from flanneld.host_claims import HostClaims
from flanneld.reconciler import Reconciler
from flanneld.status import Health
from flanneld.telemetry import Metrics
from flanneld.wanted import WantedState
from subnet_lease.etcd_table import PUT, LeaseReader, SnapshotTable
from subnet_lease.kube_annotations import keys_for
from subnet_lease.kube_objects import Change as NodeChange
from subnet_lease.kube_objects import Metadata, Node, NodeSpec
from subnet_lease.kube_watch import NodeFold
from subnet_lease.lease import LeaseSnapshot
from subnet_lease.network_config import parse_network_config
from subnet_lease.store import StoreStatus
from tests.testbed.counted import allocated, steps
from tests.testbed.fake_kube import peer_annotations
from tests.unit.backend_values import host
from tests.unit.test_desired import FACTS, OWN
from tests.unit.test_wanted import NoLookups

CONFIG = '{"Network":"10.0.0.0/8","SubnetMin":"10.1.0.0"}'
EVENTS = 5


class Kernel:
    """A dataplane with nothing below its mirror."""

    def __init__(self) -> None:
        self.mirror = Mirror()
        self.fresh = True

    def observe(self, scope: Scope) -> Observation:
        fresh, self.fresh = self.fresh, False
        changed = self.mirror.take_changed()
        return Observation(self.mirror.state, None if fresh else changed, ())

    def apply(self, changes: Sequence[Change]) -> list[Failure]:
        for change in changes:
            self.mirror.know(change.record.key, change.record if change.op == "put" else None)
        return []

    def wait(self, timeout: float | None) -> None: ...
    def wake(self) -> None: ...
    def invalidate(self) -> None: ...


def subnet(number: int) -> str:
    return f"10.{10 + number // 250}.{number % 250}.0"


class EtcdPeers:
    """So many leases in etcd; ``change`` gives one of them another MAC."""

    def __init__(self, count: int) -> None:
        self._table = SnapshotTable("/net", StoreStatus(), frozenset, LeaseReader())
        config = SimpleNamespace(key=b"/net/config", value=CONFIG.encode(), mod_revision=1, lease=0)
        self._table.replace([config, *(self._pair(number, 1) for number in range(count))], 1)

    def snapshot(self) -> LeaseSnapshot:
        found = self._table.snapshot()
        assert found is not None
        return found

    def change(self, version: int) -> None:
        assert self._table.apply([SimpleNamespace(type=PUT, kv=self._pair(7, version))])
        self._table.expire()

    def _pair(self, number: int, version: int) -> Any:
        data = f'{{"VNI":1,"VtepMAC":"02:{version:02x}:00:00:{number >> 8:02x}:{number & 255:02x}"}}'
        value = f'{{"PublicIP":"172.16.{number >> 8}.{number & 255}","BackendType":"vxlan","BackendData":{data}}}'
        key = f"/net/subnets/{subnet(number)}-24"
        return SimpleNamespace(key=key.encode(), value=value.encode(), mod_revision=version, lease=7)


class KubePeers:
    """So many nodes in Kubernetes."""

    def __init__(self, count: int) -> None:
        self._fold = NodeFold(
            keys_for("flannel.alpha.coreos.com"), "own", parse_network_config(CONFIG), lambda _cause: None
        )
        self._fold.relisted(self._node(number, 1) for number in range(count))

    def snapshot(self) -> LeaseSnapshot:
        return LeaseSnapshot(self._fold.config, self._fold.leases)

    def change(self, version: int) -> None:
        self._fold.changed([NodeChange("MODIFIED", self._node(7, version))])

    def _node(self, number: int, version: int) -> Node:
        mac = f"02:{version:02x}:00:00:{number >> 8:02x}:{number & 255:02x}"
        annotations = peer_annotations(f"172.16.{number >> 8}.{number & 255}", mac)
        return Node(Metadata(name=f"n{number}", annotations=annotations), NodeSpec(f"{subnet(number)}/24"))


def cost(peers: EtcdPeers | KubePeers, count: int) -> tuple[int, int]:
    """Steps and bytes of one event, from the store's message to the kernel."""
    board, kernel = Board(), Kernel()
    board.standing = Standing(Vxlan({}), host(facts=FACTS), OWN)
    wanted = WantedState(board, Health(), Metrics(), NoLookups(), "", lambda _: None)
    reconciler = Reconciler(kernel, wanted.wanted, wanted.report)
    board.snapshot = peers.snapshot()
    for _ in range(3):
        reconciler.one_pass()
    assert wanted.desired is not None
    assert wanted.desired.peers == count
    versions = iter(range(2, 100))

    def event() -> None:
        peers.change(next(versions))
        board.snapshot = peers.snapshot()
        assert len(reconciler.one_pass().changes) == 3  # the neighbour, and another FDB entry for the old one

    return min(steps(event) for _ in range(EVENTS)), min(allocated(event) for _ in range(EVENTS))


@pytest.mark.parametrize("store", [EtcdPeers, KubePeers])
def test_a_changed_lease_costs_the_same_among_5000_as_among_100(
    store: type[EtcdPeers | KubePeers], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HostClaims, "take", lambda *_: None)
    monkeypatch.setattr(HostClaims, "other_networks", lambda _: ())
    monkeypatch.setattr("tests.unit.backend_values.V4", parse_network_config(CONFIG).network)
    with capture_logs():
        few_steps, few_bytes = cost(store(100), 100)
        many_steps, many_bytes = cost(store(5000), 5000)
    assert many_steps < few_steps + 500, "somebody loops over all peers"
    assert many_bytes < few_bytes + 10_000, "somebody copies all peers"
