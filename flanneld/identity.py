"""Who this node is, and the facts about it that a backend needs. Reads files, never the network."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from backends.backend import Underlay
from backends.kernel_state import Interface
from subnet_lease.lease import Family, Lease, NodeIdentity


def read_machine_id(path: Path = Path("/etc/machine-id")) -> str:
    """systemd's machine id, "" where there is none."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def node_identity(name: str, interfaces: tuple[Interface, ...], underlay: Underlay) -> NodeIdentity:
    """Name, machine id and the underlay interface's MAC: three marks (docs/adr: node identity)."""
    # Loopback's is zero on every host, which is no mark.
    mac = next((i.mac for i in interfaces if i.name == underlay.name and not i.loopback), None)
    return NodeIdentity(name=name, machine_id=read_machine_id(), mac=mac or "")


def derive_mac(identity: NodeIdentity, device: str, network: str) -> str:
    """A locally administered unicast MAC that is the same at every start of the same node (field problem 3)."""
    seed = "|".join((identity.name, identity.machine_id, identity.mac, device, network))
    digest = hashlib.sha256(seed.encode()).digest()
    return ":".join(f"{byte:02x}" for byte in bytes([(digest[0] & 0xFC) | 2]) + digest[1:6])


def vtep_mac(
    family: Family,
    own: Lease | None,
    device: str,
    interfaces: tuple[Interface, ...],
    identity: NodeIdentity,
    network: str,
) -> str:
    """Our VTEP MAC: from our own lease, else from the device that stands, else derived from who we are.

    Peers have what the lease says, so that comes first; after a takeover without a lease the device has what peers
    know. From then on it never changes by itself.
    """
    data = own.attrs.backend_data_of(family) if own is not None else None
    if isinstance(data, Mapping):
        published = {str(k).lower(): v for k, v in data.items()}.get("vtepmac")
        if isinstance(published, str) and published:
            return published.lower()
    standing = next((i.mac for i in interfaces if i.name == device and i.kind == "vxlan"), None)
    return standing or derive_mac(identity, device, network)
