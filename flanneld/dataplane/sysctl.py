"""Sysctls, read and written under /proc/sys. /proc/sys/net is that of the calling thread's network namespace."""

from __future__ import annotations

import errno
from collections.abc import Iterable
from pathlib import Path

from backends.kernel_state import Change, Failure, Key, Sysctl

ROOT = Path("/proc/sys")


def read(path: str) -> str | None:
    """The value of a sysctl (path as in ``Sysctl``); None where there is none, as for those of an absent device."""
    try:
        return " ".join((ROOT / path).read_text().split())
    except (FileNotFoundError, NotADirectoryError, PermissionError, IsADirectoryError):
        return None
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.ENODEV, errno.EIO):
            return None
        raise


class Sysctls:
    """Reads and writes, and remembers what this host cannot have.

    A kernel without IPv6 has no accept_ra, and a container may have a read-only /proc/sys. Neither will change while
    we run, and nothing that we set is vital: it is reported as a failure once and taken as settled from then on.
    """

    def __init__(self) -> None:
        self._settled: dict[str, str] = {}

    def observe(self, paths: Iterable[str]) -> dict[Key, Sysctl]:
        """Those of the sysctls that exist."""
        seen = ((path, self._settled.get(path) or read(path)) for path in paths)
        return {record.key: record for record in (Sysctl(path, value) for path, value in seen if value is not None)}

    def apply(self, change: Change) -> Failure | None:
        """Write one. Removal changes nothing: the kernel does not say what the value was before."""
        record = change.record
        assert isinstance(record, Sysctl)
        if change.op == "remove":
            return None
        try:
            (ROOT / record.path).write_text(record.value)
        except OSError as error:
            if error.errno == errno.EROFS or not _family_is_there(record.path):
                self._settled[record.path] = record.value
            cause = errno.errorcode.get(error.errno or 0, "OSError")
            why = f"sysctl {record.path} = {record.value}: {error.strerror}. {_remedy(error, record)}"
            return Failure(change, cause, why)
        self._settled.pop(record.path, None)
        return None


def _family_is_there(path: str) -> bool:
    """Whether /proc/sys/net/ipv6 and the like exist."""
    return ROOT.joinpath(*Path(path).parts[:2]).is_dir()


def _remedy(error: OSError, record: Sysctl) -> str:
    if not _family_is_there(record.path):
        return "The kernel runs without it (ipv6.disable=1?), so there is nothing to set: going on"
    if error.errno == errno.EROFS:
        return (
            "/proc/sys is read-only here: set it on the host, or give the container a writable /proc/sys/net. Going on "
            "without"
        )
    if error.errno in (errno.EPERM, errno.EACCES):
        return "Run as root, or with CAP_NET_ADMIN"
    if error.errno == errno.ENOENT:
        return "There is no such setting: is the device there?"
    return f"See what the kernel takes: sysctl {record.path.replace('/', '.')}"
