"""The worker's loop: packets from the TUN to peers, datagrams from peers to the TUN, commands from the daemon."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import struct
import time
from collections import Counter
from typing import Any, Final, cast

import numpy as np

from flanneld.dataplane.udp_tunnel import control, device, packet
from flanneld.dataplane.udp_tunnel.device import VNET_HEADER, Offloads
from flanneld.dataplane.udp_tunnel.peers import Hop, PeerTable
from flanneld.dataplane.udp_tunnel.segments import NotSegmentable, Segmenter, SuperPacket, flow_runs

BURST: Final = 64
"""Packets from one side before the other side and the daemon get their turn."""

MAX_DATAGRAM: Final = 65507
MAX_SEGMENTS: Final = 64
"""UDP_MAX_SEGMENTS of the oldest kernels that have UDP_SEGMENT."""

ICMP_PER_SECOND: Final = 1000
"""The kernel's own limit (net.ipv4.icmp_msgs_per_sec)."""

PLAIN: Final = bytes(VNET_HEADER.size)
HEADROOM: Final = 4
"""With it the payload behind IPv4 and TCP headers with timestamps (52 bytes) lies on a multiple of eight."""

DROPS: Final = (
    "malformed",
    "not_ipv4",
    "no_peer",
    "ttl_expired",
    "unknown_sender",
    "send_failed",
    "device_down",
)


class DeviceGone(Exception):
    """Somebody deleted the TUN device."""


class Tunnel:
    """One TUN device, one UDP socket, and the peers between them. ``run`` returns when told to stop."""

    def __init__(self, name: str, settings: dict[str, Any], want_offloads: bool = True) -> None:
        self.name, self.settings, self._want_offloads = name, settings, want_offloads
        self.peers = PeerTable()
        self.counters: Counter[str] = Counter()
        self._connections: dict[int, control.Connection] = {}
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            self._listener.bind(control.address_for(name))
        except OSError as error:
            raise device.DeviceError(f"a tunnel worker for {name} runs already, or poses as one: {error}") from error
        self._listener.listen(8)
        self._listener.setblocking(False)

        self.udp = self._bind(settings)
        self.tun = device.open_tun(name)
        tcp, udp = device.grant_tun(self.tun, want_offloads)
        segment, gro = device.grant_socket(self.udp, want_offloads)
        self.offloads = Offloads(tcp=tcp, udp=udp, segment=segment, gro=gro)
        self._icmp = socket.socket(socket.AF_INET, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.IPPROTO_RAW)

        self._epoll = select.epoll()
        for descriptor in (self.udp.fileno(), self.tun, self._listener.fileno()):
            self._epoll.register(descriptor, select.EPOLLIN)
        self._running = True
        self._remove_device = False
        self._device_is_down = False
        self._icmp_second, self._icmp_sent = 0, 0

        self._splitter, self._joiner = Segmenter(), Segmenter()
        room = np.zeros(HEADROOM + 65536 + 8, np.uint8)
        self._packet = room[HEADROOM:]
        self._packet_view = memoryview(cast(Any, self._packet))
        self._vnet = bytearray(VNET_HEADER.size)
        # A datagram may be followed by one stride that join() overwrites.
        self._datagrams = np.zeros(2 * 65536, np.uint8)
        self._datagrams_view = memoryview(cast(Any, self._datagrams))
        self._batch = bytearray(65536)
        self._batch_view = memoryview(self._batch)
        self._batch_hop: Hop | None = None
        self._batch_size = self._batch_count = self._batch_used = 0

    # The loop

    def run(self) -> None:
        """Carry packets until a ``stop`` command. DeviceGone when the device is deleted."""
        udp_fd = self.udp.fileno()
        while self._running:
            for descriptor, events in self._epoll.poll():
                if descriptor == self.tun:
                    self._drain_tun(events)
                elif descriptor == udp_fd:
                    self._drain_udp()
                else:
                    self._serve(descriptor)
                    udp_fd = self.udp.fileno()
        if self._remove_device:
            device.remove_tun(self.tun)
        self._listener.close()

    def _drain_tun(self, events: int) -> None:
        try:
            for _ in range(BURST):
                size = os.readv(self.tun, [self._vnet, self._packet_view]) - VNET_HEADER.size
                self._outbound(size)
            if self._device_is_down:
                self._watch_tun(down=False)
        except BlockingIOError:
            pass
        except OSError as error:
            if error.errno == errno.EIO:
                self._watch_tun(down=True)
            elif error.errno in (errno.EBADFD, errno.EBADF, errno.ENODEV):
                raise DeviceGone(f"{self.name} was deleted") from error
            else:
                raise
        self._flush()
        if events & select.EPOLLERR:
            raise DeviceGone(f"{self.name} was deleted")

    def _watch_tun(self, *, down: bool) -> None:
        """While the device is down every read fails at once: then only a change wakes us."""
        self._device_is_down = down
        self._epoll.modify(self.tun, select.EPOLLIN | (select.EPOLLET if down else 0))

    def _drain_udp(self) -> None:
        receive, view = self.udp.recvmsg_into, [self._datagrams_view[:65536]]
        try:
            for _ in range(BURST):
                size, ancillary, _flags, sender = receive(view, 64, socket.MSG_DONTWAIT)
                stride = struct.unpack("=i", ancillary[0][2][:4])[0] if ancillary else size
                self._inbound(size, stride, sender)
        except BlockingIOError:
            pass
        except ConnectionRefusedError:
            pass  # a peer's port is closed; its own affair

    # From the TUN to peers

    def _outbound(self, size: int) -> None:
        view = self._packet_view
        if view[0] >> 4 != 4:
            self.counters["drop_not_ipv4"] += 1
            return
        if not packet.is_ipv4(view, size):
            self.counters["drop_malformed"] += 1
            return
        hop = self.peers.next_hop(packet.destination(view))
        if hop is None:
            self.counters["drop_no_peer"] += 1
            self._refuse(packet.NET_UNREACHABLE, view, size)
            return
        flags, kind, _, segment_size, start, offset = VNET_HEADER.unpack(self._vnet)
        if not packet.decrement_ttl(view):
            self.counters["drop_ttl_expired"] += 1
            self._refuse(packet.TIME_EXCEEDED, view, size)
            return
        if kind & ~device.GSO_ECN:
            self._send_super(size, segment_size, hop)
        elif not flags & device.NEEDS_CHECKSUM or packet.complete_checksum(view, size, start, offset):
            self._queue(size, hop)
        else:
            self.counters["drop_malformed"] += 1

    def _send_super(self, size: int, segment_size: int, hop: Hop) -> None:
        try:
            data, stride = self._splitter.split(self._packet, size, segment_size)
        except NotSegmentable:
            self.counters["drop_malformed"] += 1
            return
        self._flush()
        self._send_segments(data, stride, hop)

    def _send_segments(self, data: memoryview, stride: int, hop: Hop) -> None:
        step = min(MAX_SEGMENTS, MAX_DATAGRAM // stride) * stride
        for begin in range(0, len(data), step):
            self._send(data[begin : begin + step], stride, hop)

    def _queue(self, size: int, hop: Hop) -> None:
        """Keep packets of one size for one peer, to be sent together; a shorter one ends the row."""
        used = self._batch_used
        if used and (
            hop != self._batch_hop
            or size > self._batch_size
            or self._batch_count == MAX_SEGMENTS
            or used + size > MAX_DATAGRAM
        ):
            self._flush()
            used = 0
        if not used:
            if not self.offloads.segment or size > MAX_DATAGRAM:
                self._send(self._packet_view[:size], size, hop)
                return
            self._batch_hop, self._batch_size = hop, size
        self._batch_view[used : used + size] = self._packet_view[:size]
        self._batch_used = used + size
        self._batch_count += 1
        if size < self._batch_size:
            self._flush()

    def _flush(self) -> None:
        if self._batch_used and self._batch_hop:
            self._send(self._batch_view[: self._batch_used], self._batch_size, self._batch_hop)
        self._batch_used = self._batch_count = 0

    def _send(self, data: memoryview, stride: int, hop: Hop) -> None:
        """Send packets of ``stride`` bytes, the last may be shorter, in one call where the kernel can."""
        size = len(data)
        if size <= stride:
            self._send_one(data, hop)
            return
        if self.offloads.segment:
            try:
                self.udp.sendmsg([data], [(socket.IPPROTO_UDP, device.UDP_SEGMENT, struct.pack("=H", stride))], 0, hop)
            except OSError:
                pass  # a narrower path, a device without checksums: the kernel can still send them one by one
            else:
                self.counters["tx_packets"] += -(-size // stride)
                self.counters["tx_bytes"] += size
                return
        for begin in range(0, size, stride):
            self._send_one(data[begin : begin + stride], hop)

    def _send_one(self, data: memoryview, hop: Hop) -> None:
        try:
            self.udp.sendto(data, hop)
        except ConnectionRefusedError:
            self._send_again(data, hop)  # an ICMP error about an earlier packet is reported once, in place of a send
        except OSError:
            self._repin()
            self._send_again(data, hop)
        else:
            self.counters["tx_packets"] += 1
            self.counters["tx_bytes"] += len(data)

    def _send_again(self, data: memoryview, hop: Hop) -> None:
        try:
            self.udp.sendto(data, hop)
            self.counters["tx_packets"] += 1
            self.counters["tx_bytes"] += len(data)
        except OSError:
            self.counters["drop_send_failed"] += 1

    def _repin(self) -> None:
        """The underlay may be another interface of the same name by now."""
        with contextlib.suppress(OSError):
            device.pin_interface(self.udp, self.settings["underlay"])

    def _refuse(self, kind: tuple[int, int], view: memoryview, size: int) -> None:
        """Tell the sender why its packet goes no further.

        Sent as this host's own packet: one that came out of the TUN with this host's address as source would be
        dropped as martian, and one about a peer's packet takes the tunnel by itself.
        """
        second = int(time.monotonic())
        if second != self._icmp_second:
            self._icmp_second, self._icmp_sent = second, 0
        if self._icmp_sent >= ICMP_PER_SECOND:
            return
        sender = device.address_of(self.name)
        error = packet.icmp_error(kind, view, size, sender) if sender else None
        if error is None:
            return
        self._icmp_sent += 1
        with contextlib.suppress(OSError):
            self._icmp.sendto(error, (socket.inet_ntoa(error[16:20]), 0))
            self.counters["icmp_sent"] += 1

    # From peers to the TUN

    def _inbound(self, size: int, stride: int, sender: Hop) -> None:
        if not self.peers.knows(sender):
            self.counters["drop_unknown_sender"] += -(-size // max(stride, 1)) or 1
            return
        if size <= stride:
            self._deliver(self._datagrams_view[:size])
        elif not (self.offloads.tcp and self._deliver_joined(0, size, stride)):
            for begin, end in flow_runs(self._datagrams, 0, size, stride):
                self._deliver_run(begin, end, stride)

    def _deliver_joined(self, begin: int, end: int, stride: int) -> bool:
        """Whether all packets of the range made one super-packet, and that was written."""
        whole = self._joiner.join(self._datagrams, begin, end, stride)
        if whole is None or begin + whole.rows * stride < end or not self._joinable(whole):
            return False
        self._deliver_super(whole)
        return True

    def _joinable(self, whole: SuperPacket) -> bool:
        return whole.shape.protocol == packet.TCP or self.offloads.udp

    def _deliver_run(self, begin: int, end: int, stride: int) -> None:
        """Packets of one flow: super-packets as far as they go, single packets in between."""
        while begin < end:
            whole = None
            if self.offloads.tcp and end - begin > stride:
                whole = self._joiner.join(self._datagrams, begin, end, stride)
            if whole is not None and self._joinable(whole):
                self._deliver_super(whole)
                begin += whole.rows * stride
            else:
                self._deliver(self._datagrams_view[begin : min(end, begin + stride)])
                begin += stride

    def _deliver(self, view: memoryview) -> None:
        size = len(view)
        if size and view[0] >> 4 != 4:
            self.counters["drop_not_ipv4"] += 1
            return
        if not packet.is_ipv4(view, size):
            self.counters["drop_malformed"] += 1
            return
        if not packet.decrement_ttl(view):
            self.counters["drop_ttl_expired"] += 1
            self._refuse(packet.TIME_EXCEEDED, view, size)
            return
        self._write(PLAIN, view, 1)

    def _deliver_super(self, whole: SuperPacket) -> None:
        header = bytearray(whole.header)
        if not packet.decrement_ttl(header):
            self.counters["drop_ttl_expired"] += whole.rows
            quoted = memoryview(header)
            self._refuse(packet.TIME_EXCEEDED, quoted, len(quoted))
            return
        shape = whole.shape
        if shape.protocol == packet.TCP:
            kind, offset = device.GSO_TCPV4, 16
            if header[shape.ip_header + 13] & 0x80:
                kind |= device.GSO_ECN
        else:
            kind, offset = device.GSO_UDP, 6
        vnet = VNET_HEADER.pack(device.NEEDS_CHECKSUM, kind, shape.header, whole.segment_size, shape.ip_header, offset)
        self._write(vnet + header, whole.payload, whole.rows)

    def _write(self, head: bytes, rest: memoryview, packets: int) -> None:
        try:
            written = os.writev(self.tun, (head, rest))
        except OSError as error:
            if error.errno in (errno.EBADFD, errno.ENODEV):
                raise DeviceGone(f"{self.name} was deleted") from error
            self.counters["drop_device_down" if error.errno == errno.EIO else "drop_malformed"] += packets
        else:
            self.counters["rx_packets"] += packets
            self.counters["rx_bytes"] += written - VNET_HEADER.size

    # The daemon's commands

    def _serve(self, descriptor: int) -> None:
        if descriptor == self._listener.fileno():
            self._accept()
            return
        connection = self._connections.get(descriptor)
        if connection is None:
            return
        connection.flush()
        requests = connection.requests()
        for request in requests or ():
            connection.answer(self._answer(request))
        if requests is None:
            self._epoll.unregister(descriptor)
            del self._connections[descriptor]
            connection.socket.close()
        else:
            self._epoll.modify(descriptor, select.EPOLLIN | (select.EPOLLOUT if connection.wants_to_write else 0))

    def _accept(self) -> None:
        try:
            accepted, _ = self._listener.accept()
        except OSError:
            return
        if control.trusted(accepted) is None:
            accepted.close()
            return
        self._connections[accepted.fileno()] = control.Connection(accepted)
        self._epoll.register(accepted.fileno(), select.EPOLLIN)

    def _answer(self, request: dict[str, Any]) -> dict[str, Any]:
        try:
            match request.get("op"):
                case "state":
                    return self._state()
                case "configure":
                    return self._configure({key: request[key] for key in ("local", "port", "underlay", "network")})
                case "peers":
                    self.peers.update(request.get("put", ()), request.get("remove", ()))
                    return {}
                case "counters":
                    drops = {f"drop_{cause}": self.counters[f"drop_{cause}"] for cause in DROPS}
                    return {**drops, **self.counters, "drop_receive_queue_full": device.queue_drops(self.udp)}
                case "stop":
                    self._running, self._remove_device = False, bool(request.get("remove_device"))
                    return {}
                case other:
                    return {"error": f"no such command: {other}"}
        except (KeyError, TypeError, ValueError, device.DeviceError) as error:
            return {"error": f"{error}"}

    def _state(self) -> dict[str, Any]:
        return {
            "version": control.VERSION,
            "pid": os.getpid(),
            "settings": self.settings,
            "missing": self.offloads.missing,
            "peers": self.peers.entries(),
        }

    def _bind(self, settings: dict[str, Any]) -> socket.socket:
        return device.open_socket(settings["local"], settings["port"], settings["underlay"])

    def _configure(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Take other settings without letting go of the device. On failure the old ones stay."""
        same = all(settings[key] == self.settings[key] for key in ("local", "port", "underlay"))
        if not same:
            fresh = self._bind(settings)
            device.grant_socket(fresh, self._want_offloads)
            self._epoll.unregister(self.udp.fileno())
            self.udp.close()
            self.udp = fresh
            self._epoll.register(fresh.fileno(), select.EPOLLIN)
        self.settings = settings
        return {}
