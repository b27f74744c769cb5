"""What the daemon says about itself in a file beside subnet.env, so that the plugin can name causes.

Two files, both next to the subnet file, so that two daemons on one host do not meet:

``<subnet file>.status.json``, replaced atomically by the daemon whenever a value changes::

    {"version": 1, "ready": false, "degraded": false, "reasons": ["etcd: connection refused (http://10.0.0.1:2379)"],
     "subnet": "10.5.52.0/24", "ipv6_subnet": null, "refuse": "", "pid": 4711}

``ready`` is what /readyz answers, ``reasons`` why not (sentences for people). ``degraded`` is true while containers
that run may be unable to reach each other (device, entries, routes or rules are wrong). ``subnet`` and
``ipv6_subnet`` are what the node leases now, null while that is not known. ``refuse`` is empty, or the reason why no
container may get an address from this subnet (it belongs to another node).

``<subnet file>.lock``, on which the daemon holds an flock(2) as long as it lives: a lock tells a dead daemon from a
silent one across PID namespaces and after a crash. A status whose daemon is dead says nothing. Where flannel's own
daemon runs there is neither file, and subnet.env alone decides.
"""

from __future__ import annotations

import os

from cni import jsontext

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

VERSION = 1


def status_path(subnet_file: str) -> str:
    return f"{subnet_file}.status.json"


def lock_path(subnet_file: str) -> str:
    return f"{subnet_file}.lock"


class DaemonStatus:
    """One state of the daemon. Subnets are spelled as networks: 10.5.52.0/24."""

    __slots__ = ("degraded", "ipv6_subnet", "pid", "ready", "reasons", "refuse", "subnet")

    def __init__(
        self,
        *,
        ready: bool,
        reasons: tuple[str, ...] = (),
        degraded: bool = False,
        subnet: str | None = None,
        ipv6_subnet: str | None = None,
        refuse: str = "",
        pid: int = 0,
    ) -> None:
        self.ready = ready
        self.reasons = reasons
        self.degraded = degraded
        self.subnet = subnet
        self.ipv6_subnet = ipv6_subnet
        self.refuse = refuse
        self.pid = pid


def hold_lock(subnet_file: str) -> int:
    """For the daemon: take the lock and keep the returned descriptor open for life.

    Makes the directory where it is missing. BlockingIOError: another daemon lives on this subnet file.
    """
    import fcntl
    import time

    os.makedirs(os.path.dirname(subnet_file) or ".", mode=0o755, exist_ok=True)
    descriptor = os.open(lock_path(subnet_file), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    for attempt in range(20):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return descriptor
        except BlockingIOError:
            # A plugin that looks holds it shared for a moment; a daemon that lives does not let go.
            if attempt == 19:
                os.close(descriptor)
                raise
            time.sleep(0.05)
    raise AssertionError("unreachable")


def write(subnet_file: str, status: DaemonStatus) -> None:
    """For the daemon: replace the status file. OSError where the directory cannot be written."""
    text = jsontext.dumps({"version": VERSION, **{name: getattr(status, name) for name in DaemonStatus.__slots__}})
    path = status_path(subnet_file)
    temporary = f"{path}.{os.getpid()}.tmp"
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
    try:
        os.write(descriptor, text.encode() + b"\n")
    finally:
        os.close(descriptor)
    os.replace(temporary, path)


def is_alive(subnet_file: str) -> bool | None:
    """Whether the daemon lives; None where no daemon of ours has run since the machine started."""
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


def read(subnet_file: str) -> DaemonStatus | None:
    """The status of a daemon that lives; None where there is none, or where it cannot be read."""
    try:
        with open(status_path(subnet_file), "rb") as file:
            found = jsontext.loads(file.read())
    except (OSError, ValueError):
        return None
    if not isinstance(found, dict) or found.get("version") != VERSION or not is_alive(subnet_file):
        return None
    reasons = found.get("reasons")
    return DaemonStatus(
        ready=found.get("ready") is True,
        reasons=tuple(str(reason) for reason in reasons) if isinstance(reasons, list) else (),
        degraded=found.get("degraded") is True,
        subnet=_text(found.get("subnet")),
        ipv6_subnet=_text(found.get("ipv6_subnet")),
        refuse=_text(found.get("refuse")) or "",
        pid=pid if isinstance(pid := found.get("pid"), int) else 0,
    )


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None
