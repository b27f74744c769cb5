"""extension: the operator's own commands, run by ``sh -c`` when a peer comes and when it goes.

A command appears here as a Hook record: "the add command has run for this peer with these values". What the commands do
to the kernel is theirs alone; nobody here looks at it or repairs it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict

from backends.backend import BackendError, Host, PeerRefused, Published, Underlay
from backends.kernel_state import Hook
from subnet_lease.go_json import decode_options
from subnet_lease.lease import FAMILIES, Family, Lease


class ExtensionOptions(BaseModel):
    """The configuration's Backend object, with flannel's keys."""

    model_config = ConfigDict(frozen=True)

    PreStartupCommand: str = ""
    PostStartupCommand: str = ""
    SubnetAddCommand: str = ""
    SubnetRemoveCommand: str = ""
    ShutdownCommand: str = ""


class Extension:
    """flannel's extension backend, with a real shell and the environment in full.

    The daemon runs ``startup_command`` before it has a lease; the output becomes the fact "startup_output" and is what
    we publish.
    """

    name: ClassVar[str] = "extension"
    needs: ClassVar[frozenset[str]] = frozenset({"startup_output"})

    def __init__(self, options: Mapping[str, Any]) -> None:
        try:
            self.options, self.unknown_options = decode_options(ExtensionOptions, options)
        except ValueError as error:
            raise BackendError(f"extension backend: {error}") from error

    @property
    def startup_command(self) -> str:
        """What finds the fact "startup_output"; "" when there is nothing to run, and then no fact is needed."""
        return self.options.PreStartupCommand

    def mtu(self, underlay: Underlay, families: tuple[Family, ...]) -> int:
        return underlay.mtu

    def published(self, host: Host) -> Published:
        """The output of PreStartupCommand as a JSON string, for each family that the network runs."""
        if not self.startup_command:
            return Published(self.name)
        output = host.facts["startup_output"]
        data = {family: output for family in FAMILIES if host.config.network_of(family)}
        return Published(self.name, data.get(4), data.get(6))

    def accepts(self, peer: Lease) -> bool:
        return peer.attrs.backend_type == self.name

    def host_state(self, host: Host) -> tuple[Hook, ...]:
        if not (self.options.PostStartupCommand or self.options.ShutdownCommand):
            return ()
        environment = _environment(host, host.subnets, host.underlay.public)
        return (Hook("host", self.options.PostStartupCommand, self.options.ShutdownCommand, environment),)

    def peer_state(self, host: Host, peer: Lease) -> tuple[Hook, ...]:
        if not (self.options.SubnetAddCommand or self.options.SubnetRemoveCommand):
            return ()
        data = peer.attrs.backend_data if peer.attrs.backend_data is not None else peer.attrs.backend_v6_data
        if not isinstance(data, str | None):
            raise PeerRefused(f"lease {peer.cidr} publishes BackendData {data!r}, where extension has a JSON string")
        environment = _environment(
            host,
            {family: peer.subnet_of(family) for family in host.families},
            {family: peer.attrs.public_ip_of(family) for family in host.families},
        )
        name = f"peer {peer.key}"
        return (
            Hook(
                name, self.options.SubnetAddCommand, self.options.SubnetRemoveCommand, environment, (data or "") + "\n"
            ),
        )


def _environment(
    host: Host, subnets: Mapping[Family, object], addresses: Mapping[Family, object]
) -> tuple[tuple[str, str], ...]:
    """What a command finds in its environment; a family that is off leaves its variables empty, never unset."""
    values = {
        "NETWORK": host.config.network_of(4),
        "IPV6NETWORK": host.config.network_of(6),
        "SUBNET": subnets.get(4),
        "IPV6SUBNET": subnets.get(6),
        "PUBLIC_IP": addresses.get(4),
        "PUBLIC_IPV6": addresses.get(6),
    }
    return tuple((name, "" if value is None else str(value)) for name, value in values.items())
