"""What this node leaves on disk for others: subnet.env for CNI and Docker, the status file, and a CNI conflist."""

from __future__ import annotations

import os
import threading
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path
from typing import Any

import structlog

from backends.backend import Underlay
from backends.kernel_state import Link
from flanneld.board import Board
from flanneld.desired import Standing
from flanneld.options import Options
from flanneld.status import Health, write_status_file
from subnet_lease import subnet_file

log = structlog.get_logger("flanneld")

STATUS_FILE = "flanneld-status.json"
"""Beside subnet.env; the format stands in docs/cni.md."""


class Outputs:
    """Writes when something changed, or when somebody took away what was written; only then."""

    def __init__(self, options: Options, board: Board, health: Health) -> None:
        self._subnet_file = Path(options.subnet_file)
        self._status_file = self._subnet_file.with_name(STATUS_FILE)
        self._options = options
        self._board = board
        self._health = health
        self._written: Standing | None = None
        self._marks: tuple[object, ...] = ()
        self._lock = threading.Lock()
        self._subnet_problem: str | None = None
        self._status_problem: str | None = None

    def data_path_stands(self, standing: Standing) -> None:
        """Write subnet.env, once the kernel has what it promises (from the reconciler's thread, at every look)."""
        if standing is self._written and self._status_problem is None and self._marks == self._look():
            return
        if standing is self._written and self._marks[:1] != self._look()[:1]:
            log.warning("somebody removed or changed the subnet file; it is written again", file=str(self._subnet_file))
        self._subnet_problem = self._write_subnet_file(standing)
        self._judge()
        if self._subnet_problem is None:
            self._written = standing
            self.write_status()
            self._marks = self._look()

    def _look(self) -> tuple[object, ...]:
        """What tells that our files are still those that we wrote, and say what is so."""
        lease = self._board.lease
        return _mark(self._subnet_file), self._status_file.exists(), lease is not None and lease.reservation

    def _write_subnet_file(self, standing: Standing) -> str | None:
        """What went wrong, None if nothing."""
        where = f"--subnet-file={self._subnet_file}"
        try:
            subnet_file.write(self._subnet_file, subnet_env(standing, self._options.ip_masq))
            if self._options.cni_conf:
                from flanneld.ctl.cni_conf import write_conflist

                where = f"--cni-conf={self._options.cni_conf}"
                write_conflist(Path(self._options.cni_conf), self._subnet_file)
        except OSError as error:
            return f"cannot write {where}: {error.strerror}; mend that, or choose another"
        except ValueError as error:
            return f"cannot write {where}: {error}"
        return None

    def write_status(self) -> None:
        """Write the status file, from any thread."""
        problem = None
        with self._lock:
            try:
                write_status_file(self._status_file, self.summary())
            except OSError as error:
                problem = f"cannot write {self._status_file}: {error.strerror}"
        if problem != self._status_problem:
            self._status_problem = problem
            self._judge()  # without the lock: a condition that changes is written to this file

    def _judge(self) -> None:
        self._health.set("subnet_file", self._subnet_problem or self._status_problem)

    def stopped(self) -> None:
        """Say that nobody keeps this up any more; the subnet stays valid."""
        with self._lock:
            try:
                write_status_file(self._status_file, {**self.summary(), "pid": None})
            except OSError:
                return

    def summary(self) -> dict[str, Any]:
        """The status file's contents."""
        standing = self._board.standing
        base: dict[str, Any] = {
            "pid": os.getpid(),
            "ready": self._health.ready,
            "reasons": list(self._health.reasons),
            "node": self._options.node_name,
            "subnet_file": str(self._subnet_file),
            "healthz": listening(self._options),
            "refuse": self._board.refuse,
            "subnet": None,
            "ipv6_subnet": None,
        }
        if standing is None:
            return base
        host, lease = standing.host, standing.lease
        return {
            **base,
            "subnet": str(lease.subnet) if lease.subnet else None,
            "ipv6_subnet": str(lease.ipv6_subnet) if lease.ipv6_subnet else None,
            # The standing stays when an operator turns a lease into a reservation, or back.
            "reservation": (self._board.lease or lease).reservation,
            "backend": standing.backend.name,
            "mtu": mtu_of(standing),
            "devices": [r.name for r in standing.backend.host_state(host) if isinstance(r, Link)],
            "vtep_mac": host.facts.get("vtep_mac"),
            **_underlay(host.underlay),
        }


def listening(options: Options) -> str | None:
    """Where this daemon answers over HTTP, None if it does not."""
    ip = options.healthz_ip or "0.0.0.0"
    return f"{f'[{ip}]' if ':' in ip else ip}:{options.healthz_port}" if options.healthz_port else None


def _mark(path: Path) -> tuple[int, ...] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def _underlay(underlay: Underlay) -> dict[str, Any]:
    return {
        "interface": underlay.name,
        "local": [str(a) for a in underlay.local.values()],
        "public": [str(a) for a in underlay.public.values()],
    }


def mtu_of(standing: Standing) -> int:
    return standing.backend.mtu(standing.host.underlay, standing.host.families)


def subnet_env(standing: Standing, ip_masq: bool) -> subnet_file.SubnetFile:
    """subnet.env for this standing; a family's lines only where it runs."""
    host = standing.host
    v4, v6 = host.subnets.get(4), host.subnets.get(6)
    assert not isinstance(v4, IPv6Network)
    assert not isinstance(v6, IPv4Network)
    return subnet_file.SubnetFile(
        network=host.config.network if v4 else None,
        subnet=v4,
        ipv6_network=host.config.ipv6_network if v6 else None,
        ipv6_subnet=v6,
        mtu=mtu_of(standing),
        ip_masq=ip_masq,
    )
