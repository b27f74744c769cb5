"""WireGuard devices and their peers, whoever encrypts: the kernel's module where there is one, else wireguard-go.

Three things are special. Nobody tells when a peer changes, so devices are read on a schedule. An endpoint may differ
from the lease's for a good reason: WireGuard follows a peer that roams or sits behind NAT. So a roamed endpoint counts
as the desired one while handshakes are fresh, and is put back when they are stale (field problem 32): the peer is then
not where it was last heard, and the lease is the best guess. And wireguard-go goes on sending from an address that this
host has lost (the kernel answers ENETUNREACH where it expects EINVAL), and by the interface by which a peer was last
heard; so when the tunnels' own address or their way out changes, every endpoint is set again to what it is; also at the
start, since nobody knows what they were before. No record says otherwise than before, so this is no change, and it takes
no packet.
"""

from __future__ import annotations

import contextlib
import errno
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any, Final

from backends.kernel_state import Change, Failure, Foreign, Key, Link, Record, Scope, Wireguard, WireguardPeer
from flanneld.dataplane.handler import Answer
from flanneld.dataplane.links import IFF_UP, IFINFOMSG
from flanneld.dataplane.netlink import Netlink
from flanneld.dataplane.ticker import Ticker
from flanneld.dataplane.udp_ports import check_free, listens
from flanneld.dataplane.wire import RTM_NEWLINK
from flanneld.dataplane.wireguard_device import DeviceState, Engine, NotHere, PeerState, PeerWrite
from flanneld.dataplane.wireguard_kernel import Kernel
from flanneld.dataplane.wireguard_userspace import Userspace

STALE_SECONDS: Final = 180
"""REJECT_AFTER_TIME of WireGuard: a session older than this carries nothing any more."""

LOOK_SECONDS: Final = 4
"""How often devices are read while there are any, so that what somebody alters is put back within five seconds; less
often where reading takes long (LOOK_SHARE)."""

LOOK_LIMIT: Final = 60
"""Never less often than this, in seconds."""

LOOK_SHARE: Final = 0.005
"""The part of one core that looking may take."""


_GONE: Final = frozenset({errno.ENODEV, errno.ENOENT, errno.ECONNREFUSED, errno.ECONNRESET, errno.EPIPE})


@dataclass(slots=True)
class _Device:
    engine: Engine
    state: DeviceState = field(default_factory=DeviceState)
    listening: bool = True


class WireguardHandler:
    """The dataplane's handler for Link records with Wireguard settings and for WireguardPeer records."""

    def __init__(
        self,
        engines: Sequence[Engine] | None = None,
        *,
        clock: Callable[[], float] = time.time,
        look_seconds: float = LOOK_SECONDS,
    ) -> None:
        self._engines = tuple(engines) if engines is not None else (Kernel(), Userspace())
        self._clock = clock
        self._devices: dict[str, _Device] = {}
        self._pinned: dict[Key, str] = {}
        self._sources: tuple[str, ...] = ()
        self._links: dict[str, Link] = {}
        self._status: dict[str, dict[str, Any]] = {}
        self._answer = Answer()
        self._answer_current = False
        self._look = True
        self._ticker = Ticker(look_seconds)

    def handles(self, record: Record) -> bool:
        if isinstance(record, Link):
            return isinstance(record.settings, Wireguard)
        return isinstance(record, WireguardPeer)

    def observe(self, scope: Scope, links: Mapping[str, Link]) -> Answer:
        relevant = {name: link for name, link in links.items() if _may_be_wireguard(link)}
        moved = bool(scope.sources) and scope.sources != self._sources
        if moved or relevant != self._links or self._ticker.ticked():
            self._look = True
        if self._look:
            self._links = relevant
            self._read_all()
            self._look = self._answer_current = False
        if moved:
            self._forget_sources()
            self._sources = scope.sources
        if not self._answer_current:
            self._answer = self._answer.with_only(self._render())
            self._answer_current = True
        return self._answer

    def apply(self, changes: Sequence[Change]) -> list[Failure]:
        failures: list[Failure] = []
        for dev, group in groupby(changes, _device_of):
            run = list(group)
            if isinstance(run[0].record, Link):
                failures += [failure for change in run if (failure := self._apply_link(change))]
                self._answer_current = False
            else:
                failures += self._apply_peers(dev, run)
                self._renew(run)
        return failures

    def fileno(self) -> int | None:
        return self._ticker.fileno() if self._devices else None

    def invalidate(self) -> None:
        self._look = True

    def forget_sources(self) -> None:
        """The way out is another one: at the next look, nothing is sent as before."""
        self._sources = ()

    def close(self) -> None:
        self._ticker.close()
        for engine in self._engines:
            engine.close()

    def status(self) -> dict[str, dict[str, Any]]:
        """By device: who encrypts ("kernel" or "wireguard-go"), the port, how many peers, and how many of them have
        shaken hands recently. As of the last look; a new object each time, so from any thread.
        """
        return self._status

    # --- looking ---------------------------------------------------------------------------------------------------

    def _read_all(self) -> None:
        start = time.thread_time()
        devices: dict[str, _Device] = {}
        for name, link in self._links.items():
            kind = link.settings.kind if isinstance(link.settings, Foreign) else "wireguard"
            engine = next((engine for engine in self._engines if engine.holds(name, kind)), None)
            if engine is None:
                continue
            try:
                state = engine.read(name)
            except OSError as error:
                if error.errno in _GONE:
                    continue  # it has just gone; rtnetlink will say so, too
                raise
            devices[name] = _Device(engine, state, not link.up or listens(state.listen_port))
        self._devices = devices
        self._status = {
            name: {
                "engine": device.engine.name,
                "listen_port": device.state.listen_port,
                "peers": len(device.state.peers),
                "alive": sum(self._fresh(peer) for peer in device.state.peers.values()),
            }
            for name, device in devices.items()
        }
        self._pinned = {key: pinned for key, pinned in self._pinned.items() if key[1] in devices}
        if devices:
            self._ticker.run(min((time.thread_time() - start) / LOOK_SHARE, LOOK_LIMIT))

    def _forget_sources(self) -> None:
        """Let packets leave from the address that the routing table names now, whatever they left from before."""
        for name, device in self._devices.items():
            if device.engine.clings_to_source:
                peers = device.state.peers.items()
                writes = [PeerWrite(key, endpoint=peer.endpoint) for key, peer in peers if peer.endpoint]
                try:
                    device.engine.write(name, writes)
                except OSError as error:
                    if error.errno not in _GONE:
                        raise

    def _render(self) -> dict[Key, Record]:
        records: dict[Key, Record] = {}
        for name, device in self._devices.items():
            link = self._links.get(name)
            if link is not None:
                # A device that is up and does not listen has lost its port to somebody; 0 makes that a difference.
                port = device.state.listen_port if device.listening else 0
                link = replace(link, settings=Wireguard(port, device.state.private_key))
                records[link.key] = link
            for public_key, peer in device.state.peers.items():
                record = self._record(name, public_key, peer)
                records[record.key] = record
        return records

    def _renew(self, changes: Sequence[Change]) -> None:
        """Bring the answer up to date for these peers alone: one change among thousands costs one record."""
        news: dict[Key, Record | None] = {}
        for change in changes:
            peer = change.record
            assert isinstance(peer, WireguardPeer)
            device = self._devices.get(peer.dev)
            state = device.state.peers.get(peer.public_key) if device else None
            news[peer.key] = None if state is None else self._record(peer.dev, peer.public_key, state)
        self._answer = self._answer.with_changes(news)

    def _record(self, dev: str, public_key: str, peer: PeerState) -> WireguardPeer:
        record = WireguardPeer(dev, public_key, peer.endpoint, peer.allowed_ips, peer.keepalive, peer.preshared_key)
        pinned = self._pinned.get(record.key)
        if pinned is not None and pinned != peer.endpoint and self._fresh(peer):
            return replace(record, endpoint=pinned)
        return record

    def _fresh(self, peer: PeerState) -> bool:
        return peer.handshake > 0 and self._clock() - peer.handshake < STALE_SECONDS

    # --- changing --------------------------------------------------------------------------------------------------

    def _apply_link(self, change: Change) -> Failure | None:
        link = change.record
        assert isinstance(link, Link)
        if change.op == "remove":
            # Deleting the device, which the dataplane does next, also ends wireguard-go.
            self._devices.pop(link.name, None)
            return None
        assert isinstance(link.settings, Wireguard)
        try:
            self._put_link(link, link.settings, change.previous)
        except OSError as error:
            return _failure(change, error)
        return None

    def _put_link(self, link: Link, wanted: Wireguard, previous: Record | None) -> None:
        device = self._devices.get(link.name)
        if device is None and isinstance(previous, Link):
            kind = previous.settings.kind if isinstance(previous.settings, Foreign) else "other"
            raise OSError(
                errno.EEXIST,
                f"a device {link.name} of kind {kind or 'hardware'} stands in the way; if nobody needs it: "
                f"ip link del {link.name}",
            )
        if device is None:
            check_free(wanted.listen_port)
            device = self._devices[link.name] = self._create(link.name)
        elif not device.listening and not listens(wanted.listen_port):
            check_free(wanted.listen_port)
            _bounce(link.name)
        elif device.state.listen_port != wanted.listen_port:
            check_free(wanted.listen_port)
        state = device.state
        if (state.private_key, state.listen_port) != (wanted.private_key, wanted.listen_port):
            device.engine.configure(link.name, wanted.private_key, wanted.listen_port)
            state.private_key, state.listen_port = wanted.private_key, wanted.listen_port
        device.listening = True

    def _create(self, dev: str) -> _Device:
        missing: list[str] = []
        for engine in self._engines:
            try:
                engine.create(dev)
            except NotHere as error:
                missing.append(error.strerror or str(error))
            else:
                return _Device(engine)
        raise OSError(errno.EOPNOTSUPP, f"no WireGuard on this host: {', and '.join(missing)}; install one of them")

    def _apply_peers(self, dev: str, changes: Sequence[Change]) -> list[Failure]:
        device = self._devices.get(dev)
        if device is None:
            absent = OSError(errno.ENODEV, f"there is no WireGuard device {dev}")
            return [_failure(change, absent) for change in changes if change.op == "put"]
        writes = [self._write(device.state, change) for change in changes]
        try:
            device.engine.write(dev, writes)
        except OSError:
            # Which of them it was shows when they are made one by one; making one twice changes nothing.
            return [failure for c, w in zip(changes, writes, strict=True) if (failure := self._one(device, c, w))]
        for change in changes:
            self._know(device.state, change)
        return []

    def _one(self, device: _Device, change: Change, write: PeerWrite) -> Failure | None:
        peer = change.record
        assert isinstance(peer, WireguardPeer)
        try:
            device.engine.write(peer.dev, [write])
        except OSError as error:
            self._look = True
            return _failure(change, error)
        self._know(device.state, change)
        return None

    def _write(self, state: DeviceState, change: Change) -> PeerWrite:
        """Only what differs is written, so that a standing session is not disturbed."""
        want = change.record
        assert isinstance(want, WireguardPeer)
        if change.op == "remove":
            return PeerWrite(want.public_key, remove=True)
        have = state.peers.get(want.public_key)
        if have is None:
            return PeerWrite(
                want.public_key,
                endpoint=want.endpoint,
                allowed_ips=want.allowed_ips,
                keepalive=want.keepalive,
                preshared_key=want.preshared_key,
            )
        return PeerWrite(
            want.public_key,
            endpoint=want.endpoint if self._must_pin(want, have) else None,
            allowed_ips=want.allowed_ips if want.allowed_ips != have.allowed_ips else None,
            keepalive=want.keepalive if want.keepalive != have.keepalive else None,
            preshared_key=(want.preshared_key or "") if want.preshared_key != have.preshared_key else None,
        )

    def _must_pin(self, want: WireguardPeer, have: PeerState) -> bool:
        """Whether the endpoint is to be written: not when the peer is alive where it roamed to.

        If the lease has changed meanwhile, it tells better. A daemon that has just started does not know what the lease
        said before, and waits until the handshake is stale.
        """
        if want.endpoint == have.endpoint:
            return False
        lease_changed = self._pinned.get(want.key, want.endpoint) != want.endpoint
        return lease_changed or not self._fresh(have)

    def _know(self, state: DeviceState, change: Change) -> None:
        """Take over an acknowledged write."""
        want = change.record
        assert isinstance(want, WireguardPeer)
        if change.op == "remove":
            state.peers.pop(want.public_key, None)
            self._pinned.pop(want.key, None)
            return
        have = state.peers.get(want.public_key)
        endpoint = want.endpoint if have is None or self._must_pin(want, have) else have.endpoint
        state.peers[want.public_key] = replace(
            have or PeerState(),
            endpoint=endpoint,
            allowed_ips=want.allowed_ips,
            keepalive=want.keepalive,
            preshared_key=want.preshared_key,
        )
        self._pinned[want.key] = want.endpoint


def _may_be_wireguard(link: Link) -> bool:
    if isinstance(link.settings, Foreign):
        return link.settings.kind in ("wireguard", "tun")
    return isinstance(link.settings, Wireguard)


def _device_of(change: Change) -> str:
    record = change.record
    return f"link {record.name}" if isinstance(record, Link) else getattr(record, "dev", "")


def _failure(change: Change, error: OSError) -> Failure:
    return Failure(change, errno.errorcode.get(error.errno or 0, "wireguard"), error.strerror or str(error))


def _bounce(dev: str) -> None:
    """Down and up: wireguard-go opens its UDP socket only then. The reconciler puts back what goes with it."""
    with contextlib.closing(Netlink()) as netlink:
        for flags in (0, IFF_UP):
            body = IFINFOMSG.pack(0, 0, 0, socket.if_nametoindex(dev), flags, IFF_UP)
            netlink.request(RTM_NEWLINK, 0, body)
