"""Leases from Kubernetes: a node's podCIDR is its subnet, its annotations are what it publishes.

The subnet is given by Kubernetes (the controller manager's node IPAM), so there is nothing to race for and nothing to
renew: to acquire means to annotate our own node. The network configuration is a file, normally a mounted ConfigMap.

Threads: the caller's calls the verbs; ``watch`` runs in the caller's watch thread and starts one more, which lists and
watches nodes. What passes between them is immutable.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Final

import structlog

from subnet_lease.kube_annotations import (
    DEFAULT_PREFIX,
    BadNode,
    BadPrefix,
    difference,
    keys_for,
    overwritten,
    parse_lease,
    pod_cidrs,
    public_address_hint,
    removed,
    rendered,
)
from subnet_lease.kube_api import NotFound
from subnet_lease.kube_config_file import ConfigFile
from subnet_lease.kube_credentials import Connection
from subnet_lease.kube_objects import Node
from subnet_lease.kube_policies import PolicyNotice
from subnet_lease.kube_report import Events, NodeCondition
from subnet_lease.kube_watch import Health, ListWatch, NodeFold
from subnet_lease.lease import FAMILIES, Family, IPNetwork, Lease, LeaseAttrs, LeaseSnapshot, NodeIdentity
from subnet_lease.network_config import NetworkConfig
from subnet_lease.store import (
    ConfigInvalid,
    LeaseLost,
    LeaseRequest,
    NodeHints,
    NodeMissing,
    PodCidrMissing,
    SetupError,
    StoreError,
    SubnetTaken,
)

DEFAULT_NET_CONFIG: Final = "/etc/kube-flannel/net-conf.json"

CHECK: Final = 30.0
"""What ``renew`` answers, in seconds: it looks at what the watch has seen, without a call to the API."""

_LOOK: Final = 1.0
"""Seconds between looks at the configuration file, which costs one stat."""

_REPAIR_EVERY: Final = 5.0
"""Seconds between two repairs of our own annotations: another writer must not draw us into a race."""

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
        self._node_name = node_name
        self._pod = (pod_namespace, pod_name)
        self._api = Connection(kubeconfig, api_url)
        self._file = ConfigFile(Path(net_config_path))
        self._health = Health()
        self._events = Events(self._api, self._name)
        self._set_condition = set_network_unavailable
        self._condition = NodeCondition(self._api, self._name, self._events)
        self._policies = PolicyNotice(self._api, self._name, self._events) if policy_notice else None
        self._fold: NodeFold | None = None
        self._nodes: ListWatch[Node] | None = None
        self._published: LeaseAttrs | None = None
        self._published_version = ""
        self._repaired = 0.0
        self._wake = threading.Event()
        self._closed = threading.Event()

    @property
    def status(self) -> Health:
        return self._health

    @property
    def node_name(self) -> str:
        """Our node's name; empty until it is known."""
        return self._node_name

    def read_config(self) -> NetworkConfig:
        return self._file.read()

    def hints(self) -> NodeHints:
        node = self._node()
        try:
            return NodeHints(*public_address_hint(self._keys, node.annotations))
        except BadNode as error:
            raise self._invalid(f"{error}; mend or remove it: kubectl annotate node {node.metadata.name}") from None

    def find_own(self, request: LeaseRequest) -> Lease | None:  # noqa: ARG002 -- the node object says who we are
        node = self._node()
        try:
            lease = parse_lease(self._keys, self._file.read(), node.metadata.name, node.annotations, node.cidrs)
            return lease and replace(lease, revision=node.revision)
        except BadNode as error:
            _log.warning("this node's annotations cannot be read; they are written anew", error=str(error))
            return None

    def acquire(self, config: NetworkConfig, request: LeaseRequest) -> Lease:
        node = self._node()
        subnets = self._subnets(config, node)
        if request.keep and any(
            had is not None and had != now for had, now in zip(request.previous, subnets, strict=True)
        ):
            raise SubnetTaken(
                f"node {node.metadata.name} now has podCIDR {_shown(subnets)}, but its containers live in"
                f" {_shown(request.previous)}; drain the node and restart flanneld to move to the new subnet"
            )
        return self._publish(config, node, request.attrs)

    def renew(self, lease: Lease) -> float:
        fold = self._fold
        if fold is not None and fold.listed:
            if fold.own is None:
                raise LeaseLost(f"node {self._name()} is gone from Kubernetes; it comes back when kubelet registers it")
            try:
                v4, v6 = pod_cidrs(fold.own.cidrs)
            except BadNode as error:
                raise LeaseLost(f"node {self._name()}: {error}") from None
            if (lease.subnet, lease.ipv6_subnet) != (v4 if lease.subnet else None, v6 if lease.ipv6_subnet else None):
                raise LeaseLost(f"node {self._name()} now has podCIDR {_shown((v4, v6))}, not {lease.key}")
            self._repair(fold.own)
        return CHECK

    def publish(self, lease: Lease, attrs: LeaseAttrs) -> Lease:
        node = self._node()
        config = self._file.last or self._file.read()
        subnets = self._subnets(config, node)
        if (lease.subnet, lease.ipv6_subnet) != subnets:
            raise LeaseLost(f"node {node.metadata.name} now has podCIDR {_shown(subnets)}, not {lease.key}")
        return self._publish(config, node, attrs)

    def release(self, lease: Lease) -> None:  # noqa: ARG002 -- a node has one lease
        """Take our annotations off the node: peers forget it; the podCIDR stays Kubernetes' own."""
        self._published = None
        node = self._node()
        gone = difference(removed(self._keys), node.annotations)
        if gone:
            self._api().patch_annotations(node.metadata.name, gone)

    def report(self, ready: bool, reasons: tuple[str, ...]) -> None:
        if self._set_condition:
            self._condition.report(ready, reasons, time.monotonic())

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
        shown: tuple[object, ...] | None = None
        own: Node | None = None
        try:
            while not self._closed.is_set():
                self._wake.wait(_LOOK)
                self._wake.clear()
                config = self._followed(config)
                if _families(config) != _families(fold.config):
                    # Which families count is part of every lease, so every node is read again first.
                    fold.reconfigure(config)
                    nodes.relist()
                if fold.own is not None and fold.own is not own:
                    self._condition.observed(fold.own)
                own = fold.own
                self._look_after(own)
                # Our own podCIDR is told, too, when no lease depends on it yet: somebody waits for it.
                state = (fold.leases, config, own.cidrs if own else None)
                if fold.listed and (shown is None or shown != state):
                    shown = state
                    yield LeaseSnapshot(config, self._as_asked(state[0], own), nodes.revision)
        finally:
            nodes.close()

    # -- our own node ------------------------------------------------------------------------------------------

    def _node(self) -> Node:
        name = self._name()
        try:
            return self._api().node(name)
        except NotFound:
            raise NodeMissing(
                f"there is no node {name} in Kubernetes yet; if kubelet registers it under another name"
                " (kubectl get nodes), set NODE_NAME to that"
            ) from None

    def _name(self) -> str:
        """Our node's name, asked from the API once when only the pod is known."""
        if not self._node_name:
            namespace, pod = self._pod
            try:
                self._node_name = self._api().pod_node(namespace, pod)
            except NotFound:
                raise NodeMissing(
                    f"there is no pod {namespace}/{pod}, so this node's name is unknown;"
                    " POD_NAME and POD_NAMESPACE must name the pod that flanneld runs in, or set NODE_NAME"
                ) from None
            if not self._node_name:
                raise NodeMissing(f"pod {namespace}/{pod} has no node yet, so this node's name is unknown")
        return self._node_name

    def _subnets(self, config: NetworkConfig, node: Node) -> tuple[IPNetwork | None, IPNetwork | None]:
        """The node's podCIDRs in the enabled families, checked against the cluster network."""
        name = node.metadata.name
        try:
            found = dict(zip(FAMILIES, pod_cidrs(node.cidrs), strict=True))
        except BadNode as error:
            raise self._invalid(f"node {name}: {error}") from None
        chosen: dict[Family, IPNetwork | None] = {4: None, 6: None}
        for family in _families(config):
            subnet, network = found[family], config.network_of(family)
            if subnet is None:
                raise self._missing(name, family, config, node.cidrs)
            if network is not None and not _contains(network, subnet):
                raise self._invalid(
                    f'subnet "{network}" specified in the flannel net config doesn\'t contain "{subnet}"'
                    f'{" IPv6" if family == 6 else ""} PodCIDR of the "{name}" node;'
                    f" {'IPv6Network' if family == 6 else 'Network'} in the ConfigMap kube-flannel-cfg must equal"
                    " the cluster's pod network (kubeadm's --pod-network-cidr)"
                )
            chosen[family] = subnet
        return chosen[4], chosen[6]

    def _missing(self, name: str, family: Family, config: NetworkConfig, cidrs: list[str]) -> PodCidrMissing:
        network = config.network_of(family)
        example = "10.244.7.0/24" if family == 4 else "fd00:10:244:7::/64"
        has = f" (it has {', '.join(cidrs)})" if cidrs else ""
        error = PodCidrMissing(
            f'node "{name}" pod cidr not assigned: it has no IPv{family} podCIDR{has}. Give kube-controller-manager'
            f" --allocate-node-cidrs=true and --cluster-cidr={network or '<the pod network>'} (with kubeadm: kubeadm init"
            f" --pod-network-cidr={network or '<the pod network>'}), or assign one by hand:"
            f""" kubectl patch node {name} -p '{{"spec":{{"podCIDR":"{example}","podCIDRs":["{example}"]}}}}'"""
        )
        self._events.about_node("Warning", "PodCIDRMissing", str(error))
        return error

    def _invalid(self, text: str) -> ConfigInvalid:
        self._events.about_node("Warning", "FlannelConfigInvalid", text)
        return ConfigInvalid(text)

    def _publish(self, config: NetworkConfig, node: Node, attrs: LeaseAttrs) -> Lease:
        """Annotate our node where it differs; the lease as every peer will read it."""
        name = node.metadata.name
        attrs = replace(_enabled(config, attrs), node=NodeIdentity(name))
        try:
            effective = overwritten(self._keys, attrs, node.annotations)
        except BadNode as error:
            raise self._invalid(f"node {name}: {error}; mend or remove it") from None
        changes = difference(rendered(self._keys, effective), node.annotations)
        if changes:
            node = self._api().patch_annotations(name, changes)
        self._published, self._published_version = attrs, node.metadata.resource_version
        try:
            lease = parse_lease(self._keys, config, name, node.annotations, node.cidrs)
        except BadNode as error:
            raise self._invalid(f"node {name}: {error}") from None
        if lease is None:
            raise LeaseLost(f"node {name}: somebody removed our annotations while they were written")
        return replace(lease, attrs=attrs if lease.attrs == effective else lease.attrs, revision=node.revision)

    def _as_asked(self, leases: Mapping[str, Lease], own: Node | None) -> Mapping[str, Lease]:
        """The leases, our own with the attributes that we asked for rather than those that an operator overwrote.

        The daemon compares what it wants with what it sees, and an overwritten address would look like a difference.
        """
        asked = self._published
        lease = self._fold.own_lease if self._fold is not None else None
        if asked is None or own is None or lease is None or lease.attrs == asked:
            return leases
        try:
            effective = overwritten(self._keys, asked, own.annotations)
        except BadNode:
            return leases
        if lease.attrs != effective or leases.get(lease.key) is not lease:
            return leases
        return MappingProxyType({**leases, lease.key: replace(lease, attrs=asked)})

    def _look_after(self, own: Node | None) -> None:
        """Once a second: our annotations and our condition are what they should be."""
        try:
            if own is not None:
                self._repair(own)
            if self._set_condition:
                self._condition.settle(time.monotonic())
        except StoreError as error:
            self._health.count(error.cause)

    def _repair(self, own: Node) -> None:
        """Put our annotations back if somebody altered them, or follow an overwrite annotation that changed."""
        wanted, now = self._published, time.monotonic()
        if wanted is None or now - self._repaired < _REPAIR_EVERY or own.older_than(self._published_version):
            return
        try:
            effective = overwritten(self._keys, wanted, own.annotations)
        except BadNode as error:
            self._events.about_node("Warning", "FlannelConfigInvalid", f"{error}; it is not followed")
            return
        changes = difference(rendered(self._keys, effective), own.annotations)
        if not changes:
            return
        self._repaired = now
        node = self._api().patch_annotations(own.metadata.name, changes)
        self._published_version = node.metadata.resource_version
        names = ", ".join(sorted(changes))
        _log.warning("this node's annotations were not ours any more; written again", annotations=names)
        self._events.about_node("Warning", "FlannelAnnotationsRestored", f"Annotations written again: {names}")

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
                return self._name()
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
            _log.warning("the changed network configuration is not used", error=str(error))
            if isinstance(error, ConfigInvalid):
                self._events.about_node("Warning", "FlannelConfigInvalid", f"{error}; the last good one stays in use")
            return config
        return config if found == config else found


def _families(config: NetworkConfig) -> tuple[Family, ...]:
    return tuple(family for family, on in zip(FAMILIES, (config.enable_ipv4, config.enable_ipv6), strict=True) if on)


def _enabled(config: NetworkConfig, attrs: LeaseAttrs) -> LeaseAttrs:
    """The attributes without those of a family that the configuration turns off."""
    if not config.enable_ipv4:
        attrs = replace(attrs, public_ip=None, backend_data=None)
    return attrs if config.enable_ipv6 else replace(attrs, public_ipv6=None, backend_v6_data=None)


def _contains(network: IPNetwork, subnet: IPNetwork) -> bool:
    return network.prefixlen <= subnet.prefixlen and subnet.network_address in network


def _shown(subnets: Iterable[IPNetwork | None]) -> str:
    return ", ".join(str(subnet) for subnet in subnets if subnet is not None) or "no podCIDR"
