"""Catch packets with tcpdump and decode them with scapy, independently of everything that we wrote."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flanneld.lab.netns import Namespace, end
from flanneld.lab.wait import wait_until


def capture(
    namespace: Namespace, device: str, expression: str, provoke: Callable[[], object], *, count: int = 1
) -> list[Any]:
    """The first ``count`` packets on a device that match a tcpdump expression, as scapy layers, while ``provoke`` runs.

    ``provoke`` is called until enough packets came, for at most ten seconds; NotYet says that none did.
    """
    with tempfile.TemporaryDirectory(prefix="flanneld-capture-") as directory:
        file, log = Path(directory, "packets.pcap"), Path(directory, "tcpdump.log")
        # -Z root: tcpdump would drop to a user that may not write into our directory.
        argv = ["tcpdump", "-i", device, "-c", str(count), "-nn", "-U", "--immediate-mode", "-Z", "root"]
        argv += ["-w", str(file), expression]
        process = namespace.start(argv, log=log)
        try:
            wait_until(lambda: "listening on" in log.read_text(), 10, lambda: f"tcpdump: {log.read_text()}")

            def caught() -> bool:
                if process.poll() is None:
                    provoke()
                return process.poll() is not None

            wait_until(caught, 10, f"{count} packet(s) on {namespace.label} {device} that match: {expression}")
        finally:
            end(process)
        return read_pcap(file)


def read_pcap(file: Path) -> list[Any]:
    """The packets of a file, decoded from Ethernet upwards."""
    logging.getLogger("scapy.runtime").setLevel(logging.ERROR)  # it warns about interfaces that we do not use
    # Loading these is what teaches Ether to look inside.
    from scapy.layers import inet, inet6, vxlan  # noqa: F401
    from scapy.layers.l2 import Ether
    from scapy.utils import RawPcapReader

    with RawPcapReader(str(file)) as reader:
        return [Ether(data) for data, _ in reader]


@dataclass(frozen=True, slots=True)
class VxlanPacket:
    """One VXLAN packet, from the outside in. ``inner_length`` is the inner IP packet's, in bytes."""

    outer_macs: tuple[str, str]
    outer: tuple[str, str]
    outer_checksum: int
    source_port: int
    port: int
    vni: int
    flags: str
    inner_macs: tuple[str, str]
    inner: tuple[str, str]
    inner_protocol: str
    inner_length: int


def decode_vxlan(frame: Any) -> VxlanPacket:
    """Read a captured frame; ValueError if it is not VXLAN around IPv4 or IPv6."""
    from scapy.layers.inet import IP, UDP
    from scapy.layers.inet6 import IPv6
    from scapy.layers.l2 import Ether
    from scapy.layers.vxlan import VXLAN

    outer = frame.getlayer(IP) or frame.getlayer(IPv6)
    udp = frame.getlayer(UDP)
    if outer is None or udp is None:
        raise ValueError(f"not UDP over IP: {frame.summary()}")
    # Whatever scapy makes of the port number: what follows the UDP header is a VXLAN header.
    vxlan = VXLAN(bytes(udp.payload))
    ether = Ether(bytes(vxlan.payload))
    inner = ether.getlayer(IP) or ether.getlayer(IPv6)
    if inner is None:
        raise ValueError(f"no IP packet inside: {ether.summary()}")
    return VxlanPacket(
        outer_macs=(frame.src, frame.dst),
        outer=(outer.src, outer.dst),
        outer_checksum=int(udp.chksum or 0),
        source_port=int(udp.sport),
        port=int(udp.dport),
        vni=int(vxlan.vni),
        flags=str(vxlan.flags),
        inner_macs=(ether.src, ether.dst),
        inner=(inner.src, inner.dst),
        inner_protocol=inner.payload.name,
        inner_length=len(inner),
    )
