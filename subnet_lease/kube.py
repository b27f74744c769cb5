"""Leases from Kubernetes: a node's podCIDR is its subnet, its annotations are what it publishes.

The subnet is given by Kubernetes (the controller manager's node IPAM), so there is nothing to race for and nothing to
renew: to acquire means to annotate our own node. The network configuration is a file, normally a mounted ConfigMap.

Threads: the caller's calls the verbs; ``watch`` runs in the caller's watch thread and starts one more, which lists and
watches nodes. What passes between them is immutable.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Final

import structlog

from subnet_lease.kube_annotations import (
    DEFAULT_PREFIX,
    BadNode,
    BadPrefix,
    keys_for,
    parse_lease,
    pod_cidrs,
    public_address_hint,
)
from subnet_lease.kube_config_file import ConfigFile
from subnet_lease.kube_credentials import Connection
from subnet_lease.kube_objects import Node
from subnet_lease.kube_own_node import OwnNode, enabled_families, shown
from subnet_lease.kube_policies import PolicyNotice
from subnet_lease.kube_report import NodeCondition
from subnet_lease.kube_watch import ListWatch, NodeFold
from subnet_lease.lease import Lease, LeaseAttrs, LeaseSnapshot, NodeHints
from subnet_lease.network_config import NetworkConfig
from subnet_lease.store import (
    ConfigInvalid,
    LeaseLost,
    LeaseRequest,
    SetupError,
    StoreError,
    StoreStatus,
    SubnetTaken,
    unused,
)

DEFAULT_NET_CONFIG: Final = "/etc/kube-flannel/net-conf.json"

CHECK: Final = 30.0
"""What ``renew`` answers, in seconds: it looks at what the watch has seen, and asks the API only for a node that has
published our address, too."""

_LOOK: Final = 1.0
"""Seconds between looks at the configuration file, which costs one stat."""

_log = structlog.get_logger("kube")


class KubeStore:
    """A LeaseStore on the Kubernetes API. Raises SetupError where no waiting will help."""

    def __init__(
        self,
        *,
        node_name: str = "",
        pod_name: str = "",
        pod_namespace: str = "",
        kubeconfig: str = "",
        api_url: str = "",
        annotation_prefix: str = DEFAULT_PREFIX,
        net_config_path: str | Path = DEFAULT_NET_CONFIG,
        set_network_unavailable: bool = True,
        policy_notice: bool = False,
    ) -> None:
        try:
            self._keys = keys_for(annotation_prefix)
        except BadPrefix as error:
            raise SetupError(str(error)) from None
        if not node_name and not (pod_name and pod_namespace):
            raise SetupError(
                "this node's name is unknown: set NODE_NAME to its name in Kubernetes (kubectl get nodes),"
                " or POD_NAME and POD_NAMESPACE, as the DaemonSet does"
            )
        self._api = Connection(kubeconfig, api_url)
        self._api.leave = self._leave_watches
        self._own = OwnNode(self._api, self._keys, node_name, (pod_namespace, pod_name))
        self._file = ConfigFile(Path(net_config_path))
        self._health = StoreStatus()
        self._set_condition = set_network_unavailable
        self._condition = NodeCondition(self._api, self._own.name, self._own.events)
        self._policies = PolicyNotice(self._api, self._own.name, self._own.events) if policy_notice else None
        self._fold: NodeFold | None = None
        self._nodes: ListWatch[Node] | None = None
        self._last_hints = NodeHints()
        self._wake = threading.Event()
        self._closed = threading.Event()

    @property
    def status(self) -> StoreStatus:
        return self._health

    @property
    def node_name(self) -> str:
        """Our node's name; empty until it is known."""
        return self._own.known_name

    def read_config(self) -> NetworkConfig:
        return self._file.read()

    def hints(self) -> NodeHints:
        node = self._own.read()
        try:
            self._last_hints = NodeHints(*public_address_hint(self._keys, node.annotations))
            return self._last_hints
        except BadNode as error:
            raise self._own.invalid(f"{error}; mend or remove it: kubectl annotate node {node.metadata.name}") from None

    def find_own(self, request: LeaseRequest) -> Lease | None:  # noqa: ARG002 -- the node object says who we are
        node = self._own.read()
        try:
            lease = parse_lease(self._keys, self._file.read(), node.metadata.name, node.annotations, node.cidrs)
            return lease and replace(lease, revision=node.revision)
        except BadNode as error:
            _log.warning("this node's annotations cannot be read; they are written anew", error=str(error))
            return None

    def acquire(self, config: NetworkConfig, request: LeaseRequest) -> Lease:
        node = self._own.read()
        subnets = self._own.subnets(config, node)
        if request.keep and any(
            had is not None and had != now for had, now in zip(request.previous, subnets, strict=True)
        ):
            raise SubnetTaken(
                f"node {node.metadata.name} now has podCIDR {shown(subnets)}, but its containers live in"
                f" {shown(request.previous)}; drain the node and restart flanneld to move to the new subnet"
            )
        self._refuse_rivals(node, request.attrs)
        return self._own.publish(config, node, request.attrs)

    def renew(self, lease: Lease) -> float:
        fold = self._fold
        if fold is not None and fold.listed:
            if fold.own is None:
                raise LeaseLost(
                    f"node {self._own.name()} is gone from Kubernetes; it comes back when kubelet registers it"
                )
            try:
                v4, v6 = pod_cidrs(fold.own.cidrs)
            except BadNode as error:
                raise LeaseLost(f"node {self._own.name()}: {error}") from None
            if (lease.subnet, lease.ipv6_subnet) != (v4 if lease.subnet else None, v6 if lease.ipv6_subnet else None):
                raise LeaseLost(f"node {self._own.name()} now has podCIDR {shown((v4, v6))}, not {lease.cidr}")
            self._own.repair(fold.own)
            self._refuse_rivals(fold.own, lease.attrs)
        return CHECK

    def _refuse_rivals(self, own: Node, attrs: LeaseAttrs) -> None:
        fold = self._fold
        if fold is not None and fold.listed:
            self._own.refuse_rivals(fold.leases.values(), own, attrs)

    def publish(self, lease: Lease, attrs: LeaseAttrs) -> Lease:
        node = self._own.read()
        config = self._file.last or self._file.read()
        subnets = self._own.subnets(config, node)
        if (lease.subnet, lease.ipv6_subnet) != subnets:
            raise LeaseLost(f"node {node.metadata.name} now has podCIDR {shown(subnets)}, not {lease.cidr}")
        self._refuse_rivals(node, attrs)
        return self._own.publish(config, node, attrs)

    def release(self, lease: Lease) -> None:  # noqa: ARG002 -- a node has one lease
        self._own.withdraw()

    def report(self, ready: bool, reasons: tuple[str, ...]) -> None:
        if self._set_condition:
            self._condition.report(ready, reasons, time.monotonic())

    def reconnect(self) -> None:
        try:
            self._api.renew()
        except SetupError as error:
            _log.error(f"{error}; what was read before stays in use")

    def _leave_watches(self) -> None:
        for watch in (self._nodes, self._policies):
            if watch is not None:
                watch.reopen()

    def close(self) -> None:
        self._closed.set()
        self._wake.set()
        if self._policies is not None:
            self._policies.close()
        if self._nodes is not None:
            self._nodes.close()
            self._nodes.join(2.0)
        self._api().close()

    def watch(self) -> Iterator[LeaseSnapshot]:
        config = self._first_config()
        name = self._patient_name() if config is not None else ""
        if config is None or not name:
            return
        fold = self._fold = NodeFold(self._keys, name, config, self._health.count, self._wake.set)
        nodes = self._nodes = ListWatch(self._api, Node, fold, self._health)
        nodes.start()
        if self._policies is not None:
            self._policies.start()
        told_leases: Mapping[str, Lease] | None = None
        told: tuple[object, ...] = ()
        own: Node | None = None
        try:
            while not self._closed.is_set():
                self._wake.wait(_LOOK)
                self._wake.clear()
                config = self._followed(config)
                if enabled_families(config) != enabled_families(fold.config):
                    # Which families count is part of every lease, so every node is read again first.
                    fold.reconfigure(config)
                    nodes.relist()
                if fold.own is not None and fold.own is not own:
                    self._condition.observed(fold.own)
                own = fold.own
                self._look_after(own)
                hints = self._hinted(own)
                if not fold.listed:  # asked before the leases are: they are complete once it is true
                    continue
                # Our own podCIDR is told, too, when no lease depends on it yet: somebody waits for it.
                leases, state = fold.leases, (config, own.cidrs if own else None, hints)
                if leases is not told_leases or state != told:
                    told_leases, told = leases, state
                    asked = self._own.as_asked(leases, own, fold.own_lease)
                    yield LeaseSnapshot(config, asked, nodes.revision, hints)
        finally:
            nodes.close()

    def _hinted(self, own: Node | None) -> NodeHints:
        """What the annotations say now; while they cannot be read, or are gone with our node, what they said before."""
        if own is not None:
            with suppress(BadNode):
                self._last_hints = NodeHints(*public_address_hint(self._keys, own.annotations))
        return self._last_hints

    def _look_after(self, own: Node | None) -> None:
        """Once a second: our annotations and our condition are what they should be."""
        try:
            if own is not None:
                self._own.repair(own)
            if self._set_condition:
                self._condition.settle(time.monotonic())
        except StoreError as error:
            self._health.count(error.cause)

    # -- what the watch needs ----------------------------------------------------------------------------------

    def _first_config(self) -> NetworkConfig | None:
        """The configuration, waited for; None when closed first."""
        while not self._closed.is_set():
            try:
                return self._file.read()
            except StoreError as error:
                self._health.failed(error)
            self._closed.wait(_LOOK)
        return None

    def _patient_name(self) -> str:
        while not self._closed.is_set():
            try:
                return self._own.name()
            except StoreError as error:
                self._health.failed(error)
            self._closed.wait(_LOOK)
        return ""

    def _followed(self, config: NetworkConfig) -> NetworkConfig:
        """The configuration as it is now; an unusable one is announced and the last good one kept."""
        if not self._file.changed():
            return config
        try:
            found = self._file.read()
        except StoreError as error:
            self._health.count(error.cause)
            self._health.config_error = unused(str(error))
            if isinstance(error, ConfigInvalid):
                self._own.events.about_node(
                    "Warning", "FlannelConfigInvalid", f"{error}; the last good one stays in use"
                )
            return config
        self._health.config_error = None
        return config if found == config else found
