"""What a packet between two containers has to look like on the wire, backend by backend, as scapy decodes it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flanneld.lab.capture import capture, decode_vxlan
from tests.system.backend_cases import Running, mac_of

SECRET = b"flannel's secret"
"""What the pings hold."""


def check_packet(running: Running, family: int) -> None:
    """Capture a ping of this family between the containers, where it leaves the first host, and look inside."""
    kind = "bare" if running.case.direct else running.case.type
    expression, check = _CHECKS[kind]
    here, there = (next(a for a in box.addresses if (":" in a) == (family == 6)) for box in running.boxes)
    outer = 4 if running.case.backend.get("Mode") == "auto" else family
    peer = running.lab.hosts[1]
    peer_address = peer.address if outer == 4 else str(peer.address6)
    words = {"peer": peer_address, "inner": there, "port": 51820 if outer == 4 else 51821}
    box = running.boxes[0]
    (frame,) = capture(running.host.ns, "eth0", expression.format(**words), lambda: box.ping(there, fill=SECRET))

    assert (frame.src, frame.dst) == (mac_of(running.host, "eth0"), mac_of(peer, "eth0"))
    assert (SECRET in bytes(frame)) == (kind != "wireguard"), "in the clear or not"
    own_address = running.host.address if outer == 4 else str(running.host.address6)
    check(running, family, frame, (own_address, peer_address), (here, there))


Ends = tuple[str, str]
Check = Callable[[Running, int, Any, Ends, Ends], None]


def _vxlan(running: Running, family: int, frame: Any, outer: Ends, inner: Ends) -> None:
    packet = decode_vxlan(frame)
    device = running.case.devices[family]
    assert (packet.outer, packet.port, packet.vni) == (outer, 8472, 1)
    assert packet.inner_macs == tuple(mac_of(host, device) for host in running.lab.hosts)
    assert packet.inner == inner


def _bare(running: Running, family: int, frame: Any, outer: Ends, inner: Ends) -> None:
    _is_ping(frame.payload, inner)


def _udp(running: Running, family: int, frame: Any, outer: Ends, inner: Ends) -> None:
    from scapy.layers.inet import IP, UDP

    assert (frame[IP].src, frame[IP].dst) == outer
    assert (frame[UDP].sport, frame[UDP].dport) == (8285, 8285)
    _is_ping(IP(bytes(frame[UDP].payload)), inner)


def _wireguard(running: Running, family: int, frame: Any, outer: Ends, inner: Ends) -> None:
    from scapy.contrib.wireguard import Wireguard, WireguardTransport
    from scapy.layers.inet import UDP

    assert (frame.payload.src, frame.payload.dst) == outer
    assert frame[UDP].sport == frame[UDP].dport
    message = Wireguard(bytes(frame[UDP].payload))
    assert (message.message_type, message.reserved_zero) == (4, 0)
    assert message[WireguardTransport].encrypted_encapsulated_packet


def _ipip(running: Running, family: int, frame: Any, outer: Ends, inner: Ends) -> None:
    assert (frame.payload.src, frame.payload.dst, frame.payload.proto) == (*outer, 4)
    _is_ping(frame.payload.payload, inner)


def _is_ping(packet: Any, ends: Ends) -> None:
    assert (packet.src, packet.dst) == ends
    assert packet.payload.name in ("ICMP", "ICMPv6 Echo Request")


# The last part of wireguard's: data, not a handshake; over IPv4, over IPv6, and longer than a keepalive.
_CHECKS: dict[str, tuple[str, Check]] = {
    "vxlan": ("dst host {peer} and udp dst port 8472", _vxlan),
    "bare": ("dst host {inner} and (icmp[0] = 8 or icmp6[0] = 128)", _bare),
    "udp": ("dst host {peer} and udp dst port 8285", _udp),
    "wireguard": (
        "dst host {peer} and udp dst port {port} and (udp[8] = 4 or ip6[48] = 4) and greater 120",
        _wireguard,
    ),
    "ipip": ("dst host {peer} and ip proto 4", _ipip),
}
