"""What the tests of KubeStore share: a node's attributes, and a watch in a thread."""

from __future__ import annotations

import threading
from ipaddress import IPv4Address

from flanneld.lab.wait import wait_until
from subnet_lease.kube import KubeStore
from subnet_lease.lease import LeaseAttrs, LeaseSnapshot, NodeIdentity
from subnet_lease.store import LeaseRequest

PREFIX = "flannel.alpha.coreos.com/"
NET_CONF = {"Network": "10.244.0.0/16", "Backend": {"Type": "vxlan"}}
ATTRS = LeaseAttrs(
    public_ip=IPv4Address("192.0.2.1"),
    backend_type="vxlan",
    backend_data={"VNI": 1, "VtepMAC": "02:00:00:00:00:01"},
)
REQUEST = LeaseRequest(NodeIdentity("n1"), ATTRS)


class Watcher:
    """Runs a store's watch in a thread and keeps what it says."""

    def __init__(self, store: KubeStore) -> None:
        self.snapshots: list[LeaseSnapshot] = []
        self.store = store
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        for snapshot in self.store.watch():
            self.snapshots.append(snapshot)

    @property
    def keys(self) -> set[str]:
        return set(self.snapshots[-1].leases) if self.snapshots else set()

    def sees(self, *keys: str, timeout: float = 10) -> LeaseSnapshot:
        """Wait for a snapshot with exactly these leases."""
        wait_until(lambda: self.snapshots and self.keys == set(keys), timeout, lambda: f"{keys}, not {self.keys}")
        return self.snapshots[-1]
