"""The worker's loop: packets from the TUN to peers, datagrams from peers to the TUN, commands from the daemon."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import struct
from collections import Counter
from typing import Any, Final

from flanneld.dataplane.udp_tunnel import control, device, packet
from flanneld.dataplane.udp_tunnel.commands import Commands
from flanneld.dataplane.udp_tunnel.device import VNET_HEADER, Offloads
from flanneld.dataplane.udp_tunnel.icmp import IcmpErrors
from flanneld.dataplane.udp_tunnel.peers import Hop, PeerTable
from flanneld.dataplane.udp_tunnel.segments import CWR, Buffer, NotSegmentable, Segmenter, flow_runs

BURST: Final = 64
"""Packets from one side before the other side and the daemon get their turn."""

MAX_DATAGRAM: Final = 65507
MAX_SEGMENTS: Final = 64
"""UDP_MAX_SEGMENTS of the oldest kernels that have UDP_SEGMENT."""

VNET_SIZE: Final = VNET_HEADER.size
OUTBOUND: Final = struct.Struct("!BB8xBxHxxxxBBHxxxxI")
"""A virtio header's flags and kind, then an IPv4 header's version, total length, TTL, protocol, checksum and destination."""
INBOUND: Final = struct.Struct("!BxHxxxxBBH")
"""An IPv4 header's version, total length, TTL, protocol and checksum."""
TTL_TO_CHECK: Final = struct.Struct("!BBH")
TTL_AT: Final = VNET_SIZE + 8
STRIDE: Final = struct.Struct("=H")
GRO_SIZE: Final = struct.Struct("=i")
ANCILLARY: Final = socket.CMSG_SPACE(GRO_SIZE.size)
GONE: Final = (errno.EBADFD, errno.EBADF, errno.ENODEV)

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
        self._epoll = select.epoll()
        self.commands = Commands(self, self._epoll)

        self.udp = self._bind(settings)
        self._udp_fd = self.udp.fileno()
        self.tun = device.open_tun(name)
        tcp, udp = device.grant_tun(self.tun, want_offloads)
        segment, gro = device.grant_socket(self.udp, want_offloads)
        self.offloads = Offloads(tcp=tcp, udp=udp, segment=segment, gro=gro)
        self._errors = IcmpErrors(name, self.counters)

        for descriptor in (self.udp.fileno(), self.tun):
            self._epoll.register(descriptor, select.EPOLLIN)
        self._running = True
        self._remove_device = False
        self._device_is_down = False

        self._splitter, self._joiner = Segmenter(), Segmenter(room=VNET_SIZE)
        # Both buffers have the virtio header in front, so that one read or write carries header and packet.
        outbound = Buffer(VNET_SIZE + 65536)
        self._frame, self._packet = outbound.view, outbound.after(VNET_SIZE)
        self._from_tun = (outbound.view,)
        inbound = Buffer(VNET_SIZE + 2 * 65536)  # join() may look one packet beyond the datagram
        self._arrived, self._datagrams = inbound.view, inbound.after(VNET_SIZE)
        self._from_udp = (self._datagrams.view[:65536],)
        self._single = memoryview(bytearray(VNET_SIZE + 65536))
        self._batch = memoryview(bytearray(65536))
        self._batch_hop: Hop | None = None
        self._batch_size = self._batch_count = self._batch_used = 0
        self._sent, self._received = [0, 0], [0, 0]  # packets, bytes

    # The loop

    def run(self) -> None:
        """Carry packets until a ``stop`` command. DeviceGone when the device is deleted."""
        poll, tun = self._epoll.poll, self.tun
        while self._running:
            for descriptor, events in poll(-1, 8):
                if descriptor == tun:
                    self._drain_tun(events)
                elif descriptor == self._udp_fd:
                    self._drain_udp()
                else:
                    self.commands.serve(descriptor)
        if self._remove_device:
            device.remove_tun(self.tun)
        self.commands.close()

    def _drain_tun(self, events: int) -> None:
        """Read packets until there are none, or the burst is full.

        The first leaves at once, so that a lone packet waits for nothing; those behind it leave together where they can.
        The walk of a plain packet is written out here, short, since that is what its round trip consists of.
        """
        frame, tun, into, first = self._frame, self.tun, self._from_tun, True
        send, sent = self.udp.sendto, self._sent
        try:
            for _ in range(BURST):
                size = os.readv(tun, into) - VNET_SIZE
                flags, kind, version, total, ttl, protocol, check, to = OUTBOUND.unpack_from(frame)
                hop = None
                if version == 0x45 and total == size and ttl > 1:
                    for mask, table in self.peers.lookups:
                        hop = table.get(to & mask)
                        if hop is not None:
                            break
                if hop is None:
                    self._slow_outbound(size)
                    continue
                check += 0x100
                TTL_TO_CHECK.pack_into(
                    frame, TTL_AT, ttl - 1, protocol, check if check < 0xFFFF else check + 1 & 0xFFFF
                )
                if kind or flags:
                    self._offloaded(size, kind, hop)
                elif first:
                    try:
                        send(frame[VNET_SIZE : VNET_SIZE + size], hop)
                        sent[0] += 1
                        sent[1] += size
                    except OSError as error:
                        self._resend(frame[VNET_SIZE : VNET_SIZE + size], hop, error)
                else:
                    self._queue(size, hop)
                first = False
        except BlockingIOError:
            pass
        except OSError as error:
            if error.errno == errno.EIO:
                self._watch_tun(down=True)
            elif error.errno in GONE:
                raise DeviceGone(f"{self.name} was deleted") from error
            else:
                raise
        if self._batch_used:
            self._flush()
        if events & select.EPOLLERR:
            raise DeviceGone(f"{self.name} was deleted")
        if self._device_is_down and not first:
            self._watch_tun(down=False)

    def _watch_tun(self, *, down: bool) -> None:
        """While the device is down every read fails at once: then only a change wakes us."""
        self._device_is_down = down
        self._epoll.modify(self.tun, select.EPOLLIN | (select.EPOLLET if down else 0))

    def _drain_udp(self) -> None:
        """Receive datagrams while they come in bulk; after a lone one the TUN has its turn, as an answer may wait there."""
        receive, into, view = self.udp.recvmsg_into, self._from_udp, self._arrived
        try:
            for _ in range(BURST):
                size, ancillary, _, sender = receive(into, ANCILLARY, socket.MSG_DONTWAIT)
                if ancillary or sender not in self.peers.senders:
                    self._inbound(size, GRO_SIZE.unpack(ancillary[0][2])[0] if ancillary else size, sender)
                    continue
                version, total, ttl, protocol, check = INBOUND.unpack_from(view, VNET_SIZE)
                if version == 0x45 and packet.MIN_HEADER <= total <= size and ttl > 1:
                    check += 0x100
                    TTL_TO_CHECK.pack_into(
                        view, TTL_AT, ttl - 1, protocol, check if check < 0xFFFF else check + 1 & 0xFFFF
                    )
                    self._write(view[: VNET_SIZE + total], 1)
                else:
                    self._deliver(0, size)
                return
        except BlockingIOError:
            pass
        except OSError:
            self.counters["errors_reported"] += 1  # an ICMP error about an earlier packet; it is that peer's affair

    # From the TUN to peers

    def _offloaded(self, size: int, kind: int, hop: Hop) -> None:
        """Do what the kernel left to the hardware: segments, or only a checksum."""
        _, _, _, segment_size, start, offset = VNET_HEADER.unpack_from(self._frame)
        if not kind:
            if packet.complete_checksum(self._packet.view, size, start, offset):
                self._queue(size, hop)
            else:
                self.counters["drop_malformed"] += 1
            return
        try:
            data, stride = self._splitter.split(self._packet, size, segment_size)
        except NotSegmentable:
            self.counters["drop_malformed"] += 1
            return
        self._flush()
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
                self._send_one(self._packet.view[:size], hop)
                return
            self._batch_hop, self._batch_size = hop, size
        self._batch[used : used + size] = self._packet.view[:size]
        self._batch_used = used + size
        self._batch_count += 1
        if size < self._batch_size:
            self._flush()

    def _flush(self) -> None:
        if self._batch_used and self._batch_hop:
            self._send(self._batch[: self._batch_used], self._batch_size, self._batch_hop)
        self._batch_used = self._batch_count = 0

    def _send(self, data: memoryview, stride: int, hop: Hop) -> None:
        """Send packets of ``stride`` bytes, the last may be shorter, in one call where the kernel can."""
        size = len(data)
        if size > stride and self.offloads.segment:
            try:
                self.udp.sendmsg((data,), [(socket.IPPROTO_UDP, device.UDP_SEGMENT, STRIDE.pack(stride))], 0, hop)
            except OSError:
                pass  # a narrower path, a device without checksums: the kernel can still send them one by one
            else:
                self._sent[0] += -(-size // stride)
                self._sent[1] += size
                return
        for begin in range(0, size, stride):
            self._send_one(data[begin : begin + stride], hop)

    def _send_one(self, data: memoryview, hop: Hop) -> None:
        try:
            self.udp.sendto(data, hop)
        except OSError as error:
            self._resend(data, hop, error)
        else:
            self._sent[0] += 1
            self._sent[1] += len(data)

    def _resend(self, data: memoryview, hop: Hop, error: OSError) -> None:
        """A second attempt: the first may have reported an ICMP error about an earlier packet, or an old interface."""
        if not isinstance(error, ConnectionRefusedError):
            with contextlib.suppress(OSError):
                device.pin_interface(self.udp, self.settings["underlay"])
        try:
            self.udp.sendto(data, hop)
        except OSError:
            self.counters["drop_send_failed"] += 1
        else:
            self._sent[0] += 1
            self._sent[1] += len(data)

    def _slow_outbound(self, size: int) -> None:
        """Say and count why a packet goes no further; one with IP options takes its way from here."""
        view = self._packet.view
        if view[0] >> 4 != 4:
            self.counters["drop_not_ipv4"] += 1
            return
        if not packet.is_ipv4(view, size):
            self.counters["drop_malformed"] += 1
            return
        hop = self.peers.next_hop(packet.destination(view))
        if hop is None:
            self.counters["drop_no_peer"] += 1
            self._errors.send(packet.NET_UNREACHABLE, view, size)
        elif not packet.decrement_ttl(view):
            self.counters["drop_ttl_expired"] += 1
            self._errors.send(packet.TIME_EXCEEDED, view, size)
        else:
            flags, kind, *_ = VNET_HEADER.unpack_from(self._frame)
            if kind or flags:
                self._offloaded(size, kind, hop)
            else:
                self._queue(size, hop)

    # From peers to the TUN

    def _inbound(self, size: int, stride: int, sender: Hop) -> None:
        if sender not in self.peers.senders:
            self.counters["drop_unknown_sender"] += max(1, -(-size // max(stride, 1)))
        elif size <= stride:
            self._deliver(0, size)
        elif not self._deliver_joined(0, size, stride, whole_only=True):
            for begin, end in flow_runs(self._datagrams.array, 0, size, stride):
                self._deliver_run(begin, end, stride)

    def _deliver_run(self, begin: int, end: int, stride: int) -> None:
        """Packets of one flow: super-packets as far as they go, single packets in between."""
        while begin < end:
            joined = self._deliver_joined(begin, end, stride) if end - begin > stride else 0
            if not joined:
                self._deliver(begin, min(stride, end - begin))
            begin += (joined or 1) * stride

    def _deliver_joined(self, begin: int, end: int, stride: int, whole_only: bool = False) -> int:
        """How many packets from ``begin`` on went into a super-packet; 0 if they must go alone."""
        if not self.offloads.tcp:
            return 0
        whole = self._joiner.join(self._datagrams, begin, end, stride)
        if whole is None or (whole_only and begin + whole.rows * stride < end):
            return 0
        shape, frame = whole.shape, whole.frame
        if shape.protocol == packet.UDP and not self.offloads.udp:
            return 0
        inner = frame[VNET_SIZE:]
        if not packet.decrement_ttl(inner):
            self.counters["drop_ttl_expired"] += whole.rows
            self._errors.send(packet.TIME_EXCEEDED, inner, len(inner))
            return whole.rows
        kind = device.GSO_UDP
        if shape.protocol == packet.TCP:
            kind = device.GSO_TCPV4 | (device.GSO_ECN if inner[shape.ip_header + 13] & CWR else 0)
        checksum = (shape.ip_header, shape.check_at - shape.ip_header)
        VNET_HEADER.pack_into(frame, 0, device.NEEDS_CHECKSUM, kind, shape.header, whole.segment_size, *checksum)
        self._write(frame, whole.rows)
        return whole.rows

    def _deliver(self, begin: int, size: int) -> None:
        """One packet of a datagram, whatever it is."""
        view = self._datagrams.view[begin : begin + size]
        if size < packet.MIN_HEADER or view[0] >> 4 != 4:
            self.counters["drop_malformed" if size < packet.MIN_HEADER else "drop_not_ipv4"] += 1
        elif not packet.is_ipv4(view, size):
            self.counters["drop_malformed"] += 1
        elif not packet.decrement_ttl(view):
            self.counters["drop_ttl_expired"] += 1
            self._errors.send(packet.TIME_EXCEEDED, view, size)
        else:
            total = view[2] << 8 | view[3]
            self._single[VNET_SIZE : VNET_SIZE + total] = view[:total]
            self._write(self._single[: VNET_SIZE + total], 1)

    def _write(self, frame: memoryview, packets: int) -> None:
        try:
            os.write(self.tun, frame)
        except OSError as error:
            if error.errno in GONE:
                raise DeviceGone(f"{self.name} was deleted") from error
            self.counters["drop_device_down" if error.errno == errno.EIO else "drop_malformed"] += packets
        else:
            received = self._received
            received[0] += packets
            received[1] += len(frame) - VNET_SIZE

    # What the daemon's commands do

    def stop(self, *, remove_device: bool) -> None:
        """End ``run``; without ``remove_device`` the device waits for the next worker."""
        self._running, self._remove_device = False, remove_device

    def state(self) -> dict[str, Any]:
        return {
            "version": control.VERSION,
            "pid": os.getpid(),
            "settings": self.settings,
            "missing": self.offloads.missing,
            "peers": self.peers.entries(),
        }

    def count(self) -> dict[str, int]:
        traffic = zip(("tx_packets", "tx_bytes", "rx_packets", "rx_bytes"), self._sent + self._received, strict=True)
        drops = {f"drop_{cause}": 0 for cause in DROPS}
        return {**dict(traffic), **drops, **self.counters, "drop_receive_queue_full": device.queue_drops(self.udp)}

    def _bind(self, settings: dict[str, Any]) -> socket.socket:
        return device.open_socket(settings["local"], settings["port"], settings["underlay"])

    def configure(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Take other settings without letting go of the device. On failure the old ones stay."""
        if all(settings[key] == self.settings[key] for key in ("local", "port")):
            # Also when only the interface has another name now: a second socket could not have the same port.
            device.repin(self.udp, settings["underlay"])
        else:
            fresh = self._bind(settings)
            device.grant_socket(fresh, self._want_offloads)
            self._epoll.unregister(self.udp.fileno())
            self.udp.close()
            self.udp, self._udp_fd = fresh, fresh.fileno()
            self._epoll.register(fresh.fileno(), select.EPOLLIN)
        self.settings = settings
        return {}
