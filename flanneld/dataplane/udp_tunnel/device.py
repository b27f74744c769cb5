"""The worker's two descriptors, a TUN device and a UDP socket, and which offloads the kernel grants them."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import struct
from dataclasses import dataclass
from typing import Final

# include/uapi/linux/if_tun.h
TUNSETIFF: Final = 0x400454CA
TUNSETPERSIST: Final = 0x400454CB
TUNSETOFFLOAD: Final = 0x400454D0
IFF_TUN: Final = 0x0001
IFF_NO_PI: Final = 0x1000
IFF_VNET_HDR: Final = 0x4000
TUN_F_CSUM: Final = 0x01
TUN_F_TSO4: Final = 0x02
TUN_F_TSO_ECN: Final = 0x08
TUN_F_USO4: Final = 0x20
TUN_F_USO6: Final = 0x40

# include/uapi/linux/udp.h, in.h, sockios.h
UDP_SEGMENT: Final = 103
UDP_GRO: Final = 104
IP_MTU_DISCOVER: Final = 10
IP_PMTUDISC_DONT: Final = 0
IP_UNICAST_IF: Final = 50
LOOPBACK_IFINDEX: Final = 1  # of every network namespace
SO_SNDBUFFORCE: Final = 32
SO_RCVBUFFORCE: Final = 33
SO_MEMINFO: Final = 55
SIOCGIFADDR: Final = 0x8915

SOCKET_BUFFER: Final = 8 << 20
"""Bytes of receive and of send buffer: a burst of some hundred 64 KiB datagrams, held only while it waits."""

VNET_HEADER: Final = struct.Struct("=BBHHHH")
"""struct virtio_net_hdr: flags, gso_type, hdr_len, gso_size, csum_start, csum_offset, in the machine's byte order."""

NEEDS_CHECKSUM: Final = 1
GSO_TCPV4: Final = 1
GSO_UDP: Final = 5
GSO_ECN: Final = 0x80


class DeviceError(Exception):
    """A descriptor cannot be had. The text names it and the remedy."""


@dataclass(frozen=True, slots=True)
class Offloads:
    """What the kernel grants: ``tcp`` and ``udp`` super-packets on the TUN, ``segment`` and ``gro`` on the socket."""

    tcp: bool = False
    udp: bool = False
    segment: bool = False
    gro: bool = False

    @property
    def missing(self) -> tuple[str, ...]:
        """The names of those that are not there, as the kernel's documentation spells them."""
        names = {"tcp": "TUN_F_TSO4", "udp": "TUN_F_USO4", "segment": "UDP_SEGMENT", "gro": "UDP_GRO"}
        return tuple(name for key, name in names.items() if not getattr(self, key))


def open_tun(name: str) -> int:
    """Make or take over the TUN device ``name``; its descriptor, non-blocking. The device outlives the descriptor."""
    try:
        tun = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise DeviceError(
            f"cannot open /dev/net/tun: {error.strerror}; load the module (modprobe tun), and in a container pass the device in"
        ) from error
    try:
        fcntl.ioctl(tun, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TUN | IFF_NO_PI | IFF_VNET_HDR))
        fcntl.ioctl(tun, TUNSETPERSIST, 1)
    except OSError as error:
        os.close(tun)
        why = {
            errno.EBUSY: "another process holds it; stop that one (a flanneld or an older worker)",
            errno.EINVAL: "a device of another kind has that name; remove it (ip link del)",
            errno.EPERM: "CAP_NET_ADMIN is missing",
        }.get(error.errno or 0, error.strerror)
        raise DeviceError(f"cannot open TUN device {name}: {why}") from error
    return tun


def remove_tun(tun: int) -> None:
    """Close the descriptor and let the device go with it."""
    with contextlib.suppress(OSError):
        fcntl.ioctl(tun, TUNSETPERSIST, 0)
    os.close(tun)


def grant_tun(tun: int, wanted: bool) -> tuple[bool, bool]:
    """Ask for super-packets: (TCP, UDP) as granted. Asks for nothing if not ``wanted``."""
    tcp = TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO_ECN
    # The kernel turns segmentation of UDP on for both families or for none.
    wishes = ((tcp | TUN_F_USO4 | TUN_F_USO6, (True, True)), (tcp, (True, False))) if wanted else ()
    for flags, granted in wishes:
        with contextlib.suppress(OSError):
            fcntl.ioctl(tun, TUNSETOFFLOAD, flags)
            return granted
    with contextlib.suppress(OSError):
        fcntl.ioctl(tun, TUNSETOFFLOAD, 0)
    return False, False


def open_socket(local: str, port: int, underlay: str) -> socket.socket:
    """The UDP socket that sends from and listens on ``local``:``port``, by way of the interface ``underlay``."""
    udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
    try:
        # Without DF, a path that is narrower than the underlay fragments the outer packet instead of losing it.
        udp.setsockopt(socket.IPPROTO_IP, IP_MTU_DISCOVER, IP_PMTUDISC_DONT)
        for force, plain in ((SO_RCVBUFFORCE, socket.SO_RCVBUF), (SO_SNDBUFFORCE, socket.SO_SNDBUF)):
            try:
                udp.setsockopt(socket.SOL_SOCKET, force, SOCKET_BUFFER)
            except PermissionError:
                udp.setsockopt(socket.SOL_SOCKET, plain, SOCKET_BUFFER)
        pin_interface(udp, underlay)
        udp.bind((local, port))
    except OSError as error:
        udp.close()
        why = {
            errno.EADDRINUSE: "another process uses that port; stop it, or set another Port in the network configuration",
            errno.EADDRNOTAVAIL: f"{underlay} does not have that address",
        }.get(error.errno or 0, error.strerror)
        raise DeviceError(f"cannot bind UDP {local}:{port} on {underlay}: {why}") from error
    return udp


def pin_interface(udp: socket.socket, underlay: str) -> None:
    """Send by this interface, wherever the routing table's default points. OSError if there is none of that name.

    Nothing leaves by loopback: there the routing table decides, as for every packet with an address that stands on it.
    """
    index = socket.if_nametoindex(underlay)
    index = 0 if index == LOOPBACK_IFINDEX else index
    udp.setsockopt(socket.IPPROTO_IP, IP_UNICAST_IF, struct.pack("!I", index))


def repin(udp: socket.socket, underlay: str) -> None:
    """``pin_interface`` for a socket in use; DeviceError, and all stays as it is, where there is no such interface."""
    try:
        pin_interface(udp, underlay)
    except OSError as error:
        raise DeviceError(f"cannot send by {underlay}: {error.strerror}") from error


def grant_socket(udp: socket.socket, wanted: bool) -> tuple[bool, bool]:
    """Ask for UDP_SEGMENT and UDP_GRO, as granted."""
    granted = []
    for option, value in ((UDP_SEGMENT, 0), (UDP_GRO, 1)):
        try:
            udp.setsockopt(socket.IPPROTO_UDP, option, value if wanted else 0)
            granted.append(wanted)
        except OSError:
            granted.append(False)
    return granted[0], granted[1]


def queue_drops(udp: socket.socket) -> int:
    """Datagrams that the kernel dropped because the receive buffer was full (SK_MEMINFO_DROPS)."""
    try:
        return int(struct.unpack("=9I", udp.getsockopt(socket.SOL_SOCKET, SO_MEMINFO, 36))[8])
    except (OSError, struct.error):
        return 0


def address_of(name: str) -> str | None:
    """The IPv4 address of a device, None if it has none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            answer = fcntl.ioctl(probe, SIOCGIFADDR, struct.pack("16s24x", name.encode()))
        except OSError:
            return None
    return socket.inet_ntoa(answer[20:24])
