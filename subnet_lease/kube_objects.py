"""Kubernetes objects as the few fields that somebody reads.

msgspec skips the rest of an object (a node's images, addresses and managed fields) without making anything of it,
which is what keeps 5,000 nodes small. lightkube accepts these classes in place of its own full models.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Generic, TypeVar

import msgspec
from lightkube.core.resource import ApiInfo, GlobalResource, GlobalSubResource, NamespacedResourceG, ResourceDef


class Metadata(msgspec.Struct, frozen=True, rename="camel"):
    name: str = ""
    namespace: str = ""
    uid: str = ""
    resource_version: str = ""
    creation_timestamp: str = ""
    annotations: dict[str, str] | None = None


class Condition(msgspec.Struct, frozen=True):
    type: str = ""
    status: str = ""
    reason: str = ""
    message: str = ""


class NodeStatus(msgspec.Struct, frozen=True):
    conditions: list[Condition] | None = None


class NodeSpec(msgspec.Struct, frozen=True):
    pod_cidr: str = msgspec.field(default="", name="podCIDR")
    pod_cidrs: list[str] | None = msgspec.field(default=None, name="podCIDRs")


class Node(msgspec.Struct, GlobalResource, frozen=True):
    """What we read of a node."""

    _api_info = ApiInfo(ResourceDef("", "v1", "Node"), "nodes", ["get", "list", "watch", "patch"])
    metadata: Metadata
    spec: NodeSpec = NodeSpec()
    status: NodeStatus = NodeStatus()

    @property
    def annotations(self) -> Mapping[str, str]:
        return self.metadata.annotations or {}

    @property
    def cidrs(self) -> list[str]:
        return self.spec.pod_cidrs or ([self.spec.pod_cidr] if self.spec.pod_cidr else [])

    @property
    def revision(self) -> int:
        """The resource version as a number, 0 where it is none."""
        version = self.metadata.resource_version
        return int(version) if version.isdecimal() else 0

    @property
    def ready(self) -> bool:
        """Whether its kubelet says, and has said lately, that it works."""
        return any(c.type == "Ready" and c.status == "True" for c in self.status.conditions or ())

    @property
    def seniority(self) -> tuple[str, str]:
        """Of two nodes, the one with the lesser was there first."""
        return self.metadata.creation_timestamp, self.metadata.name

    def older_than(self, version: str) -> bool:
        """Whether this is the node as it was before the write that gave it ``version``."""
        return version.isdecimal() and 0 < self.revision < int(version)


class NodeStatusPatch(msgspec.Struct, GlobalSubResource, frozen=True):
    _api_info = ApiInfo(
        ResourceDef("", "v1", "Node"), "nodes", ["patch"], parent=ResourceDef("", "v1", "Node"), action="status"
    )
    metadata: Metadata
    spec: NodeSpec = NodeSpec()
    status: NodeStatus = NodeStatus()


class PodSpec(msgspec.Struct, frozen=True, rename="camel"):
    node_name: str = ""


class Pod(msgspec.Struct, NamespacedResourceG, frozen=True):
    _api_info = ApiInfo(ResourceDef("", "v1", "Pod"), "pods", ["get", "list", "global_list"])
    metadata: Metadata
    spec: PodSpec = PodSpec()


class Requirement(msgspec.Struct, frozen=True):
    """One of a label selector's matchExpressions."""

    key: str
    operator: str
    values: list[str] | None = None


class Selector(msgspec.Struct, frozen=True, rename="camel"):
    match_labels: dict[str, str] | None = None
    match_expressions: list[Requirement] | None = None


class PolicySpec(msgspec.Struct, frozen=True, rename="camel"):
    pod_selector: Selector = Selector()


class NetworkPolicy(msgspec.Struct, NamespacedResourceG, frozen=True):
    """What we read of a NetworkPolicy: which pods it selects."""

    _api_info = ApiInfo(
        ResourceDef("networking.k8s.io", "v1", "NetworkPolicy"), "networkpolicies", ["global_list", "global_watch"]
    )
    metadata: Metadata
    spec: PolicySpec = PolicySpec()


class Reference(msgspec.Struct, omit_defaults=True, rename="camel"):
    """The object that an event is about."""

    api_version: str
    kind: str
    name: str
    namespace: str = ""
    uid: str = ""


class EventMetadata(msgspec.Struct):
    name: str
    namespace: str


class Event(msgspec.Struct, NamespacedResourceG, rename="camel"):
    """A core/v1 Event, as client-go's recorder writes it."""

    _api_info = ApiInfo(ResourceDef("", "v1", "Event"), "events", ["post"])
    metadata: EventMetadata
    involved_object: Reference
    type: str
    reason: str
    message: str
    first_timestamp: str
    last_timestamp: str
    source: dict[str, str]
    reporting_component: str
    reporting_instance: str
    count: int = 1
    apiVersion: str | None = "v1"  # noqa: N815 -- lightkube reads these two by name
    kind: str | None = "Event"


Watched = TypeVar("Watched", Node, NetworkPolicy)


class Change(msgspec.Struct, Generic[Watched], frozen=True):
    """ADDED, MODIFIED, DELETED, or BOOKMARK (of which only the resource version means anything)."""

    type: str
    object: Watched


class WatchEvent(msgspec.Struct, frozen=True):
    """One line of a watch; ``object`` stays raw until the type is known."""

    type: str
    object: msgspec.Raw


class Failure(msgspec.Struct, frozen=True):
    code: int = 0
    message: str = ""
    reason: str = ""
