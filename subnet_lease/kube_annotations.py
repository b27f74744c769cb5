"""A Kubernetes node as a lease: flannel's annotations, read and rendered. Pure.

Names and values are flannel's (pkg/subnet/kube/annotations.go, kube.go). backend-data is written without spaces and
in flannel's key order: a flanneld that takes over finds its own MAC by splitting that text, not by parsing it.
"""

from __future__ import annotations

import ipaddress
import json
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Any, TypeVar

from subnet_lease.lease import FAMILIES, Lease, LeaseAttrs, NodeIdentity, marked_behind_nat
from subnet_lease.network_config import NetworkConfig

DEFAULT_PREFIX = "flannel.alpha.coreos.com"

# The suffixes that this daemon writes, and takes away when it gives its lease back.
_WRITTEN = (
    "backend-type",
    "backend-data",
    "backend-v6-data",
    "public-ip",
    "public-ipv6",
    "kube-subnet-manager",
    "behind-nat",
    "behind-nat-family",
)

_PREFIX = re.compile(r"(?:[a-z0-9_-]+\.)+[a-z0-9_-]+/(?:[a-z0-9_-]+-)?")

_Address = TypeVar("_Address", IPv4Address, IPv6Address)


class BadNode(ValueError):
    """A node whose annotations or podCIDRs cannot be read. The text names the annotation and its value."""


class BadPrefix(ValueError):
    """--kube-annotation-prefix cannot be the beginning of an annotation's name."""


@dataclass(frozen=True, slots=True)
class Keys:
    """Full annotation names: the prefix and a suffix."""

    prefix: str

    def name(self, suffix: str) -> str:
        return self.prefix + suffix


def keys_for(prefix: str) -> Keys:
    """``a.b`` becomes ``a.b/``, ``a.b/c`` becomes ``a.b/c-``, as in flannel. Raises BadPrefix."""
    full = prefix if "/" in prefix else f"{prefix}/"
    if not full.endswith(("/", "-")):
        full += "-"
    if _PREFIX.fullmatch(full) is None:
        raise BadPrefix(
            f"--kube-annotation-prefix={prefix}: must be a domain name such as {DEFAULT_PREFIX},"
            " optionally followed by / and lower-case letters, digits, - or _"
        )
    return Keys(full)


def pod_cidrs(cidrs: Iterable[str]) -> tuple[IPv4Network | None, IPv6Network | None]:
    """The node's subnets, one for each family at most. Raises BadNode."""
    v4: IPv4Network | None = None
    v6: IPv6Network | None = None
    for text in cidrs:
        try:
            network = ipaddress.ip_network(text, strict=False)
        except ValueError:
            raise BadNode(f"podCIDR {text!r} is not a network") from None
        if isinstance(network, IPv4Network):
            if v4 is not None:
                raise BadNode(f"two IPv4 podCIDRs, {v4} and {network}; a node has at most one for each family")
            v4 = network
        else:
            if v6 is not None:
                raise BadNode(f"two IPv6 podCIDRs, {v6} and {network}; a node has at most one for each family")
            v6 = network
    return v4, v6


def parse_lease(
    keys: Keys, config: NetworkConfig, name: str, annotations: Mapping[str, str], cidrs: Iterable[str]
) -> Lease | None:
    """The lease that a node stands for; None for a node that no flannel manages. Raises BadNode.

    A family counts when the configuration enables it and the node has both a podCIDR and a public address in it.
    """
    if annotations.get(keys.name("kube-subnet-manager")) != "true":
        return None
    subnet, ipv6_subnet = pod_cidrs(cidrs)
    public_ip = _address(keys.name("public-ip"), annotations, IPv4Address)
    public_ipv6 = _address(keys.name("public-ipv6"), annotations, IPv6Address)
    has_v4 = config.enable_ipv4 and subnet is not None and public_ip is not None
    has_v6 = config.enable_ipv6 and ipv6_subnet is not None and public_ipv6 is not None
    if not has_v4 and not has_v6:
        raise BadNode("no podCIDR with a public address in a family that the network configuration enables")
    attrs = LeaseAttrs(
        public_ip=public_ip if has_v4 else None,
        public_ipv6=public_ipv6 if has_v6 else None,
        backend_type=sys.intern(annotations.get(keys.name("backend-type"), "")),
        backend_data=_json(keys.name("backend-data"), annotations) if has_v4 else None,
        backend_v6_data=_json(keys.name("backend-v6-data"), annotations) if has_v6 else None,
        node=NodeIdentity(name),
    )
    if annotations.get(keys.name("behind-nat")) == "true":
        attrs = marked_behind_nat(attrs, {"4": 4, "6": 6}.get(annotations.get(keys.name("behind-nat-family"), "")))
    return Lease(subnet if has_v4 else None, ipv6_subnet if has_v6 else None, attrs)


def overwritten(keys: Keys, attrs: LeaseAttrs, annotations: Mapping[str, str]) -> LeaseAttrs:
    """What is really published: the operator's public-ip[v6]-overwrite annotations win. Raises BadNode."""
    v4 = _address(keys.name("public-ip-overwrite"), annotations, IPv4Address)
    v6 = _address(keys.name("public-ipv6-overwrite"), annotations, IPv6Address)
    shown = replace(
        attrs,
        public_ip=v4 if v4 is not None and attrs.public_ip is not None else attrs.public_ip,
        public_ipv6=v6 if v6 is not None and attrs.public_ipv6 is not None else attrs.public_ipv6,
    )
    elsewhere = (f for f in FAMILIES if shown.public_ip_of(f) != attrs.public_ip_of(f))
    return replace(shown, behind_nat=tuple(sorted({*attrs.behind_nat, *elsewhere})))


def rendered(keys: Keys, attrs: LeaseAttrs) -> dict[str, str | None]:
    """The annotations for these attributes; None for one that must not be there.

    A backend without data publishes the text ``null`` for each family that it runs, as flannel's does.
    """
    v4, v6 = attrs.public_ip is not None, attrs.public_ipv6 is not None
    values: dict[str, str | None] = {
        "backend-type": attrs.backend_type,
        "backend-data": compact_json(attrs.backend_data) if v4 else None,
        "backend-v6-data": compact_json(attrs.backend_v6_data) if v6 else None,
        "public-ip": str(attrs.public_ip) if v4 else None,
        "public-ipv6": str(attrs.public_ipv6) if v6 else None,
        "kube-subnet-manager": "true",
        "behind-nat": "true" if attrs.behind_nat else None,
        "behind-nat-family": str(attrs.nat_family) if attrs.nat_family is not None else None,
    }
    return {keys.name(suffix): value for suffix, value in values.items()}


def removed(keys: Keys) -> dict[str, str | None]:
    """Every annotation that the daemon writes, as something that must not be there."""
    return {keys.name(suffix): None for suffix in _WRITTEN}


def difference(wanted: Mapping[str, str | None], annotations: Mapping[str, str]) -> dict[str, str | None]:
    """The part of ``wanted`` that the node does not have yet."""
    return {name: value for name, value in wanted.items() if annotations.get(name) != value}


def public_address_hint(keys: Keys, annotations: Mapping[str, str]) -> tuple[IPv4Address | None, IPv6Address | None]:
    """The operator's node-public-ip and node-public-ipv6. Raises BadNode."""
    return (
        _address(keys.name("node-public-ip"), annotations, IPv4Address),
        _address(keys.name("node-public-ipv6"), annotations, IPv6Address),
    )


def compact_json(value: Any) -> str:
    """As Go's encoding/json writes it: no spaces, keys in the order given, ``<>&`` escaped."""
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _address(name: str, annotations: Mapping[str, str], kind: type[_Address]) -> _Address | None:
    text = annotations.get(name, "")
    if not text:
        return None
    try:
        return kind(text)
    except ValueError:
        raise BadNode(f"annotation {name}: {text!r} is not an {kind.__name__[:4]} address") from None


def _json(name: str, annotations: Mapping[str, str]) -> Any:
    text = annotations.get(name, "")
    if not text:
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise BadNode(f"annotation {name}: {text[:200]!r} is not JSON") from None
