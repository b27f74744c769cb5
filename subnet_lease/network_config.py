"""The network configuration: flannel's JSON, read as flannel reads it (pkg/subnet/config.go), refused with a reason.

``parse_network_config`` reads; ``validate_for_allocation`` makes the checks that matter where subnets are handed out
from the configuration (etcd). In Kubernetes the subnets come from podCIDRs, and flannel checks nothing further.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_network
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from subnet_lease import go_json

V4 = IPv4Network
V6 = IPv6Network

DEFAULT_BACKEND = "vxlan"  # flannel's code says udp, its documentation vxlan; udp is slow and IPv4 only


@dataclass(frozen=True, slots=True)
class NetworkConfig:
    """``backend_options`` is the Backend object without its Type; ``unknown_keys`` are keys that nothing reads.

    ``subnet_min`` and ``subnet_max`` are the first and the last subnet that may be handed out. Before
    ``validate_for_allocation`` they are single addresses (/32, /128) or None, and a length of 0 means "not given".
    ``non_masquerade_cidrs`` are destinations towards which the pods' own address is kept (field problem 40).
    """

    enable_ipv4: bool = True
    enable_ipv6: bool = False
    enable_nftables: bool = False
    network: IPv4Network | None = None
    ipv6_network: IPv6Network | None = None
    subnet_len: int = 24
    ipv6_subnet_len: int = 64
    subnet_min: IPv4Network | None = None
    subnet_max: IPv4Network | None = None
    ipv6_subnet_min: IPv6Network | None = None
    ipv6_subnet_max: IPv6Network | None = None
    backend_type: str = DEFAULT_BACKEND
    backend_options: dict[str, Any] = field(default_factory=dict)
    unknown_keys: tuple[str, ...] = ()
    non_masquerade_cidrs: tuple[IPv4Network | IPv6Network, ...] = ()

    def network_of(self, family: int) -> IPv4Network | IPv6Network | None:
        """The cluster network of a family, None where that family is off."""
        if family == 4:
            return self.network if self.enable_ipv4 else None
        return self.ipv6_network if self.enable_ipv6 else None

    def subnet_len_of(self, family: int) -> int:
        """The prefix length of the subnets of a family."""
        return self.subnet_len if family == 4 else self.ipv6_subnet_len

    def subnet_range_of(self, family: int) -> tuple[IPv4Network | IPv6Network | None, IPv4Network | IPv6Network | None]:
        """The first and the last subnet of a family that may be handed out."""
        if family == 4:
            return self.subnet_min, self.subnet_max
        return self.ipv6_subnet_min, self.ipv6_subnet_max


def _ipv4_network(value: Any) -> IPv4Network | None:
    """Host bits are masked; 0.0.0.0/0, which k3s writes for a family that is off, is no network."""
    return _cidr(value, IPv4Network, "10.5.0.0/16")


def _ipv6_network(value: Any) -> IPv6Network | None:
    return _cidr(value, IPv6Network, "fc00:5::/48")


Network = TypeVar("Network", IPv4Network, IPv6Network)


def _cidr(value: Any, kind: type[Network], example: str) -> Network | None:
    try:
        if not isinstance(value, str) or "/" not in value or not value.rpartition("/")[2].isascii():
            raise ValueError
        if not value.rpartition("/")[2].isdigit():
            raise ValueError  # the library would take a netmask, Go does not
        if "%" in value:
            raise ValueError
        network = kind(value, strict=False)
    except ValueError:
        raise ValueError(f"must be an IPv{kind('::/0' if kind is IPv6Network else '0.0.0.0/0').version} network "
                         f'such as "{example}"') from None  # fmt: skip
    return network if network.prefixlen else None


def _ipv4_address(value: Any) -> IPv4Network | None:
    try:
        if not isinstance(value, str):
            raise ValueError
        address = IPv4Address(value)
    except ValueError:
        raise ValueError('must be an IPv4 address such as "10.5.1.0"') from None
    return IPv4Network(address) if int(address) else None


def _ipv6_address(value: Any) -> IPv6Network | None:
    if value is None:
        return None
    try:
        if not isinstance(value, str) or "%" in value:
            raise ValueError
        address = IPv6Address(value)
    except ValueError:
        raise ValueError('must be an IPv6 address such as "fc00:5:0:1::"') from None
    return IPv6Network(address) if int(address) else None


def _cidr_list(value: Any) -> tuple[IPv4Network | IPv6Network, ...]:
    if value is None:
        return ()
    if not isinstance(value, list):
        raise ValueError('must be a list of networks such as ["192.168.0.0/16"]')
    try:
        if not all(isinstance(item, str) and "/" in item for item in value):
            raise ValueError
        return tuple(ip_network(item, strict=False) for item in value)
    except ValueError:
        raise ValueError('every entry must be a network such as "192.168.0.0/16"') from None


class _Wire(BaseModel):
    """The keys as flannel spells them. Go's rule for null: an error for the value types, nothing for the others."""

    model_config = ConfigDict(strict=True, arbitrary_types_allowed=True)

    EnableIPv4: bool = True
    EnableIPv6: bool = False
    EnableNFTables: bool = False
    Network: Annotated[V4 | None, BeforeValidator(_ipv4_network)] = None
    IPv6Network: Annotated[V6 | None, BeforeValidator(_ipv6_network)] = None
    SubnetMin: Annotated[V4 | None, BeforeValidator(_ipv4_address)] = None
    SubnetMax: Annotated[V4 | None, BeforeValidator(_ipv4_address)] = None
    IPv6SubnetMin: Annotated[V6 | None, BeforeValidator(_ipv6_address)] = None
    IPv6SubnetMax: Annotated[V6 | None, BeforeValidator(_ipv6_address)] = None
    SubnetLen: int = Field(default=0, ge=0)
    IPv6SubnetLen: int = Field(default=0, ge=0)
    NonMasqueradeCIDRs: Annotated[tuple[Any, ...], BeforeValidator(_cidr_list)] = ()


_SCALARS = frozenset({"EnableIPv4", "EnableIPv6", "EnableNFTables", "SubnetLen", "IPv6SubnetLen"})
_NAMES = (*_Wire.model_fields, "Backend")


def parse_network_config(text: str) -> NetworkConfig:
    """Read the configuration; ConfigInvalid names key, value and rule."""
    # Imported late: store needs this module's NetworkConfig.
    from subnet_lease.store import ConfigInvalid

    try:
        return _parse(text)
    except ValueError as error:
        raise ConfigInvalid(f"network configuration: {error}") from None


def _parse(text: str) -> NetworkConfig:
    known, unknown = go_json.fold(go_json.parse_object(text), _NAMES)
    backend_type, backend_options = _backend(known.pop("Backend", {"Type": DEFAULT_BACKEND}))
    try:
        wire = _Wire.model_validate({k: v for k, v in known.items() if not (v is None and k in _SCALARS)})
    except ValidationError as error:
        raise ValueError(go_json.explain(error)) from None
    return NetworkConfig(
        enable_ipv4=wire.EnableIPv4,
        enable_ipv6=wire.EnableIPv6,
        enable_nftables=wire.EnableNFTables,
        network=wire.Network,
        ipv6_network=wire.IPv6Network,
        subnet_len=wire.SubnetLen,
        ipv6_subnet_len=wire.IPv6SubnetLen,
        subnet_min=wire.SubnetMin,
        subnet_max=wire.SubnetMax,
        ipv6_subnet_min=wire.IPv6SubnetMin,
        ipv6_subnet_max=wire.IPv6SubnetMax,
        backend_type=backend_type,
        backend_options=backend_options,
        unknown_keys=unknown,
        non_masquerade_cidrs=wire.NonMasqueradeCIDRs,
    )


def _backend(value: Any) -> tuple[str, dict[str, Any]]:
    if value is None:
        value = {}
    if not isinstance(value, dict):
        raise ValueError(f'Backend {go_json.describe(value)}: must be an object such as {{"Type":"vxlan"}}')
    known, others = go_json.fold(value, ("Type",))
    kind = known.get("Type")
    if kind is None or kind == "":
        raise ValueError(f'Backend.Type is missing in {go_json.describe(value)}: name one, such as "vxlan"')
    if not isinstance(kind, str):
        raise ValueError(f'Backend.Type {go_json.describe(kind)}: must be text such as "vxlan"')
    return kind.lower(), {key: value[key] for key in others}


def validate_for_allocation(config: NetworkConfig) -> NetworkConfig:
    """The checks that flannel makes in etcd mode, and the defaults of lengths and ranges filled in."""
    from subnet_lease.store import ConfigInvalid

    try:
        if not config.enable_ipv4 and not config.enable_ipv6:
            raise ValueError("EnableIPv4 and EnableIPv6 are both false: a network needs one family")
        if config.enable_ipv4:
            length, low, high = _ranges("", config.network, config.subnet_len, config.subnet_min, config.subnet_max)
            config = replace(config, subnet_len=length, subnet_min=low, subnet_max=high)
        if config.enable_ipv6:
            length, low6, high6 = _ranges(
                "IPv6", config.ipv6_network, config.ipv6_subnet_len, config.ipv6_subnet_min, config.ipv6_subnet_max
            )
            config = replace(config, ipv6_subnet_len=length, ipv6_subnet_min=low6, ipv6_subnet_max=high6)
    except ValueError as error:
        raise ConfigInvalid(f"network configuration: {error}") from None
    return config


def _ranges(
    word: str, network: Network | None, length: int, low: Network | None, high: Network | None
) -> tuple[int, Network, Network]:
    """Length, first and last subnet of one family; ``word`` is the prefix of its keys."""
    if network is None:
        off = f"EnableIPv{6 if word else 4}"
        raise ValueError(f"{word}Network is missing or empty while {off} is true: set it, or set {off} to false")
    length = _subnet_len(word, network, length)
    kind = type(network)
    size = 1 << (network.max_prefixlen - length)
    first, end = int(network.network_address), int(network.network_address) + network.num_addresses
    ends = []
    for key, given, default in ((f"{word}SubnetMin", low, first + size), (f"{word}SubnetMax", high, end - size)):
        address = int(given.network_address) if given is not None else default
        if not first <= address < end:
            raise ValueError(f"{key} {given.network_address if given else ''}: not inside {word}Network {network}")
        if address % size:
            raise ValueError(
                f"{key} {given.network_address if given else ''}: not on a boundary of {word}SubnetLen {length}"
            )
        ends.append(kind((address, length)))
    if ends[0] > ends[1]:
        raise ValueError(
            f"{word}SubnetMin {ends[0].network_address} is above {word}SubnetMax {ends[1].network_address}"
        )
    return length, ends[0], ends[1]


def _subnet_len(word: str, network: IPv4Network | IPv6Network, length: int) -> int:
    key, longest, usual = f"{word}SubnetLen", network.max_prefixlen - 2, 64 if word else 24
    if length == 0:
        if network.prefixlen > longest - 2:
            raise ValueError(f"{word}Network {network}: too small, the longest useful prefix is /{longest - 2}")
        return usual if network.prefixlen <= usual - 2 else network.prefixlen + 2
    if length > longest:
        raise ValueError(f"{key} {length}: must be at most {longest}")
    if length < network.prefixlen + 2:
        raise ValueError(
            f"{key} {length}: {word}Network {network} must hold at least four subnets, "
            f"so it must be {network.prefixlen + 2} or more"
        )
    return length
