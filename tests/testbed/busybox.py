"""A container image made of one program: busybox, linked statically."""

from __future__ import annotations

import hashlib
import io
import json
import platform
import shutil
import subprocess
import tarfile
from pathlib import Path

NAME = "localhost/busybox:test"
_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}


def _directory(tar: tarfile.TarFile, name: str) -> None:
    entry = tarfile.TarInfo(name)
    entry.type, entry.mode = tarfile.DIRTYPE, 0o755
    tar.addfile(entry)


def _file(tar: tarfile.TarFile, name: str, content: bytes, mode: int = 0o644) -> None:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode = len(content), mode
    tar.addfile(entry, io.BytesIO(content))


def root(path: Path) -> Path:
    """A root file system as a tar (for ``docker import``)."""
    program = shutil.which("busybox")
    if program is None:
        raise FileNotFoundError("busybox is not installed; on Debian: apt-get install busybox-static")
    applets = subprocess.run([program, "--list"], capture_output=True, text=True, check=True).stdout.split()
    with tarfile.open(path, "w") as tar:
        for name in ("bin", "dev", "etc", "proc", "sys", "tmp"):
            _directory(tar, name)
        _file(tar, "bin/busybox", Path(program).read_bytes(), 0o755)
        _file(tar, "etc/passwd", b"root:x:0:0:root:/:/bin/sh\n")
        for applet in applets:
            if applet == "busybox":
                continue
            entry = tarfile.TarInfo(f"bin/{applet}")
            entry.type, entry.linkname = tarfile.SYMTYPE, "busybox"
            tar.addfile(entry)
    return path


def image(directory: Path) -> Path:
    """An image as ``docker save`` writes it (for containerd and podman); its name is NAME."""
    layer = root(directory / "layer.tar").read_bytes()
    config = json.dumps({
        "architecture": _ARCHITECTURES.get(platform.machine(), platform.machine()),
        "os": "linux",
        "config": {"Env": ["PATH=/bin"], "Cmd": ["/bin/sh"]},
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(layer).hexdigest()}"]},
    }).encode()  # fmt: skip
    path = directory / "busybox.tar"
    with tarfile.open(path, "w") as tar:
        _file(tar, "config.json", config)
        _file(tar, "layer.tar", layer)
        _file(tar, "manifest.json", json.dumps([
            {"Config": "config.json", "RepoTags": [NAME], "Layers": ["layer.tar"]},
        ]).encode())  # fmt: skip
    return path
