"""WireGuard in the kernel: rtnetlink makes the device, the generic netlink family "wireguard" sets it."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Sequence
from typing import Any

from flanneld.dataplane.links import IFINFOMSG, IFLA_IFNAME, IFLA_INFO_KIND, IFLA_LINKINFO, NESTED
from flanneld.dataplane.netlink import Netlink, NetlinkError
from flanneld.dataplane.wire import NLM_F_CREATE, NLM_F_EXCL, RTM_NEWLINK, attribute
from flanneld.dataplane.wireguard_device import DeviceState, NotHere, PeerState, PeerWrite, canonical

_NO_KEY = "A" * 43 + "="


class Kernel:
    """Engine over the kernel module."""

    name = "kernel"

    def __init__(self) -> None:
        self._open: Any = None

    def holds(self, dev: str, kind: str) -> bool:  # noqa: ARG002 - the name does not matter here
        return kind == "wireguard"

    def create(self, dev: str) -> None:
        body = IFINFOMSG.pack(0, 0, 0, 0, 0, 0) + attribute(IFLA_IFNAME, dev.encode() + b"\0")
        body += attribute(IFLA_LINKINFO | NESTED, attribute(IFLA_INFO_KIND, b"wireguard\0"))
        with contextlib.closing(Netlink()) as netlink:
            try:
                netlink.request(RTM_NEWLINK, NLM_F_CREATE | NLM_F_EXCL, body)
            except NetlinkError as error:
                if error.errno == errno.EOPNOTSUPP:
                    # The kernel has already tried to load the module by itself.
                    raise NotHere(errno.EOPNOTSUPP, "the kernel has no module wireguard") from error
                raise OSError(error.errno, f"the kernel does not make the device {dev}: {error}") from error

    def read(self, dev: str) -> DeviceState:
        with self._says(dev):
            return decode(self._netlink().info(dev))

    def configure(self, dev: str, private_key: str, listen_port: int) -> None:
        with self._says(dev):
            self._netlink().set(dev, private_key=private_key, listen_port=listen_port)

    def write(self, dev: str, peers: Sequence[PeerWrite]) -> None:
        for peer in peers:
            with self._says(dev):
                self._netlink().set(dev, peer=encode(peer))

    def close(self) -> None:
        if self._open is not None:
            self._open.close()
            self._open = None

    def _netlink(self) -> Any:
        if self._open is None:
            from pyroute2 import WireGuard

            self._open = WireGuard()
        return self._open

    @contextlib.contextmanager
    def _says(self, dev: str) -> Any:
        """The library raises errors of its own; here they become sentences."""
        from pyroute2.netlink.exceptions import NetlinkError as LibraryError

        try:
            yield
        except LibraryError as error:
            raise OSError(error.code, f"the kernel refuses it for {dev}: {error}") from error


def encode(peer: PeerWrite) -> dict[str, Any]:
    """What pyroute2 takes for one peer."""
    if peer.remove:
        return {"public_key": peer.public_key, "remove": True}
    told: dict[str, Any] = {"public_key": peer.public_key}
    if peer.endpoint is not None:
        address, _, port = peer.endpoint.rpartition(":")
        told |= {"endpoint_addr": address.strip("[]"), "endpoint_port": int(port)}
    if peer.preshared_key is not None:
        told["preshared_key"] = peer.preshared_key or _NO_KEY
    if peer.keepalive is not None:
        told["persistent_keepalive"] = peer.keepalive
    if peer.allowed_ips is not None:
        told |= {"replace_allowed_ips": True, "allowed_ips": list(peer.allowed_ips)}
    return told


def decode(messages: Sequence[Any]) -> DeviceState:
    """A device from the messages of a dump; a peer with many AllowedIPs goes on in the next message."""
    state = DeviceState()
    for message in messages:
        state.private_key = _text(message.get_attr("WGDEVICE_A_PRIVATE_KEY")) or state.private_key
        state.listen_port = message.get_attr("WGDEVICE_A_LISTEN_PORT") or state.listen_port
        for told in message.get_attr("WGDEVICE_A_PEERS") or ():
            public_key = _text(told.get_attr("WGPEER_A_PUBLIC_KEY"))
            peer = state.peers.setdefault(public_key, PeerState())
            _read_peer(peer, told)
    for peer in state.peers.values():
        peer.allowed_ips = canonical(peer.allowed_ips)
    return state


def _read_peer(peer: PeerState, told: Any) -> None:
    preshared = _text(told.get_attr("WGPEER_A_PRESHARED_KEY"))
    if preshared and preshared != _NO_KEY:
        peer.preshared_key = preshared
    endpoint = told.get_attr("WGPEER_A_ENDPOINT")
    if endpoint:
        address = endpoint["addr"]
        peer.endpoint = f"[{address}]:{endpoint['port']}" if ":" in address else f"{address}:{endpoint['port']}"
    handshake = told.get_attr("WGPEER_A_LAST_HANDSHAKE_TIME")
    peer.handshake = handshake["tv_sec"] if handshake else peer.handshake
    peer.keepalive = told.get_attr("WGPEER_A_PERSISTENT_KEEPALIVE_INTERVAL") or peer.keepalive
    peer.received = told.get_attr("WGPEER_A_RX_BYTES") or peer.received
    peer.sent = told.get_attr("WGPEER_A_TX_BYTES") or peer.sent
    peer.allowed_ips += tuple(allowed["addr"] for allowed in told.get_attr("WGPEER_A_ALLOWEDIPS") or ())


def _text(value: Any) -> str:
    """The library's keys: a dict with the base64 text in bytes."""
    if value is None:
        return ""
    found = value["value"] if isinstance(value, dict) or hasattr(value, "fields") else value
    return found.decode() if isinstance(found, bytes) else str(found)
