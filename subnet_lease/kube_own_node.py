"""Our own node: its name, its podCIDRs, and the annotations by which every other node knows it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Final

import structlog

from subnet_lease.allocation import same_address
from subnet_lease.kube_annotations import (
    BadNode,
    Keys,
    difference,
    overwritten,
    parse_lease,
    pod_cidrs,
    removed,
    rendered,
)
from subnet_lease.kube_api import Api, NotFound
from subnet_lease.kube_objects import Node
from subnet_lease.kube_report import Events
from subnet_lease.lease import FAMILIES, Family, IPNetwork, Lease, LeaseAttrs, NodeIdentity
from subnet_lease.network_config import NetworkConfig
from subnet_lease.persistent_map import PersistentMap
from subnet_lease.store import AddressInUse, ConfigInvalid, LeaseLost, NodeMissing, PodCidrMissing, StoreError

_REPAIR_EVERY: Final = 5.0
"""Seconds between two repairs of our own annotations: another writer must not draw us into a race."""

_log = structlog.get_logger("kube")


class OwnNode:
    """Reads and annotates the node that we run on. ``pod`` (namespace, name) finds its name where none is given."""

    def __init__(self, api: Callable[[], Api], keys: Keys, name: str, pod: tuple[str, str]) -> None:
        self._api = api
        self._keys = keys
        self._known_name = name
        self._pod = pod
        self._events = Events(api, self.name)
        self._published: LeaseAttrs | None = None
        self._published_version = ""
        self._repaired = 0.0

    @property
    def known_name(self) -> str:
        """Our node's name; empty until it is known."""
        return self._known_name

    @property
    def events(self) -> Events:
        return self._events

    def read(self) -> Node:
        name = self.name()
        try:
            return self._api().node(name)
        except NotFound:
            raise NodeMissing(
                f"there is no node {name} in Kubernetes yet; if kubelet registers it under another name"
                " (kubectl get nodes), set NODE_NAME to that"
            ) from None

    def name(self) -> str:
        """Our node's name, asked from the API once when only the pod is known."""
        if not self._known_name:
            namespace, pod = self._pod
            try:
                self._known_name = self._api().pod_node(namespace, pod)
            except NotFound:
                raise NodeMissing(
                    f"there is no pod {namespace}/{pod}, so this node's name is unknown;"
                    " POD_NAME and POD_NAMESPACE must name the pod that flanneld runs in, or set NODE_NAME"
                ) from None
            if not self._known_name:
                raise NodeMissing(f"pod {namespace}/{pod} has no node yet, so this node's name is unknown")
        return self._known_name

    def subnets(self, config: NetworkConfig, node: Node) -> tuple[IPNetwork | None, IPNetwork | None]:
        """The node's podCIDRs in the enabled families, checked against the cluster network."""
        name = node.metadata.name
        try:
            found = dict(zip(FAMILIES, pod_cidrs(node.cidrs), strict=True))
        except BadNode as error:
            raise self.invalid(f"node {name}: {error}") from None
        chosen: dict[Family, IPNetwork | None] = {4: None, 6: None}
        for family in enabled_families(config):
            subnet, network = found[family], config.network_of(family)
            if subnet is None:
                raise self._missing(name, family, config, node.cidrs)
            if network is not None and not _contains(network, subnet):
                raise self.invalid(
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

    def invalid(self, text: str) -> ConfigInvalid:
        self._events.about_node("Warning", "FlannelConfigInvalid", text)
        return ConfigInvalid(text)

    def publish(self, config: NetworkConfig, node: Node, attrs: LeaseAttrs) -> Lease:
        """Annotate our node where it differs; the lease as every peer will read it."""
        name = node.metadata.name
        attrs = replace(_enabled(config, attrs), node=NodeIdentity(name))
        try:
            effective = overwritten(self._keys, attrs, node.annotations)
        except BadNode as error:
            raise self.invalid(f"node {name}: {error}; mend or remove it") from None
        changes = difference(rendered(self._keys, effective), node.annotations)
        if changes:
            # While it is written, what the watch still shows must not be taken for somebody else's work.
            before, self._published = self._published, None
            try:
                node = self._api().patch_annotations(name, changes)
            except StoreError:
                self._published = before
                raise
        self._published_version = node.metadata.resource_version
        self._published = attrs
        try:
            lease = parse_lease(self._keys, config, name, node.annotations, node.cidrs)
        except BadNode as error:
            raise self.invalid(f"node {name}: {error}") from None
        if lease is None:
            raise LeaseLost(f"node {name}: somebody removed our annotations while they were written")
        return replace(lease, attrs=attrs if lease.attrs == effective else lease.attrs, revision=node.revision)

    def refuse_rivals(self, leases: Iterable[Lease], own: Node, attrs: LeaseAttrs) -> None:
        """AddressInUse if a live node that was there before us publishes our address (field problem 10).

        Of two, the younger gives way. A node whose kubelet is silent is as good as gone: we may be what replaced it.
        """
        if attrs.backend_type == "alloc":
            return  # nobody sends anything to it
        try:
            attrs = overwritten(self._keys, attrs, own.annotations)
        except BadNode:
            return  # told by whoever publishes
        for lease in leases:
            name = lease.attrs.node.name if lease.attrs.node else ""
            if name == own.metadata.name or not same_address(lease.attrs, attrs):
                continue
            try:
                rival = self._api().node(name)
            except NotFound:
                continue
            if rival.ready and rival.seniority < own.seniority:
                raise AddressInUse(
                    f"public IP {attrs.public_ip or attrs.public_ipv6} of node {own.metadata.name} is in use by the live"
                    f" node {name}, which has {lease.cidr}. Two nodes cannot share one: give each its own by the annotation"
                    f" {self._keys.name('node-public-ip')}, or choose another interface with --iface"
                )

    def as_asked(
        self, leases: PersistentMap[str, Lease], own: Node | None, lease: Lease | None
    ) -> PersistentMap[str, Lease]:
        """The leases, our own with the attributes that we asked for rather than those that an operator overwrote.

        The daemon compares what it wants with what it sees, and an overwritten address would look like a difference.
        """
        asked = self._published
        if asked is None or own is None or lease is None or lease.attrs == asked:
            return leases
        try:
            effective = overwritten(self._keys, asked, own.annotations)
        except BadNode:
            return leases
        if lease.attrs != effective or leases.get(lease.key) is not lease:
            return leases
        return leases.with_changes({lease.key: replace(lease, attrs=asked)})

    def repair(self, own: Node) -> None:
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

    def withdraw(self) -> None:
        """Take our annotations off the node: peers forget it; the podCIDR stays Kubernetes' own."""
        self._published = None
        node = self.read()
        gone = difference(removed(self._keys), node.annotations)
        if gone:
            self._api().patch_annotations(node.metadata.name, gone)


def enabled_families(config: NetworkConfig) -> tuple[Family, ...]:
    return tuple(family for family, on in zip(FAMILIES, (config.enable_ipv4, config.enable_ipv6), strict=True) if on)


def _enabled(config: NetworkConfig, attrs: LeaseAttrs) -> LeaseAttrs:
    """The attributes without those of a family that the configuration turns off."""
    if not config.enable_ipv4:
        attrs = replace(attrs, public_ip=None, backend_data=None)
    return attrs if config.enable_ipv6 else replace(attrs, public_ipv6=None, backend_v6_data=None)


def _contains(network: IPNetwork, subnet: IPNetwork) -> bool:
    return network.prefixlen <= subnet.prefixlen and subnet.network_address in network


def shown(subnets: Iterable[IPNetwork | None]) -> str:
    return ", ".join(str(subnet) for subnet in subnets if subnet is not None) or "no podCIDR"
