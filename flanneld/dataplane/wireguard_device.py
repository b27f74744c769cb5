"""What a WireGuard device holds, and what the two implementations, kernel and wireguard-go, have in common."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from ipaddress import ip_network
from typing import Protocol


class NotHere(OSError):
    """This implementation is not available on this host; the text says what is missing."""


@dataclass(slots=True)
class PeerState:
    """One peer as the device has it. ``handshake`` is in Unix seconds, 0 for never; ``endpoint`` is "" for none."""

    endpoint: str = ""
    allowed_ips: tuple[str, ...] = ()
    keepalive: int = 0
    preshared_key: str | None = field(default=None, repr=False)
    handshake: float = 0
    received: int = 0
    sent: int = 0


@dataclass(slots=True)
class DeviceState:
    """One device. Keys are in base64, as everywhere but on wireguard-go's socket."""

    private_key: str = field(default="", repr=False)
    listen_port: int = 0
    peers: dict[str, PeerState] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PeerWrite:
    """A change of one peer; None leaves a setting as it is, "" takes the preshared key away."""

    public_key: str
    remove: bool = False
    endpoint: str | None = None
    allowed_ips: tuple[str, ...] | None = None
    keepalive: int | None = None
    preshared_key: str | None = field(default=None, repr=False)


class Engine(Protocol):
    """Who does the encryption. All methods raise OSError with a whole sentence."""

    name: str
    """As status shows it: "kernel" or "wireguard-go"."""
    clings_to_source: bool
    """Whether a peer's packets leave from the address that the last one came to, although it is gone, until its
    endpoint is set anew or the peer is heard of again."""

    def create(self, dev: str) -> None:
        """Make the device. Raises NotHere where this implementation cannot work."""

    def holds(self, dev: str, kind: str) -> bool:
        """Whether the standing device, of this kind for rtnetlink, is this implementation's."""

    def read(self, dev: str) -> DeviceState:
        """Everything about the device."""

    def configure(self, dev: str, private_key: str, listen_port: int) -> None:
        """Set the key and the port; peers stay."""

    def write(self, dev: str, peers: Sequence[PeerWrite]) -> None:
        """Make changes, in order, up to the first that is refused."""

    def close(self) -> None:
        """Let go of sockets; devices stay."""


def canonical(allowed_ips: Sequence[str]) -> tuple[str, ...]:
    """IPv4 before IPv6, each by address: the order in which records hold them."""
    if len(allowed_ips) < 2:
        return tuple(allowed_ips)
    networks = (ip_network(text) for text in allowed_ips)
    return tuple(str(n) for n in sorted(networks, key=lambda n: (n.version, int(n.network_address), n.prefixlen)))
