"""How a lease is spelled in etcd: flannel's key and flannel's JSON, byte for byte (pkg/subnet, pkg/lease).

Key:   10.5.52.0-24   or   10.5.52.0-24&fc00:0:0:34::-64
Value: {"PublicIP":"192.168.64.3","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"…"}}

One key of our own, ``Node``, may stand at the end; flannel ignores it.
"""

from __future__ import annotations

import json
import re
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Any, Final

from subnet_lease import go_json
from subnet_lease.lease import LeaseAttrs, NodeIdentity, marked_behind_nat, subnet_key

_OCTET: Final = r"(0|[1-9][0-9]{0,2})"
_IPV4: Final = re.compile(rf"{_OCTET}\.{_OCTET}\.{_OCTET}\.{_OCTET}")
_KEY: Final = re.compile(rf"{_IPV4.pattern}-(0|[1-9][0-9]?)(?:&([0-9a-f:.]+)-([1-9][0-9]{{0,2}}))?")
_NAMES: Final = frozenset({"PublicIP", "PublicIPv6", "BackendType", "BackendData", "BackendV6Data", "Node"})
_MARKS: Final = frozenset({"Name", "MachineID", "MAC", "BehindNAT", "BehindNATFamily"})
_NO_BACKEND_TYPE: Final = frozenset({"udp", "alloc", "tencent-vpc"})  # flannel leaves the key out for these
# What Go's encoder escapes beyond JSON's own needs.
_GO_ESCAPES: Final = str.maketrans(
    {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"}
)


def encode_attrs(attrs: LeaseAttrs) -> str:
    """The value of a lease's key."""
    value: dict[str, Any] = {
        "PublicIP": str(attrs.public_ip or "0.0.0.0"),
        "PublicIPv6": str(attrs.public_ipv6) if attrs.public_ipv6 else None,
    }
    if attrs.backend_type and attrs.backend_type not in _NO_BACKEND_TYPE:
        value["BackendType"] = attrs.backend_type
    if attrs.backend_data is not None:
        value["BackendData"] = attrs.backend_data
    if attrs.backend_v6_data is not None:
        value["BackendV6Data"] = attrs.backend_v6_data
    if attrs.node is not None:
        value["Node"] = {"Name": attrs.node.name, "MachineID": attrs.node.machine_id, "MAC": attrs.node.mac}
        if attrs.behind_nat:
            value["Node"]["BehindNAT"] = True
        if attrs.nat_family is not None:
            # Beside the flag: daemons before this key read that alone, and then send nothing directly.
            value["Node"]["BehindNATFamily"] = attrs.nat_family
    return go_dumps(value)


def go_dumps(value: Any) -> str:
    """JSON as Go's json.Marshal writes it: no spaces, text beyond ASCII as it is, <, > and & escaped."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.translate(_GO_ESCAPES).encode("utf-8", "replace").decode()


def decode_attrs(text: str) -> LeaseAttrs:
    """Read a lease's value by Go's rules; other keys are ignored. ValueError names key, value and rule."""
    value, _ = go_json.fold(go_json.parse_object(text), _NAMES)
    backend_type = value.get("BackendType")
    if backend_type is not None and not isinstance(backend_type, str):
        raise ValueError(f"BackendType {go_json.describe(backend_type)}: must be text")
    node, marks = _node(value.get("Node"))
    attrs = LeaseAttrs(
        public_ip=_public_ip(value["PublicIP"]) if "PublicIP" in value else None,
        public_ipv6=_public_ipv6(value.get("PublicIPv6")),
        backend_type=backend_type or "",
        backend_data=value.get("BackendData"),
        backend_v6_data=value.get("BackendV6Data"),
        node=node,
    )
    return marked_behind_nat(attrs, marks.get("BehindNATFamily")) if marks.get("BehindNAT") is True else attrs


def _public_ip(value: Any) -> IPv4Address | None:
    try:
        if not isinstance(value, str):
            raise ValueError
        parts = _IPV4.fullmatch(value)
        if parts is None:
            raise ValueError
        address = IPv4Address(bytes(map(int, parts.groups())))
    except ValueError:
        raise ValueError(f"PublicIP {go_json.describe(value)}: must be an IPv4 address") from None
    if address.is_multicast or int(address) == 0xFFFFFFFF:
        raise ValueError(f"PublicIP {address}: must be the address of one node, not multicast or broadcast")
    return address if int(address) else None


def _public_ipv6(value: Any) -> IPv6Address | None:
    if value is None:
        return None
    try:
        if not isinstance(value, str) or "%" in value:
            raise ValueError
        address = IPv6Address(value)
    except ValueError:
        raise ValueError(f"PublicIPv6 {go_json.describe(value)}: must be an IPv6 address") from None
    if address.is_multicast:
        raise ValueError(f"PublicIPv6 {address}: must be the address of one node, not multicast")
    return address if int(address) else None


def _node(value: Any) -> tuple[NodeIdentity | None, dict[str, Any]]:
    """The owner's identity, and what else it says of itself; a key that someone else wrote in another shape is ignored."""
    if not isinstance(value, dict):
        return None, {}
    known, _ = go_json.fold(value, _MARKS)
    name, machine_id, mac = known.get("Name", ""), known.get("MachineID", ""), known.get("MAC", "")
    if not (isinstance(name, str) and isinstance(machine_id, str) and isinstance(mac, str)):
        return None, {}
    return (NodeIdentity(name, machine_id, mac), known) if name or machine_id or mac else (None, {})


def parse_subnet_key(key: str) -> tuple[IPv4Network | None, IPv6Network | None]:
    """The subnets that a key names, None for the IPv4 part 0.0.0.0-0. ValueError says what is wrong."""
    parts = _KEY.fullmatch(key)
    if parts is None:
        raise ValueError(f"key {key!a}: must look like 10.5.52.0-24 or 10.5.52.0-24&fc00:0:0:34::-64")
    try:
        base, length = bytes(map(int, parts.groups()[:4])), int(parts[5])
        v4 = IPv4Network((base, length)) if length or any(base) else None
        v6 = IPv6Network(f"{parts[6]}/{parts[7]}") if parts[6] else None
    except ValueError as error:
        raise ValueError(f"key {key!a}: {error}") from None
    if v4 is None and v6 is None:
        raise ValueError(f"key {key!a}: names no subnet")
    if (v4 and not 0 < v4.prefixlen <= 31) or (v6 and not 0 < v6.prefixlen <= 127):
        raise ValueError(f"key {key!a}: the prefix length must be 1 to 31, for IPv6 1 to 127")
    if v6 and subnet_key(v4, v6) != key:
        raise ValueError(f"key {key!a}: must be spelled {subnet_key(v4, v6)}")
    return v4, v6
