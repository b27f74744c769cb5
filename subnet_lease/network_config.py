"""The network configuration: flannel's JSON, read as flannel reads it, refused with a reason.

Skeleton: the fields that the other rooms rely on.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from ipaddress import IPv4Network, IPv6Network
from typing import Any


@dataclass(frozen=True, slots=True)
class NetworkConfig:
    """``backend_options`` is the Backend object without its Type; ``unknown_keys`` are keys that nothing reads."""

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
    backend_type: str = "vxlan"
    backend_options: dict[str, Any] = field(default_factory=dict)
    unknown_keys: tuple[str, ...] = ()

    def network_of(self, family: int) -> IPv4Network | IPv6Network | None:
        """The cluster network of a family, None where that family is off."""
        if family == 4:
            return self.network if self.enable_ipv4 else None
        return self.ipv6_network if self.enable_ipv6 else None
