"""A firewall handler in a namespace, and programs that are counted."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path

import pytest

from backends.kernel_state import Change, Firewall, Key, Record, Scope
from flanneld.dataplane import netfilter_legacy, netfilter_tools
from flanneld.dataplane.netfilter import Netfilter
from flanneld.lab.netns import Namespace
from flanneld.traffic_rules import firewalls
from subnet_lease.network_config import NetworkConfig

CLUSTER = {4: IPv4Network("10.244.0.0/16"), 6: IPv6Network("fd00:244::/48")}
SUBNETS = {4: IPv4Network("10.244.1.0/24"), 6: IPv6Network("fd00:244:0:1::/64")}
NETWORKS = tuple(str(network) for network in CLUSTER.values())

VARIANTS = ("nft", "legacy")
IPTABLES = ("iptables-save", "iptables-restore", "ip6tables-save", "ip6tables-restore")


@dataclass
class Programs:
    """A directory of wrappers that note each start and run the real program."""

    directory: Path
    variant: str = "nft"

    @property
    def _log(self) -> Path:
        return self.directory / "log"

    def add(self, *names: str) -> None:
        """Install wrappers; ``iptables-…`` run the chosen variant."""
        for name in names:
            real = name.replace("tables-", f"tables-{self.variant}-") if name in IPTABLES else name
            path = shutil.which(real, path="/usr/sbin:/usr/bin:/sbin:/bin")
            if path is None:
                pytest.skip(f"{real} is not installed (Debian packages iptables, nftables)")
            script = self.directory / name
            script.write_text(f'#!/bin/sh\necho "{name} $*" >>"{self._log}"\nexec {path} "$@"\n')
            script.chmod(0o755)

    def remove(self, *names: str) -> None:
        for name in names:
            (self.directory / name).unlink()

    def started(self) -> list[str]:
        """The programs started since the last call, without the questions after their version."""
        if not self._log.exists():
            return []
        lines = [line for line in self._log.read_text().splitlines() if not line.endswith("--version")]
        self._log.unlink()
        return lines


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Programs:
    """No program is there until it is added."""
    monkeypatch.setattr(netfilter_tools, "search_path", lambda: str(tmp_path))
    return Programs(tmp_path)


def wanted(
    mode: str, *, instance: str = "", families: tuple[int, ...] = (4, 6), keep: str | None = None
) -> tuple[Firewall, ...]:
    config = NetworkConfig(
        enable_ipv4=4 in families,
        enable_ipv6=6 in families,
        enable_nftables=mode == "nftables",
        network=CLUSTER[4],
        ipv6_network=CLUSTER[6],
        non_masquerade_cidrs=(IPv4Network(keep),) if keep else (),
    )
    return firewalls(config, SUBNETS, ip_masq=True, forward_rules=True, random_fully=True, instance=instance)


@dataclass
class Host:
    """What the dataplane and the reconciler do with the handler, in small."""

    handler: Netfilter
    clock: list[float] = field(default_factory=lambda: [0.0])

    def observe(self, firewall: tuple[Firewall, ...], instance: str = "") -> Mapping[Key, Record]:
        self.clock[0] += 60  # every schedule is due
        return self.handler.observe(Scope(networks=NETWORKS, firewall=firewall, instance=instance), {})

    def converge(self, firewall: tuple[Firewall, ...], instance: str = "") -> list[Change]:
        """One pass; the changes that it made."""
        seen = self.observe(firewall, instance)
        changes = [Change("put", f, seen.get(f.key)) for f in firewall if seen.get(f.key) != f]
        keys = {f.key for f in firewall}
        changes += [Change("remove", record, record) for key, record in seen.items() if key not in keys]
        assert self.handler.apply(changes) == []
        return changes


@contextlib.contextmanager
def handler_in(namespace: Namespace) -> Iterator[Host]:
    """A handler whose sockets belong to the namespace, with this thread in it."""
    with namespace.inside():
        clock = [0.0]
        handler = Netfilter(clock=lambda: clock[0])
        try:
            yield Host(handler, clock)
        finally:
            handler.close()


def need_legacy() -> None:
    """Skip where the kernel or the system has no iptables-legacy. Call it in a namespace: it makes the tables there."""
    if shutil.which("iptables-legacy", path="/usr/sbin:/sbin") is None:
        pytest.skip("iptables-legacy is not installed (Debian package iptables)")
    try:
        netfilter_tools.run(["/usr/sbin/iptables-legacy-save", "-t", "filter"])
    except netfilter_tools.ToolFailed as failed:
        pytest.skip(f"the kernel lacks iptables-legacy (module iptable_filter): {failed}")
    if not netfilter_legacy.tables_in_use(4):
        pytest.skip("the kernel lacks iptables-legacy (no /proc/net/ip_tables_names)")
