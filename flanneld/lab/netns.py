"""Network namespaces that clean up after themselves, also when the work in them fails.

Every name starts with a prefix that is unique to this process, so that two runs on one machine never meet.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

from pyroute2 import netns

from flanneld.lab import wait

RUN_ID = f"fl{uuid.uuid4().hex[:6]}"


class CommandFailed(RuntimeError):
    """A command inside a namespace exited with an error; the text holds the command and what it printed."""


def run(argv: Sequence[str], *, check: bool = True, timeout: float = 60, stdin: str | None = None) -> str:
    """Run a command on this host; its standard output. CommandFailed names the command and its output."""
    done = subprocess.run(list(argv), capture_output=True, text=True, timeout=timeout, input=stdin, check=False)
    if check and done.returncode != 0:
        raise CommandFailed(f"{' '.join(argv)}: exit {done.returncode}: {(done.stderr or done.stdout).strip()}")
    return done.stdout


class Namespace:
    """One network namespace with its loopback up. Use it as a context manager, or call ``close``."""

    def __init__(self, label: str) -> None:
        self.label = label
        self.name = f"{RUN_ID}-{label}"
        self._processes: list[subprocess.Popen[bytes]] = []
        run(["ip", "netns", "add", self.name])
        self.run("ip link set lo up")

    @property
    def path(self) -> Path:
        return Path("/var/run/netns") / self.name

    def argv(self, command: str | Sequence[str]) -> list[str]:
        """The command as seen from outside. Only the network namespace is entered (not /sys: see nsenter(1))."""
        words = command.split() if isinstance(command, str) else list(command)
        return ["nsenter", f"--net={self.path}", "--", *words]

    def run(
        self, command: str | Sequence[str], *, check: bool = True, timeout: float = 60, stdin: str | None = None
    ) -> str:
        return run(self.argv(command), check=check, timeout=timeout, stdin=stdin)

    def start(
        self,
        command: str | Sequence[str],
        *,
        log: Path | None = None,
        env: dict[str, str] | None = None,
        hostname: str | None = None,
    ) -> subprocess.Popen[bytes]:
        """Start a process in the namespace, in its own session; it is ended by ``close``.

        ``hostname`` gives it a UTS namespace of its own, since namespaces of one machine share their hostname.
        """
        argv = self.argv(command)
        if hostname is not None:
            script = 'hostname "$1"; shift; exec "$@"'
            argv = ["unshare", "--uts", "--", "sh", "-c", script, "sh", hostname, *argv]
        with (log or Path(os.devnull)).open("ab") as out:
            process = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(env or {})},
                start_new_session=True,
            )
        self._processes.append(process)
        return process

    @contextlib.contextmanager
    def inside(self) -> Iterator[None]:
        """Move this thread into the namespace; sockets opened here belong to it."""
        task = Path(f"/proc/self/task/{threading.get_native_id()}/ns/net")
        with task.open("rb") as before:
            netns.setns(str(self.path))
            try:
                yield
            finally:
                netns.setns(before.fileno())

    def close(self) -> None:
        for process in self._processes:
            end(process)
        with contextlib.suppress(CommandFailed, subprocess.TimeoutExpired):
            self._end_the_rest()
            run(["ip", "netns", "del", self.name])

    def _end_the_rest(self) -> None:
        """What a process of ours left running here (wireguard-go, a tunnel's worker) would keep the namespace alive."""
        for pid in run(["ip", "netns", "pids", self.name]).split():
            if int(pid) != os.getpid():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)

    def __enter__(self) -> Namespace:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def end(process: subprocess.Popen[bytes], sig: int = signal.SIGTERM, timeout: float = 5) -> int:
    """End a process that we started, harder if it does not listen in time (times ``wait.patience``); its exit code."""
    timeout *= wait.patience
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, sig)
        try:
            process.wait(timeout)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(timeout)
    return process.returncode


def veth(a: Namespace, a_dev: str, b: Namespace, b_dev: str, mtu: int = 1500) -> None:
    """A cable between two namespaces, both ends up."""
    run(f"ip link add {a_dev} mtu {mtu} netns {a.name} type veth peer name {b_dev} mtu {mtu} netns {b.name}".split())
    a.run(f"ip link set {a_dev} up")
    b.run(f"ip link set {b_dev} up")
