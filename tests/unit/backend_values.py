"""Hosts and leases to ask a backend about."""

from __future__ import annotations

from collections.abc import Mapping
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_network
from typing import Any

from backends.backend import Host, Underlay
from subnet_lease.lease import IPNetwork, Lease, LeaseAttrs
from subnet_lease.network_config import NetworkConfig

V4 = IPv4Network("10.5.0.0/16")
V6 = IPv6Network("fc00::/48")


def underlay(
    v4: str | None = "192.168.64.2",
    v6: str | None = None,
    public4: str | None = None,
    public6: str | None = None,
    mtu: int = 1500,
    prefixes: tuple[str, ...] = ("192.168.64.0/24", "2001:db8:64::/64"),
) -> Underlay:
    local: dict[Any, Any] = {}
    if v4:
        local[4] = IPv4Address(v4)
    if v6:
        local[6] = IPv6Address(v6)
    public = dict(local)
    if public4:
        public[4] = IPv4Address(public4)
    if public6:
        public[6] = IPv6Address(public6)
    return Underlay("eth0", mtu, local, public, tuple(ip_network(prefix) for prefix in prefixes))


def host(
    *,
    v4: bool = True,
    v6: bool = False,
    under: Underlay | None = None,
    facts: Mapping[str, str] | None = None,
    leased: bool = True,
) -> Host:
    """A node that holds 10.5.1.0/24 (and fc00:0:0:1::/64) of the families asked for."""
    subnets: dict[Any, IPNetwork] = {}
    if v4 and leased:
        subnets[4] = IPv4Network("10.5.1.0/24")
    if v6 and leased:
        subnets[6] = IPv6Network("fc00:0:0:1::/64")
    config = NetworkConfig(enable_ipv4=v4, enable_ipv6=v6, network=V4 if v4 else None, ipv6_network=V6 if v6 else None)
    chosen = under or underlay("192.168.64.2" if v4 else None, "2001:db8:64::2" if v6 else None)
    return Host(chosen, config, subnets, facts or {})


def lease(
    number: int = 2,
    backend_type: str = "host-gw",
    *,
    v4: bool = True,
    v6: bool = False,
    public4: str | None = "192.168.64.3",
    public6: str | None = "2001:db8:64::3",
    data: Any = None,
    v6_data: Any = None,
) -> Lease:
    """The lease of 10.5.NUMBER.0/24 (and fc00:0:0:NUMBER::/64)."""
    return Lease(
        IPv4Network(f"10.5.{number}.0/24") if v4 else None,
        IPv6Network(f"fc00:0:0:{number:x}::/64") if v6 else None,
        LeaseAttrs(
            IPv4Address(public4) if v4 and public4 else None,
            IPv6Address(public6) if v6 and public6 else None,
            backend_type,
            data,
            v6_data,
        ),
    )
