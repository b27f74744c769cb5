"""Kernel modules: load one, or say which one and which package is missing (field problem 35)."""

from __future__ import annotations

import platform
import shutil
import subprocess


class ModuleMissing(Exception):
    """The module is not there and cannot be loaded. The text names it and the package that has it."""


def load(module: str) -> None:
    """``modprobe`` the module; nothing happens if it is loaded or built in. Raises ModuleMissing."""
    modprobe = shutil.which("modprobe", path="/usr/sbin:/sbin:/usr/bin:/bin")
    if modprobe is None:
        raise ModuleMissing(
            _sentence(module, "or cannot load it: apt-get install kmod, which has modprobe, comes first")
        )
    try:
        done = subprocess.run([modprobe, "--", module], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ModuleMissing(_sentence(module, str(error))) from error
    if done.returncode != 0:
        raise ModuleMissing(
            _sentence(module, done.stderr.strip().splitlines()[0] if done.stderr.strip() else "modprobe failed")
        )


def _sentence(module: str, why: str) -> str:
    release = platform.release()
    return (
        f"kernel {release} lacks the module {module} ({why}). Install the package that has it (Debian: "
        f"linux-image-{platform.machine().replace('x86_64', 'amd64').replace('aarch64', 'arm64')} instead of a cloud "
        f"or minimal kernel; Ubuntu: linux-modules-extra-{release}), then: modprobe {module}. In a container, mount "
        f"/lib/modules of the host"
    )
