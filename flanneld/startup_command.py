"""The fact "startup_output": what the extension backend's PreStartupCommand printed."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol, cast

from backends.backend import Backend, BackendError, Underlay
from flanneld.dataplane.hooks import CommandFailed, startup_output
from subnet_lease.network_config import NetworkConfig


class _HasStartupCommand(Protocol):
    @property
    def startup_command(self) -> str: ...


def hooks_file(subnet_file: str) -> Path:
    """Where the commands that have run are remembered: beside subnet.env, so that a second daemon has its own."""
    return Path(subnet_file).with_suffix(".hooks.json")


def run_startup_command(backend: Backend, config: NetworkConfig, underlay: Underlay, subnet_file: str) -> str:
    """Run it, unless it has run since the last boot. BackendError says what went wrong."""
    command = cast("_HasStartupCommand", backend).startup_command
    values = {
        "NETWORK": config.network_of(4),
        "IPV6NETWORK": config.network_of(6),
        "PUBLIC_IP": underlay.public.get(4),
        "PUBLIC_IPV6": underlay.public.get(6),
    }
    environment = [(name, "" if value is None else str(value)) for name, value in values.items()]
    state_file = hooks_file(subnet_file)
    try:
        return startup_output(state_file, command, environment)
    except CommandFailed as error:
        raise BackendError(f"PreStartupCommand failed: {error}") from error
    except OSError as error:
        raise BackendError(f"PreStartupCommand cannot be remembered in {state_file}: {error.strerror}") from error
