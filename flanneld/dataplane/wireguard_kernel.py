"""WireGuard in the kernel: rtnetlink makes the device, the generic netlink family "wireguard" sets it."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Sequence
from typing import Final

from flanneld.dataplane.links import IFINFOMSG, IFLA_IFNAME, IFLA_INFO_KIND, IFLA_LINKINFO, NESTED
from flanneld.dataplane.netlink import Netlink, NetlinkError, messages
from flanneld.dataplane.wire import NLM_F_CREATE, NLM_F_EXCL, RTM_NEWLINK, attribute
from flanneld.dataplane.wireguard_device import DeviceState, NotHere, PeerWrite
from flanneld.dataplane.wireguard_wire import (
    CONTROL_FAMILY,
    decode_device,
    family_number,
    family_request,
    get_device,
    set_device,
    set_peers,
)

NETLINK_GENERIC: Final = 16

PEERS_A_MESSAGE: Final = 100
"""About 150 bytes each; all of them are one attribute, which holds 64 KiB."""


class Kernel:
    """Engine over the kernel module."""

    name = "kernel"
    clings_to_source = False

    def __init__(self) -> None:
        self._netlink: Netlink | None = None
        self._family = 0

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
        netlink = self._open()
        try:
            buffers = netlink.dump(self._family, get_device(dev))
        except NetlinkError as error:
            raise OSError(error.errno, f"the kernel does not show {dev}: {error}") from error
        return decode_device([(kind, data[start:end]) for data in buffers for kind, _, start, end in messages(data)])

    def configure(self, dev: str, private_key: str, listen_port: int) -> None:
        self._request(dev, set_device(dev, private_key, listen_port))

    def write(self, dev: str, peers: Sequence[PeerWrite]) -> None:
        for first in range(0, len(peers), PEERS_A_MESSAGE):
            self._request(dev, set_peers(dev, peers[first : first + PEERS_A_MESSAGE]))

    def close(self) -> None:
        if self._netlink is not None:
            self._netlink.close()
            self._netlink = None

    def _request(self, dev: str, body: bytes) -> None:
        netlink = self._open()
        try:
            netlink.request(self._family, 0, body)
        except NetlinkError as error:
            raise OSError(error.errno, f"the kernel refuses it for {dev}: {error}") from error

    def _open(self) -> Netlink:
        if self._netlink is None:
            netlink = Netlink(NETLINK_GENERIC)
            try:
                self._family = family_number(netlink.get(CONTROL_FAMILY, family_request("wireguard")))
            except NetlinkError as error:
                netlink.close()
                raise OSError(errno.EOPNOTSUPP, f"the kernel does not answer for WireGuard: {error}") from error
            self._netlink = netlink
        return self._netlink
