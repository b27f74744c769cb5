"""Leave a lab running after this process ends, and remove it later."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from flanneld.lab.netns import CommandFailed, run

if TYPE_CHECKING:
    from flanneld.lab.hosts import Lab

FILE = "lab.json"


def leave(lab: Lab) -> Path:
    """Forget the lab without closing it; the directory by which ``remove`` finds it again."""
    namespaces = [lab.switch.name, lab.etcd_ns.name]
    for host in lab.hosts:
        namespaces += [container.ns.name for container in host.containers]
        namespaces += [host.ns.name] + ([host.router.name] if host.router else [])
    directories = [str(lab.directory)] + ([str(lab.etcd.directory)] if lab.has_etcd else [])
    (lab.directory / FILE).write_text(json.dumps({"namespaces": namespaces, "directories": directories}))
    lab.forget()
    return lab.directory


def doors(lab: Lab) -> list[Path]:
    """Write a script for each host that runs a command there, flannelctl among them: ``sh PATH ip route``."""
    programs = Path(sys.executable).parent
    made = []
    for host in lab.hosts:
        settings = {"PATH": f"{programs}:{os.environ.get('PATH', os.defpath)}"}
        if lab.has_etcd:
            settings["FLANNELD_ETCD_ENDPOINTS"] = lab.etcd.endpoint
        if host.daemons:
            settings["FLANNELD_SUBNET_FILE"] = str(host.daemon.subnet_file)
        words = " ".join(f"{name}={shlex.quote(value)}" for name, value in settings.items())
        path = lab.directory / f"on-{host.name}"
        path.write_text(
            f"# Run a command on {host.name}; without one, a shell.\n"
            f"export {words}\n"
            '[ $# -gt 0 ] || set -- "${SHELL:-sh}"\n'
            f'exec nsenter --net={shlex.quote(str(host.ns.path))} -- "$@"\n'
        )
        made.append(path)
    return made


def remove(directory: Path) -> int:
    """End the processes of a lab that was left, delete its namespaces and files; how many namespaces there were."""
    if not (directory / FILE).is_file():
        raise FileNotFoundError(f"{directory} holds no {FILE}: it is not a demo that was left running")
    about = json.loads((directory / FILE).read_text())
    names = [name for name in about["namespaces"] if Path("/var/run/netns", name).exists()]
    # Only processes inside our own namespaces, by their ids.
    for number in (signal.SIGTERM, signal.SIGKILL):
        deadline = time.monotonic() + 5
        for pid in _processes(names):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        while _processes(names) and time.monotonic() < deadline:
            time.sleep(0.05)
    for name in names:
        with contextlib.suppress(CommandFailed):
            run(["ip", "netns", "del", name])
    for path in about["directories"]:
        shutil.rmtree(path, ignore_errors=True)
    return len(names)


def _processes(namespaces: list[str]) -> list[int]:
    found: list[int] = []
    for name in namespaces:
        found += [int(word) for word in run(["ip", "netns", "pids", name], check=False).split()]
    return found
