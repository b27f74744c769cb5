"""The delegate configurations that ADD used, kept until the delegate's DEL has succeeded.

One file for each container *and* interface, ``<dataDir>/<containerID>:<ifname>``. A hard link ``<containerID>``, the
name that flannel's plugin uses, lets that plugin delete what we added, and ours is found by it after a hand-back. Its
files are read here for the same reason.
"""

from __future__ import annotations

import os

from cni import jsontext
from cni.errors import IO_FAILURE, CniError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

# One key more than the delegate was given: what we must know to tell a dead attachment (delegates ignore it).
MARK = "flanneld.attachment"


class Attachment:
    """One cached configuration. ``ifname`` is "" where flannel's plugin wrote it; ``conf`` None where unreadable."""

    __slots__ = ("conf", "container", "ifname", "path")

    def __init__(self, path: str, container: str, ifname: str, conf: dict[str, Any] | None) -> None:
        self.path = path
        self.container = container
        self.ifname = ifname
        self.conf = conf

    def delegate_conf(self) -> dict[str, Any] | None:
        """The configuration as the delegate was given it."""
        return None if self.conf is None else {key: value for key, value in self.conf.items() if key != MARK}

    def mark(self) -> dict[str, Any]:
        """``ifname``, ``netns`` and ``bootID`` of the ADD; empty for a file of flannel's plugin."""
        found = (self.conf or {}).get(MARK)
        return found if isinstance(found, dict) else {}

    def remove(self) -> None:
        """Forget it, under both of its names."""
        legacy = os.path.join(os.path.dirname(self.path), self.container)
        if legacy != self.path and _same_file(legacy, self.path):
            _unlink(legacy)
        _unlink(self.path)


def boot_id() -> str:
    """The kernel's name for this boot; "" where /proc is not there."""
    try:
        with open("/proc/sys/kernel/random/boot_id", "rb") as file:
            return file.read().decode("ascii").strip()
    except OSError:
        return ""


def save(data_dir: str, container: str, ifname: str, netns: str, conf: dict[str, Any]) -> int:
    """Put the configuration in place, atomically; the open file, on which the caller calls fsync.

    The disk is given time: the caller syncs while the delegate works. A machine that dies in between has lost the
    container as well, and DEL copes with a torn file.
    """
    path = os.path.join(data_dir, f"{container}:{ifname}")
    temporary = os.path.join(data_dir, f".{container}:{ifname}.{os.getpid()}")
    text = jsontext.dumps({**conf, MARK: {"ifname": ifname, "netns": netns, "bootID": boot_id()}})
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
    try:
        try:
            descriptor = os.open(temporary, flags, 0o600)
        except FileNotFoundError:
            os.makedirs(data_dir, mode=0o700, exist_ok=True)
            descriptor = os.open(temporary, flags, 0o600)
        os.write(descriptor, text.encode())
        legacy = os.path.join(data_dir, container)
        _unlink(legacy)
        os.rename(temporary, path)
        try:
            os.link(path, legacy)
        except OSError:
            pass  # a file system without hard links: only the hand-back to flannel's plugin needs it
    except OSError as error:
        raise CniError(IO_FAILURE, f"cannot store the delegate's configuration in {data_dir}: {error}") from None
    return descriptor


def find(data_dir: str, container: str, ifname: str) -> Attachment | None:
    """What ADD stored for this attachment, by us or by flannel's plugin; None where there is nothing."""
    for name in (f"{container}:{ifname}", container):
        path = os.path.join(data_dir, name)
        conf, exists = _read(path)
        if not exists:
            continue
        found = Attachment(path, container, ifname, conf)
        # The link of another interface of the same container is not ours to use.
        if name != container or found.mark().get("ifname", ifname) == ifname:
            return found
    return None


def everything(data_dir: str) -> Iterator[Attachment]:
    """All cached configurations, each once; ours by both names, flannel's by its one."""
    try:
        names = sorted(os.listdir(data_dir))
    except OSError:
        return
    for name in names:
        if name.startswith("."):
            continue
        path = os.path.join(data_dir, name)
        container, colon, ifname = name.partition(":")
        conf, exists = _read(path)
        if not exists:
            continue
        found = Attachment(path, container, ifname, conf)
        if not colon and found.mark() and f"{container}:{found.mark().get('ifname')}" in names:
            continue
        yield found


def _read(path: str) -> tuple[dict[str, Any] | None, bool]:
    """The file's JSON object (None where it holds none), and whether there is a file."""
    try:
        with open(path, "rb") as file:
            value = jsontext.loads(file.read())
    except FileNotFoundError:
        return None, False
    except ValueError:
        return None, True
    except OSError as error:
        raise CniError(IO_FAILURE, f"cannot read the stored configuration {path}: {error}") from None
    return (value if isinstance(value, dict) else None), True


def _same_file(first: str, second: str) -> bool:
    try:
        return os.path.samestat(os.stat(first), os.stat(second))
    except OSError:
        return False


def _unlink(path: str) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass
