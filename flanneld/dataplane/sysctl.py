"""Sysctls, read and written under /proc/sys. /proc/sys/net is that of the calling thread's network namespace."""

from __future__ import annotations

import errno
from collections.abc import Iterable
from pathlib import Path

from backends.kernel_state import Change, Failure, Key, Sysctl

ROOT = Path("/proc/sys")


def read(path: str) -> str | None:
    """The value of a sysctl (path as in ``Sysctl``); None where there is none, as for the sysctls of an absent device."""
    try:
        return " ".join((ROOT / path).read_text().split())
    except (FileNotFoundError, NotADirectoryError, PermissionError, IsADirectoryError):
        return None
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.ENODEV, errno.EIO):
            return None
        raise


def observe(paths: Iterable[str]) -> dict[Key, Sysctl]:
    """Those of the sysctls that exist."""
    seen = ((path, read(path)) for path in paths)
    return {record.key: record for record in (Sysctl(path, value) for path, value in seen if value is not None)}


def apply(change: Change) -> Failure | None:
    """Write one. Removal of a wish changes nothing: the kernel does not say what the value was before."""
    record = change.record
    assert isinstance(record, Sysctl)
    if change.op == "remove":
        return None
    try:
        (ROOT / record.path).write_text(record.value)
    except OSError as error:
        cause = errno.errorcode.get(error.errno or 0, "OSError")
        return Failure(
            change, cause, f"sysctl {record.path} = {record.value}: {error.strerror}. {_remedy(error, record)}"
        )
    return None


def _remedy(error: OSError, record: Sysctl) -> str:
    name = record.path.replace("/", ".")
    if error.errno == errno.EROFS:
        return f"/proc/sys is read-only here: set {name} on the host (sysctl -w), or give the container a writable /proc/sys/net"
    if error.errno in (errno.EPERM, errno.EACCES):
        return "Run as root, or with CAP_NET_ADMIN"
    if error.errno == errno.ENOENT:
        return "The kernel has no such setting: is the device there, and IPv6 enabled?"
    return f"See what the kernel takes: sysctl {name}"
