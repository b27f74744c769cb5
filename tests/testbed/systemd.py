"""A real systemd as process 1, in namespaces of its own on top of this machine's files.

Whatever it writes goes into memory and is gone with it: an overlay in a tmpfs covers the machine's root. Of the units
that a boot would start, only journald's sockets are left: the others set up hardware and global sysctls.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import pytest

from flanneld.lab.netns import Namespace, end
from flanneld.lab.wait import wait_until

REPOSITORY: Final = Path(__file__).resolve().parents[2]
SYSTEMD: Final = Path("/lib/systemd/systemd")

BOOT: Final = r"""
set -e
lacking() { echo "this kernel or container has no $1 to mount"; exit 77; }
mount --make-rprivate / && mount -t tmpfs tmpfs "$AREA" || lacking tmpfs
mkdir "$AREA/upper" "$AREA/work" "$AREA/root"
mount -t overlay overlay -o lowerdir=/,upperdir="$AREA/upper",workdir="$AREA/work" "$AREA/root" || lacking overlay
R=$AREA/root
mount -t proc proc "$R/proc"
for part in fs kernel vm; do mount --bind "$R/proc/sys/$part" "$R/proc/sys/$part"
  mount -o remount,bind,ro "$R/proc/sys/$part"; done
mount -t sysfs sysfs "$R/sys"
for place in run tmp dev sys/fs/cgroup; do mount -t tmpfs tmpfs "$R/$place"; done
mkdir -p "$R/dev/net" "$R/dev/shm" "$R/opt/lab" "$R/opt/python" "$R/etc/systemd/system/flanneld.service.d"
for node in null zero full random urandom tty net/tun; do touch "$R/dev/$node"; mount --bind "/dev/$node" "$R/dev/$node"; done
ln -s /proc/self/fd "$R/dev/fd"
if [ -e /sys/fs/cgroup/cgroup.controllers ]; then mount -t cgroup2 cgroup2 "$R/sys/fs/cgroup" || lacking cgroup2
else mkdir "$R/sys/fs/cgroup/systemd"; mount -t cgroup -o none,name=systemd,xattr systemd "$R/sys/fs/cgroup/systemd" || lacking cgroup
fi
mount --rbind "$REPOSITORY" "$R/opt/lab"
mount --bind "$PREFIX" "$R/opt/python"  # which may be below /root, where the unit sees nothing
rm -rf "$R"/etc/systemd/system/*.wants "$R"/etc/systemd/system/*.requires
for wants in "$R"/lib/systemd/system/*.wants; do
  find "$wants" -mindepth 1 ! -name 'systemd-journald*' -delete; done
: > "$R/etc/fstab"
cp "$REPOSITORY"/manifests/systemd/flanneld.service "$R/etc/systemd/system/"
cp "$FILES/default" "$R/etc/default/flanneld"
cp "$FILES/override.conf" "$R/etc/systemd/system/flanneld.service.d/"
printf '#!/bin/sh\nLD_LIBRARY_PATH=/opt/python/lib PYTHONPATH=%s exec /opt/python/bin/%s -m flanneld.cli "$@"\n' \
  "/opt/lab:/opt/lab/.venv/lib/$PYTHON/site-packages" "$PYTHON" > "$R/usr/local/bin/flanneld"
chmod 755 "$R/usr/local/bin/flanneld"
exec chroot "$R" env -i container=lab PATH=/usr/sbin:/usr/bin:/sbin:/bin "$SYSTEMD" --unit=basic.target
"""


class Systemd:
    """systemd in a network namespace of the lab, with our flanneld.service installed. Use it as a context manager."""

    def __init__(self, ns: Namespace, directory: Path, variables: Mapping[str, str], override: str = "") -> None:
        """``variables`` go into /etc/default/flanneld, ``override`` is a drop-in of the unit."""
        if not SYSTEMD.exists():
            pytest.skip("systemd is not installed (Debian: systemd)")
        files = directory / "systemd"
        (files / "area").mkdir(parents=True)
        (files / "default").write_text("".join(f"{name}={value}\n" for name, value in variables.items()))
        (files / "override.conf").write_text(override)
        script = [
            "unshare",
            "--mount",
            "--pid",
            "--fork",
            "--kill-child",
            "--cgroup",
            "--uts",
            "--ipc",
            "bash",
            "-c",
            BOOT,
        ]
        self._log = files / "boot.log"
        environment = {
            "AREA": str(files / "area"),
            "FILES": str(files),
            "REPOSITORY": str(REPOSITORY),
            "SYSTEMD": str(SYSTEMD),
            "PREFIX": sys.base_prefix,
            "PYTHON": f"python3.{sys.version_info.minor}",
        }
        self._unshare = ns.start(script, log=self._log, env=environment)
        self._pid = wait_until(self._child, 20, lambda: f"systemd as process 1: {self._log.read_text()}")
        try:
            wait_until(lambda: self.ctl("is-system-running").strip() == "running", 60, self._log.read_text)
        except BaseException:
            self.close()
            raise

    def _child(self) -> int | None:
        """systemd's process as seen from outside."""
        if self._unshare.poll() == 77:
            pytest.skip(f"no systemd as process 1: {self._log.read_text().strip()}")
        if self._unshare.poll() is not None:
            raise SystemError(self._log.read_text())
        children = Path(f"/proc/{self._unshare.pid}/task/{self._unshare.pid}/children").read_text().split()
        for child in children:
            if Path(f"/proc/{child}/comm").read_text().strip() == "systemd":
                return int(child)
        return None

    def run(self, *words: str) -> str:
        """A command inside; its output, whatever its exit code."""
        inside = [
            "nsenter",
            f"--target={self._pid}",
            "--mount",
            "--pid",
            "--cgroup",
            "--uts",
            "--ipc",
            "--root",
            "--wd=/",
        ]
        done = subprocess.run([*inside, "--", *words], capture_output=True, text=True, timeout=120, check=False)
        return done.stdout + done.stderr

    def ctl(self, *words: str) -> str:
        return self.run("systemctl", "--no-pager", *words)

    def show(self, name: str) -> str:
        """A property of the unit."""
        return self.ctl("show", "--value", f"--property={name}", "flanneld").strip()

    def journal(self) -> str:
        return self.run("journalctl", "--no-pager", "--output=cat", "--unit=flanneld")

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._pid, signal.SIGKILL)  # and with process 1 everything in its namespace
        end(self._unshare, signal.SIGKILL, 10)

    def __enter__(self) -> Systemd:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
