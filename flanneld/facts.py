"""Find the facts that a backend needs about this node before it can say what it publishes."""

from __future__ import annotations

from typing import Protocol, cast

from backends.backend import Backend, BackendError, Underlay
from backends.kernel_state import Interface
from flanneld.identity import vtep_mac
from flanneld.options import Options
from subnet_lease.lease import FAMILIES, Family, Lease, NodeIdentity
from subnet_lease.network_config import NetworkConfig


class _HasVtep(Protocol):
    def device(self, family: Family) -> str: ...


def find_facts(
    backend: Backend,
    options: Options,
    config: NetworkConfig,
    underlay: Underlay,
    identity: NodeIdentity,
    interfaces: tuple[Interface, ...],
    own: Lease | None,
) -> dict[str, str]:
    """Answers to ``backend.needs``, as ``Host.facts`` wants them. BackendError when one cannot be had."""
    facts: dict[str, str] = {}
    unknown = backend.needs - {"vtep_mac", "wireguard_key", "startup_output"}
    if unknown:
        raise BackendError(f"backend {backend.name} needs {', '.join(sorted(unknown))}, which flanneld cannot find")
    if "vtep_mac" in backend.needs:
        name_of = cast("_HasVtep", backend).device
        for family in FAMILIES:
            network = str(config.network_of(family))
            key = "vtep_mac" if family == 4 else "vtep_mac_v6"
            facts[key] = vtep_mac(family, own, name_of(family), interfaces, identity, network)
    if "wireguard_key" in backend.needs:
        from flanneld.wireguard_key import load_or_make_key

        facts["wireguard_key"], facts["wireguard_public_key"] = load_or_make_key(options.wireguard_key_file)
    if "startup_output" in backend.needs:
        from flanneld.startup_command import run_startup_command

        facts["startup_output"] = run_startup_command(backend, config, underlay, options.subnet_file)
    return facts
