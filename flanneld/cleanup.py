"""Leave the host as if flanneld had never run here: the plan towards the empty state, applied once."""

from __future__ import annotations

from contextlib import suppress
from ipaddress import ip_interface
from pathlib import Path

from backends.kernel_state import Change, Interface, Scope, is_flannel_device
from cni.daemon_status import lock_path
from flanneld.dataplane.assemble import make_dataplane
from flanneld.host_claims import HostClaims
from flanneld.options import Options
from flanneld.outputs import STATUS_FILE
from flanneld.ownership import ownership, with_marked_routes, within
from flanneld.plan import plan
from flanneld.startup_command import hooks_file
from subnet_lease import subnet_file
from subnet_lease.lease import IPNetwork


class CleanupError(Exception):
    """Something of ours could not be removed; the text names it."""


def cleanup(options: Options) -> list[Change]:
    """Remove devices, routes, rules and files of this instance; what was removed. CleanupError if something stays."""
    path = Path(options.subnet_file)
    content = None
    with suppress(ValueError, OSError):
        content = subnet_file.read(path)
    dataplane = make_dataplane(hooks_file(options.subnet_file))
    try:
        bare = dataplane.observe(Scope(instance=options.instance))
        others = HostClaims().other_networks()
        networks = _networks(content, bare.interfaces, others)
        scope = Scope(networks=tuple(map(str, networks)), instance=options.instance, marked_routes=content is None)
        observed = dataplane.observe(scope)
        owned = ownership(observed.interfaces, networks, frozenset())
        if content is None:
            owned = with_marked_routes(owned, others)
        changes = plan({}, observed.state, owned)
        failures = dataplane.apply(changes)
    finally:
        dataplane.close()
    if failures:
        raise CleanupError("; ".join(failure.message for failure in failures))
    path.unlink(missing_ok=True)
    path.with_name(STATUS_FILE).unlink(missing_ok=True)
    Path(lock_path(options.subnet_file)).unlink(missing_ok=True)
    return changes


def _networks(
    content: subnet_file.SubnetFile | None, interfaces: tuple[Interface, ...], others: tuple[IPNetwork, ...]
) -> tuple[IPNetwork, ...]:
    """What was ours: subnet.env says it; without one, whatever the devices with flannel's names carry.

    But for the networks of other daemons that run on this host.
    """
    if content is not None:
        return tuple(n for n in (content.network, content.ipv6_network) if n is not None)
    return tuple(
        ip_interface(address.address).network
        for interface in interfaces
        if is_flannel_device(interface.name)
        for address in interface.addresses
        if not ip_interface(address.address).ip.is_link_local and not within(address.address, others)
    )
