"""What this node's daemon says about itself: over HTTP when it listens, else by the status file beside subnet.env."""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

from cni.daemon_status import is_alive
from flanneld.ctl.output import Problem

DEFAULT_PORT = 8081
STATUS_FILE = "flanneld-status.json"
TIMEOUT = 5.0
"""Seconds that a daemon may take to answer."""


def add_node_arguments(parser: argparse.ArgumentParser) -> None:
    from flanneld.options import DEFAULT_SUBNET_FILE

    parser.add_argument(
        "--healthz-port",
        type=_port,
        default=os.environ.get("FLANNELD_HEALTHZ_PORT") or DEFAULT_PORT,  # a text is read only if the flag is not given
        metavar="N",
        help=f"the daemon's --healthz-port (default: {DEFAULT_PORT})",
    )
    parser.add_argument("--healthz-ip", default="127.0.0.1", metavar="IP", help="where it listens (default: 127.0.0.1)")
    parser.add_argument(
        "--subnet-file",
        default=os.environ.get("FLANNELD_SUBNET_FILE") or None,  # None: whichever daemon is here
        metavar="FILE",
        help=f"the daemon's --subnet-file (default: {DEFAULT_SUBNET_FILE})",
    )


def _port(text: str) -> int:
    """A port; 0, with which a daemon does not listen, stands for the usual one."""
    if not text.isdecimal() or not int(text) <= 65535:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a port; correct the flag, or FLANNELD_HEALTHZ_PORT if that is where it comes from"
        )
    return int(text) or DEFAULT_PORT


def ask(arguments: argparse.Namespace, path: str) -> Any:
    """The daemon's answer to GET ``path`` as JSON. OSError if nobody answers, ValueError if it is not flanneld."""
    import http.client

    connection = http.client.HTTPConnection(arguments.healthz_ip, arguments.healthz_port, timeout=TIMEOUT)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        body = response.read()
        if response.status != 200:
            raise ValueError(f"HTTP {response.status}")
        return json.loads(body)
    except http.client.HTTPException as error:
        raise ValueError(str(error)) from None
    finally:
        connection.close()


def subnet_file(arguments: argparse.Namespace) -> str:
    from flanneld.options import DEFAULT_SUBNET_FILE

    return arguments.subnet_file or DEFAULT_SUBNET_FILE


def status_file(arguments: argparse.Namespace) -> Path:
    return Path(subnet_file(arguments)).with_name(STATUS_FILE)


def read_status(arguments: argparse.Namespace) -> dict[str, Any]:
    """What is known of this node. ``source`` says from where, ``age`` how old it is in seconds, ``running`` if it is.

    A daemon on this port that keeps another subnet file is not the one that was asked for: then the file counts, and
    ``problem`` says why the daemon itself did not tell; ``unheard`` is that for programs: "other", "hangs" (it lives
    and must be restarted), "refused" (nothing listens) or "failed".
    """
    wanted, file = subnet_file(arguments), status_file(arguments)
    written = read_file(file, wanted)
    where = address(arguments)
    unheard, remedy = "failed", "start flanneld with --healthz-port, or name its --healthz-port and --subnet-file here"
    try:
        answer = ask(arguments, "/status")
        if not is_status(answer):
            problem = f"what answers at {where} is not flanneld"
        elif _same(answer["subnet_file"], wanted) or (written is None and not arguments.subnet_file):
            return {**answer, "running": True, "source": f"http://{where}/status", "age": 0.0}
        else:
            unheard, problem = (
                "other",
                f"another daemon (pid {answer['pid']}, {answer['subnet_file']}) answers at {where}",
            )
            remedy = (
                f"start this one, or give its --healthz-port; that one's status: --subnet-file={answer['subnet_file']}"
            )
    except TimeoutError:
        problem = f"nothing answers at {where} in time"
        if alive(wanted, written):
            pid = f" (pid {written['pid']})" if written and written.get("pid") else ""
            unheard, problem = "hangs", f"runs{pid} but does not answer on {where}; restart it"
            written = {"subnet_file": wanted} if written is None else written
    except ConnectionRefusedError:
        unheard, problem = "refused", f"nothing listens on {where}"
    except OSError as error:
        problem = f"{where}: {error.strerror or error}"
    except ValueError as error:
        problem = f"what answers at {where} is not flanneld ({error})"
    if written is None:
        if arguments.subnet_file and alive(wanted, None):
            raise Problem(f"flanneld runs with {wanted}, but {problem}, and there is no {file}", remedy)
        if unheard == "other":
            raise Problem(f"flanneld is not running with {wanted}: {problem}", remedy)
        raise Problem(f"no flanneld is known on this host: {problem}; and there is no {file}", remedy)
    found = {**written, "running": alive(wanted, written), "source": str(file), "age": _age(file)}
    return {**found, "ready": unheard != "hangs" and written.get("ready"), "unheard": unheard, "problem": problem}


def _age(file: Path) -> float:
    """Seconds since it was written; 0 where it is not."""
    try:
        return round(max(0.0, time.time() - file.stat().st_mtime), 1)
    except OSError:
        return 0.0


def other_daemon(arguments: argparse.Namespace) -> str:
    """Pid and subnet file of a daemon that answers and is not the one that was asked for; else ""."""
    try:
        answer = ask(arguments, "/status")
    except (OSError, ValueError):
        return ""
    if not is_status(answer) or _same(answer["subnet_file"], subnet_file(arguments)):
        return ""
    return f"pid {answer['pid']}, {answer['subnet_file']}"


def address(arguments: argparse.Namespace) -> str:
    """Where the daemon should answer."""
    ip = arguments.healthz_ip
    return f"{f'[{ip}]' if ':' in ip else ip}:{arguments.healthz_port}"


def _same(one: str, other: str) -> bool:
    return os.path.realpath(one) == os.path.realpath(other)


def alive(file: str, written: dict[str, Any] | None) -> bool:
    """Whether the daemon of this subnet file lives: its lock says it, also across PID namespaces."""
    locked = is_alive(file)
    return running(written or {}) if locked is None else locked


def is_status(answer: Any) -> bool:
    """Whether this is what a flanneld says of itself: any program may listen on that port."""
    return isinstance(answer, dict) and "pid" in answer and isinstance(answer.get("subnet_file"), str)


def running(status: dict[str, Any]) -> bool:
    """Whether the process that wrote this status lives, and still is a flanneld."""
    pid = status.get("pid")
    if not isinstance(pid, int):
        return False
    try:
        return b"flanneld" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def read_file(file: Path, wanted: str) -> dict[str, Any] | None:
    """The status that was written for this subnet file: two daemons may share a directory."""
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and _same(found.get("subnet_file") or wanted, wanted) else None
