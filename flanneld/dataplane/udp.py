"""The dataplane's handler for the udp backend: TUN devices whose packets a worker process carries.

The worker outlives the daemon. A daemon that starts finds it by the name of its control socket, asks what it has, and
commands only what differs; packets flow meanwhile. A worker that has ended, or is of another version, counts as
absent: its device is then one whose settings differ from the desired ones, and the next pass starts a new worker and
gives it its peers. The device itself is persistent and keeps its addresses and routes while there is no worker.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

import structlog

from backends.kernel_state import Change, Failure, Foreign, Key, Link, Record, Scope, Tun, UdpPeer
from flanneld.dataplane.handler import Answer
from flanneld.dataplane.udp_tunnel.control import VERSION, Client, WorkerGone

START_SECONDS: Final = 20.0
"""How long a worker may take to carry packets; interpreter and numpy take a tenth of a second on an idle machine."""

STOP_SECONDS: Final = 3.0

log = structlog.get_logger("flanneld.udp")


@dataclass(slots=True)
class _Worker:
    """A worker of ours and what it has: its settings and its peers, by key."""

    client: Client
    settings: Tun
    peers: dict[Key, UdpPeer]
    missing: tuple[str, ...]


class UdpHandler:
    """Link records with Tun settings, and UdpPeer records."""

    def __init__(self, *, offloads: bool = True) -> None:
        """``offloads`` False makes workers that move one packet at a time, as on a kernel that offers nothing else."""
        self._offloads = offloads
        self._workers: dict[str, _Worker] = {}
        self._children: set[int] = set()
        self._links: Mapping[str, Link] = {}
        self._epoll = select.epoll()
        self._answer = Answer()
        self._current = False
        self._look = True
        self._status: dict[str, dict[str, Any]] = {}

    def handles(self, record: Record) -> bool:
        return isinstance(record, UdpPeer) or (isinstance(record, Link) and isinstance(record.settings, Tun))

    def observe(self, scope: Scope, links: Mapping[str, Link]) -> Answer:  # noqa: ARG002 - links say it all
        tuns = {name: link for name, link in links.items() if _is_tun(link)}
        if tuns != self._links:
            self._links, self._current, self._look = tuns, False, True
        self._reap()
        for name, worker in list(self._workers.items()):
            if not worker.client.alive():
                log.warning(
                    "the tunnel worker has ended",
                    device=name,
                    pid=worker.client.pid,
                    reason=worker.client.last_words() or "killed",
                )
                self._forget(name)
        if self._look:
            for name in tuns:
                self._read(name)
            self._look = False
        if not self._current:
            self._answer = self._answer.with_only(self._render())
            self._tell()
            self._current = True
        return self._answer

    def apply(self, changes: Sequence[Change]) -> list[Failure]:
        failures: list[Failure] = []
        peers: dict[str, list[Change]] = {}
        for change in changes:
            record = change.record
            if isinstance(record, UdpPeer):
                peers.setdefault(record.dev, []).append(change)
                continue
            assert isinstance(record, Link)
            self._current = False
            try:
                if change.op == "put":
                    self._put_link(record, change.previous)
                else:
                    self._stop(record.name, remove_device=True)
            except OSError as error:
                failures.append(_failure(change, error))
        for dev, run in peers.items():
            failures += self._apply_peers(dev, run)
        return failures

    def fileno(self) -> int | None:
        return self._epoll.fileno() if self._workers else None

    def invalidate(self) -> None:
        self._look = True

    def close(self) -> None:
        """Let go of the workers, which go on carrying packets."""
        for name in list(self._workers):
            self._forget(name)
        self._epoll.close()

    def status(self) -> dict[str, dict[str, Any]]:
        """By device: the worker's pid, how many peers it has, and which offloads the kernel lacks. From any thread."""
        return self._status

    @staticmethod
    def counters(device: str = "flannel0") -> dict[str, int]:
        """Packets, bytes and drops by cause, asked of the worker over a connection of its own, so from any thread.

        {} when there is no worker in this network namespace.
        """
        try:
            with contextlib.closing(Client(device)) as client:
                return {name: int(value) for name, value in client.ask("counters").items()}
        except WorkerGone:
            return {}

    # Looking

    def _render(self) -> dict[Key, Record]:
        records: dict[Key, Record] = {}
        for name, worker in self._workers.items():
            link = self._links.get(name)
            if link is not None:
                records[link.key] = replace(link, settings=worker.settings)
                records.update(worker.peers)
        return records

    def _tell(self) -> None:
        """A new object each time, for other threads."""
        self._status = {
            name: {
                "worker": worker.client.pid,
                "peers": len(worker.peers),
                "missing_offloads": list(worker.missing),
            }
            for name, worker in self._workers.items()
        }

    def _read(self, name: str) -> None:
        """Ask the worker of a device what it has; one that is absent, or of another version, is none of ours."""
        worker = self._workers.get(name)
        try:
            client = worker.client if worker else Client(name)
        except WorkerGone:
            return
        try:
            state = client.ask("state")
        except WorkerGone:
            state = {}
        if state.get("version") != VERSION:
            if worker:
                self._forget(name)
            else:
                client.close()
            return
        if worker is None:
            self._epoll.register(client, select.EPOLLIN)
        peers = [UdpPeer(name, *entry) for entry in state["peers"]]
        missing = tuple(state["missing"])
        if worker is None and missing:
            log.warning(
                "the kernel lacks offloads for the udp tunnel, which will be slower",
                device=name,
                missing=", ".join(missing),
            )
        self._workers[name] = _Worker(client, Tun(**state["settings"]), {peer.key: peer for peer in peers}, missing)
        self._current = False

    def _forget(self, name: str) -> None:
        worker = self._workers.pop(name)
        self._epoll.unregister(worker.client)
        worker.client.close()
        self._current = False

    # Changing

    def _put_link(self, link: Link, previous: Record | None) -> None:
        assert isinstance(link.settings, Tun)
        if isinstance(previous, Link) and not _is_tun(previous):
            kind = previous.settings.kind if isinstance(previous.settings, Foreign) else "another"
            raise OSError(
                errno.EEXIST,
                f"a device {link.name} of kind {kind or 'hardware'} stands in the way; "
                f"if nobody needs it: ip link del {link.name}",
            )
        worker = self._workers.get(link.name)
        if worker is None or previous is None or not worker.client.alive():
            # Whoever answers to that name has another version, or lost its device.
            self._stop(link.name, remove_device=previous is None)
            self._start(link.name, link.settings)
        elif worker.settings != link.settings:
            answer = worker.client.ask("configure", **asdict(link.settings))
            if "error" in answer:
                raise OSError(errno.EINVAL, answer["error"])
            worker.settings = link.settings

    def _start(self, name: str, settings: Tun) -> None:
        read_end, write_end = os.pipe2(os.O_CLOEXEC)
        argv = [sys.executable, "-P", "-m", "flanneld.dataplane.udp_tunnel"]
        argv += [name, settings.local, str(settings.port), settings.underlay, settings.network]
        argv += [] if self._offloads else ["--no-offloads"]
        try:
            child = os.posix_spawn(
                sys.executable,
                argv,
                {**os.environ, "OPENBLAS_NUM_THREADS": "1"},  # it has nothing to multiply
                file_actions=[
                    (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDWR, 0),
                    (os.POSIX_SPAWN_DUP2, 0, 1),
                    (os.POSIX_SPAWN_DUP2, write_end, 2),
                ],
                setsid=True,
                setsigmask=[],
            )
        finally:
            os.close(write_end)
        self._children.add(child)
        try:
            complaint = _read_all(read_end, START_SECONDS)
        finally:
            os.close(read_end)
        self._read(name)
        if name not in self._workers:
            last = complaint.strip().splitlines()[-1:] or ["it does not answer; see the kernel's log"]
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
            raise OSError(errno.ECHILD, f"cannot start the tunnel worker of {name}: {last[0]}")

    def _stop(self, name: str, *, remove_device: bool) -> None:
        """End the worker of a device, if there is one, and wait until it has let go."""
        if name in self._workers:
            self._forget(name)
        try:
            client = Client(name)
        except WorkerGone:
            return
        with contextlib.closing(client):
            with contextlib.suppress(WorkerGone):
                client.ask("stop", remove_device=remove_device)
            deadline = time.monotonic() + STOP_SECONDS
            while client.alive():
                if time.monotonic() > deadline and client.pid:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(client.pid, signal.SIGKILL)
                    deadline += STOP_SECONDS
                select.select([client], [], [], 0.1)
        self._reap()

    def _apply_peers(self, dev: str, changes: Sequence[Change]) -> list[Failure]:
        put, remove = [], []
        for change in changes:
            peer = change.record
            assert isinstance(peer, UdpPeer)
            if change.op == "put":
                put.append((peer.subnet, peer.address, peer.port))
            else:
                remove.append(peer.subnet)
        worker = self._workers.get(dev)
        if worker is None:
            gone = OSError(errno.ENODEV, f"there is no tunnel worker for {dev}")
            return [_failure(change, gone) for change in changes if change.op == "put"]
        try:
            answer = worker.client.ask("peers", put=put, remove=remove)
        except WorkerGone as error:
            self._forget(dev)
            return [_failure(change, error) for change in changes]
        if "error" in answer:
            self._look = True
            return [_failure(change, OSError(errno.EINVAL, answer["error"])) for change in changes]
        news: dict[Key, Record | None] = {}
        for change in changes:
            peer = change.record
            assert isinstance(peer, UdpPeer)
            if change.op == "put":
                worker.peers[peer.key] = news[peer.key] = peer
            else:
                worker.peers.pop(peer.key, None)
                news[peer.key] = None
        if dev in self._links:
            self._answer = self._answer.with_changes(news)
        self._tell()
        return []

    def _reap(self) -> None:
        for child in list(self._children):
            with contextlib.suppress(ChildProcessError):
                if os.waitpid(child, os.WNOHANG) == (0, 0):
                    continue
            self._children.discard(child)


def _is_tun(link: Link) -> bool:
    """Whether it may be a device of ours; wireguard-go's are TUN devices, too."""
    if isinstance(link.settings, Foreign):
        return link.settings.kind == "tun" and not link.name.startswith("flannel-wg")
    return isinstance(link.settings, Tun)


def _read_all(descriptor: int, seconds: float) -> str:
    """What arrives until the other side closes."""
    data, deadline = b"", time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0:
        if select.select([descriptor], [], [], left)[0]:
            more = os.read(descriptor, 65536)
            if not more:
                break
            data += more
    return data.decode(errors="replace")


def _failure(change: Change, error: OSError) -> Failure:
    return Failure(change, errno.errorcode.get(error.errno or 0, "udp"), error.strerror or str(error))
