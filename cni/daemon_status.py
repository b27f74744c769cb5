"""What the daemon says about itself in ``flanneld-status.json`` beside subnet.env, so that the plugin can name causes.

The daemon replaces the file atomically whenever a value changes (all keys: docs/cni.md). The plugin reads::

    {"pid": 4711, "ready": false, "reasons": ["store: etcd: connection refused (http://10.0.0.1:2379)"],
     "subnet": "10.5.52.0/24", "ipv6_subnet": null, "refuse": "", "subnet_file": "/run/flannel/subnet.env"}

``pid`` is null once the daemon has stopped. ``reasons`` say why it is not ready, each as "condition: sentence".
``subnet`` and ``ipv6_subnet`` are what the node leases, null while that is not known. ``refuse`` (may be left out)
says why no container may get an address from this subnet: it belongs to another node. ``subnet_file`` (may be left out)
keeps two daemons apart that share the directory: a status that speaks of another subnet file is not for us.

A daemon that crashed leaves its file. Beside it ``<subnet file>.lock`` carries an flock(2) as long as the daemon
lives, which holds across PID namespaces; without the lock file, a subnet.env that is newer than the status means that
somebody else (flannel's daemon) has taken over. Such a status says nothing, and subnet.env alone decides.
"""

from __future__ import annotations

import os

from cni import jsontext

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

FILE_NAME = "flanneld-status.json"
# While one of these is wrong, containers that run may be unable to reach each other.
_DATA_PATH = ("kernel:", "underlay:")


def status_path(subnet_file: str) -> str:
    return os.path.join(os.path.dirname(subnet_file), FILE_NAME)


def lock_path(subnet_file: str) -> str:
    return f"{subnet_file}.lock"


class DaemonStatus:
    """One state of the daemon. Subnets are spelled as networks: 10.5.52.0/24."""

    __slots__ = ("ipv6_subnet", "ready", "reasons", "refuse", "subnet")

    def __init__(self, found: dict[str, Any]) -> None:
        reasons = found.get("reasons")
        self.ready = found.get("ready") is True
        self.reasons = [str(reason) for reason in reasons] if isinstance(reasons, list) else []
        self.subnet = _text(found.get("subnet"))
        self.ipv6_subnet = _text(found.get("ipv6_subnet"))
        self.refuse = _text(found.get("refuse")) or ""

    @property
    def degraded(self) -> str:
        """What is wrong with the data path; "" where nothing is known to be."""
        return "; ".join(reason for reason in self.reasons if reason.startswith(_DATA_PATH))


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None


def read(subnet_file: str) -> DaemonStatus | None:
    """The status of a daemon that lives; None where there is none, or where it cannot be read."""
    try:
        with open(status_path(subnet_file), "rb") as file:
            found = jsontext.loads(file.read())
            written = os.fstat(file.fileno()).st_mtime
    except (OSError, ValueError):
        return None
    if not isinstance(found, dict) or not isinstance(found.get("pid"), int):
        return None
    if found.get("subnet_file", subnet_file) != subnet_file:
        return None
    alive = is_alive(subnet_file)
    if alive is None:
        try:
            alive = os.stat(subnet_file).st_mtime <= written
        except OSError:
            alive = True  # there is no subnet yet, and the status says why
    return DaemonStatus(found) if alive else None


def is_alive(subnet_file: str) -> bool | None:
    """Whether the daemon holds its lock; None where no lock file tells."""
    try:
        descriptor = os.open(lock_path(subnet_file), os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return None
    finally:
        os.close(descriptor)
    return False


def hold_lock(subnet_file: str) -> int:
    """For the daemon: take the lock, and keep the returned descriptor open for life.

    Makes the directory where it is missing. BlockingIOError: another daemon lives on this subnet file.
    """
    import fcntl
    import time

    os.makedirs(os.path.dirname(subnet_file) or ".", mode=0o755, exist_ok=True)
    descriptor = os.open(lock_path(subnet_file), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    deadline = time.monotonic() + 1
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return descriptor
        except BlockingIOError:
            # A plugin that looks holds it shared for a moment; a daemon that lives does not let go.
            if time.monotonic() > deadline:
                os.close(descriptor)
                raise
        time.sleep(0.02)
