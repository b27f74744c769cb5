"""The bytes of the kernel's WireGuard interface: generic netlink, family "wireguard".

Numbers are those of include/uapi/linux/wireguard.h; the tests compare both directions with pyroute2's tables.
"""

from __future__ import annotations

from base64 import b64decode, b64encode
from collections.abc import Iterable, Sequence
from ipaddress import ip_network
from socket import AF_INET, AF_INET6, htons, inet_ntop, inet_pton
from struct import Struct
from typing import Final

from flanneld.dataplane.wire import NLMSG_DONE, U32, attribute, attributes
from flanneld.dataplane.wireguard_device import DeviceState, PeerState, PeerWrite, canonical

GENERIC_HEADER: Final = Struct("=BBH")  # command, version, reserved
CONTROL_FAMILY: Final = 16  # GENL_ID_CTRL
_GET_FAMILY, _FAMILY_ID, _FAMILY_NAME = 3, 1, 2
_GET_DEVICE, _SET_DEVICE, _VERSION = 0, 1, 1

_IFNAME, _PRIVATE_KEY, _LISTEN_PORT, _PEERS = 2, 3, 6, 8
_PUBLIC_KEY, _PRESHARED_KEY, _FLAGS, _ENDPOINT, _KEEPALIVE, _HANDSHAKE, _RECEIVED, _SENT, _ALLOWED_IPS = range(1, 10)
_REMOVE_ME, _REPLACE_ALLOWED_IPS = 1, 2
_IP_FAMILY, _IP_ADDRESS, _IP_PREFIX = 1, 2, 3

_NESTED: Final = 0x8000
_U16: Final = Struct("=H")
_U64: Final = Struct("=Q")
_NO_KEY: Final = bytes(32)
_SOCKADDR: Final = Struct("=HH")  # family; port in network order


def family_request(name: str) -> bytes:
    """Asks the kernel for the number of a generic netlink family."""
    return GENERIC_HEADER.pack(_GET_FAMILY, 1, 0) + attribute(_FAMILY_NAME, name.encode() + b"\0")


def family_number(answer: bytes) -> int:
    """The number in the answer to ``family_request``."""
    for kind, start, _ in attributes(answer, 20, len(answer)):
        if kind == _FAMILY_ID:
            return int(_U16.unpack_from(answer, start)[0])
    raise ValueError("the kernel's answer has no family number")


def get_device(dev: str) -> bytes:
    return GENERIC_HEADER.pack(_GET_DEVICE, _VERSION, 0) + attribute(_IFNAME, dev.encode() + b"\0")


def set_device(dev: str, private_key: str, listen_port: int) -> bytes:
    body = _set(dev) + attribute(_PRIVATE_KEY, b64decode(private_key))
    return body + attribute(_LISTEN_PORT, _U16.pack(listen_port))


def set_peers(dev: str, peers: Iterable[PeerWrite]) -> bytes:
    """Changes peers, in order; at most a few hundred, since an attribute holds 64 KiB."""
    return _set(dev) + attribute(_PEERS | _NESTED, b"".join(attribute(_NESTED, _peer(peer)) for peer in peers))


def _set(dev: str) -> bytes:
    return GENERIC_HEADER.pack(_SET_DEVICE, _VERSION, 0) + attribute(_IFNAME, dev.encode() + b"\0")


def _peer(peer: PeerWrite) -> bytes:
    body = attribute(_PUBLIC_KEY, b64decode(peer.public_key))
    if peer.remove:
        return body + attribute(_FLAGS, U32.pack(_REMOVE_ME))
    if peer.preshared_key is not None:
        body += attribute(_PRESHARED_KEY, b64decode(peer.preshared_key) or _NO_KEY)
    if peer.endpoint is not None:
        body += attribute(_ENDPOINT, _pack_endpoint(peer.endpoint))
    if peer.keepalive is not None:
        body += attribute(_KEEPALIVE, _U16.pack(peer.keepalive))
    if peer.allowed_ips is not None:
        body += attribute(_FLAGS, U32.pack(_REPLACE_ALLOWED_IPS))
        nested = b"".join(attribute(_NESTED, _allowed_ip(text)) for text in peer.allowed_ips)
        body += attribute(_ALLOWED_IPS | _NESTED, nested)
    return body


def _allowed_ip(text: str) -> bytes:
    network = ip_network(text)
    family = AF_INET if network.version == 4 else AF_INET6
    body = attribute(_IP_FAMILY, _U16.pack(family)) + attribute(_IP_ADDRESS, network.network_address.packed)
    return body + attribute(_IP_PREFIX, bytes([network.prefixlen]))


def _pack_endpoint(endpoint: str) -> bytes:
    """struct sockaddr_in or sockaddr_in6."""
    host, _, port = endpoint.rpartition(":")
    host = host.strip("[]")
    if ":" in host:
        return _SOCKADDR.pack(AF_INET6, htons(int(port))) + bytes(4) + inet_pton(AF_INET6, host) + bytes(4)
    return _SOCKADDR.pack(AF_INET, htons(int(port))) + inet_pton(AF_INET, host) + bytes(8)


def decode_device(messages: Sequence[tuple[int, bytes]]) -> DeviceState:
    """A device from the messages (type and body) of a dump; a long peer goes on in the next message."""
    state = DeviceState()
    for kind, body in messages:
        if kind == NLMSG_DONE:
            continue
        for attr, start, end in attributes(body, GENERIC_HEADER.size, len(body)):
            if attr == _PRIVATE_KEY:
                state.private_key = _key(body[start:end])
            elif attr == _LISTEN_PORT:
                state.listen_port = _U16.unpack_from(body, start)[0]
            elif attr == _PEERS:
                for _, first, last in attributes(body, start, end):
                    _read_peer(state, body, first, last)
    for peer in state.peers.values():
        peer.allowed_ips = canonical(peer.allowed_ips)
    return state


def _read_peer(state: DeviceState, data: bytes, begin: int, stop: int) -> None:
    told = {kind: (start, end) for kind, start, end in attributes(data, begin, stop)}
    if _PUBLIC_KEY not in told:
        return
    peer = state.peers.setdefault(_key(data[slice(*told[_PUBLIC_KEY])]), PeerState())
    for kind, (start, end) in told.items():
        if kind == _PRESHARED_KEY and data[start:end] != _NO_KEY:
            peer.preshared_key = _key(data[start:end])
        elif kind == _ENDPOINT:
            peer.endpoint = _read_endpoint(data[start:end])
        elif kind == _KEEPALIVE:
            peer.keepalive = _U16.unpack_from(data, start)[0]
        elif kind == _HANDSHAKE:
            peer.handshake = _U64.unpack_from(data, start)[0]
        elif kind == _RECEIVED:
            peer.received = _U64.unpack_from(data, start)[0]
        elif kind == _SENT:
            peer.sent = _U64.unpack_from(data, start)[0]
        elif kind == _ALLOWED_IPS:
            peer.allowed_ips += tuple(_read_allowed_ip(data, *item[1:]) for item in attributes(data, start, end))


def _read_allowed_ip(data: bytes, begin: int, stop: int) -> str:
    told = {kind: data[start:end] for kind, start, end in attributes(data, begin, stop)}
    address = told[_IP_ADDRESS]
    return f"{inet_ntop(AF_INET if len(address) == 4 else AF_INET6, address)}/{told[_IP_PREFIX][0]}"


def _read_endpoint(data: bytes) -> str:
    family, port = _SOCKADDR.unpack_from(data)
    if family == AF_INET6:
        return f"[{inet_ntop(AF_INET6, data[8:24])}]:{htons(port)}"
    return f"{inet_ntop(AF_INET, data[4:8])}:{htons(port)}"


def _key(raw: bytes) -> str:
    return b64encode(raw).decode()
