"""What this node's daemon says about itself: over HTTP when it listens, else by the status file beside subnet.env."""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cni.daemon_status import is_alive
from flanneld.ctl.output import Problem

DEFAULT_PORT = 8081
STATUS_FILE = "flanneld-status.json"
TIMEOUT = 5.0
"""Seconds that a daemon may take to answer."""


HERE = {"0.0.0.0": "127.0.0.1", "::": "::1"}
"""Where to reach who listens on all addresses."""


@dataclass(frozen=True, slots=True)
class Place:
    """An address at which a daemon may answer."""

    ip: str
    port: int

    def __str__(self) -> str:
        return f"{f'[{self.ip}]' if ':' in self.ip else self.ip}:{self.port}"


def add_node_arguments(parser: argparse.ArgumentParser) -> None:
    from flanneld.options import DEFAULT_SUBNET_FILE

    parser.add_argument(
        "--healthz-port",
        type=_port,
        default=os.environ.get("FLANNELD_HEALTHZ_PORT") or None,  # a text is read only if the flag is not given
        metavar="N",
        help=f"the daemon's --healthz-port (default: as its status file says, else {DEFAULT_PORT})",
    )
    parser.add_argument("--healthz-ip", metavar="IP", help="where it listens (default: likewise, else 127.0.0.1)")
    parser.add_argument(
        "--subnet-file",
        default=os.environ.get("FLANNELD_SUBNET_FILE") or None,  # None: whichever daemon is here
        metavar="FILE",
        help=f"the daemon's --subnet-file (default: {DEFAULT_SUBNET_FILE})",
    )


def _port(text: str) -> int | None:
    """A port; None for 0, with which a daemon does not listen: as if none were given."""
    if not text.isdecimal() or not int(text) <= 65535:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a port; correct the flag, or FLANNELD_HEALTHZ_PORT if that is where it comes from"
        )
    return int(text) or None


def place(arguments: argparse.Namespace, status: dict[str, Any] | None = None) -> Place | None:
    """Where to ask: as the flags have it, else where the daemon of this status says that it listens, else at the usual
    port. None: it says that it listens nowhere."""
    ip, port = arguments.healthz_ip, arguments.healthz_port
    told = (status or {}).get("healthz", "")  # missing: of an older version
    if told is None and port is None:
        return None
    own = _read_place(told)
    if own is not None and port in (None, own.port):
        return Place(ip or own.ip, own.port)
    return Place(ip or "127.0.0.1", port or DEFAULT_PORT)


def _read_place(text: Any) -> Place | None:
    ip, _, port = text.rpartition(":") if isinstance(text, str) else ("", "", "")
    ip = ip.strip("[]")
    return Place(HERE.get(ip, ip), int(port)) if ip and port.isdecimal() else None


def own_place(status: dict[str, Any]) -> str:
    """Where the daemon of this status would answer, for a sentence about one that answers elsewhere."""
    own = _read_place(status.get("healthz"))
    if own is not None:
        return f"this one listens on {own}"
    return "this one runs without --healthz-port" if "healthz" in status else "give this one's --healthz-port"


def ask(where: Place, path: str) -> Any:
    """The daemon's answer to GET ``path`` as JSON. OSError if nobody answers, ValueError if it is not flanneld."""
    import http.client

    connection = http.client.HTTPConnection(where.ip, where.port, timeout=TIMEOUT)
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
    ``problem`` says why the daemon itself did not tell; ``unheard`` is that for programs: "other", "elsewhere" (it was
    asked where it does not listen), "mute" (it runs without a port), "hangs" (it lives and must be restarted), "refused"
    (nothing listens), "late" or "failed".
    """
    wanted, file = subnet_file(arguments), status_file(arguments)
    written = read_file(file, wanted)
    lives = alive(wanted, written)
    where = place(arguments, written if lives else None)
    answer, unheard, problem = _hear(where)
    remedy = "start flanneld with --healthz-port, or name its --healthz-port and --subnet-file here"
    if answer is not None:
        other = answer["subnet_file"]
        if _same(other, wanted) or (written is None and not arguments.subnet_file):
            return {**answer, "running": True, "source": f"http://{where}/status", "age": 0.0}
        unheard, problem = "other", f"another daemon (pid {answer['pid']}, {other}) answers at {where}"
        remedy = f"start this one, or give its --healthz-port; that one's status: --subnet-file={other}"
    elif where is not None and lives and written and "healthz" in written and not _listens_on(written, where):
        unheard = "elsewhere"
    elif unheard == "late" and lives:
        pid = f" (pid {written['pid']})" if written and written.get("pid") else ""
        unheard, problem = "hangs", f"runs{pid} but does not answer on {where}; restart it"
        written = {"subnet_file": wanted} if written is None else written
    if written is None:
        if arguments.subnet_file and lives:
            raise Problem(f"flanneld runs with {wanted}, but {problem}, and there is no {file}", remedy)
        if unheard == "other":
            raise Problem(f"flanneld is not running with {wanted}: {problem}", remedy)
        raise Problem(f"no flanneld is known on this host: {problem}; and there is no {file}", remedy)
    found = {**written, "running": lives, "source": str(file), "age": _age(file)}
    return {**found, "ready": unheard != "hangs" and written.get("ready"), "unheard": unheard, "problem": problem}


def _hear(where: Place | None) -> tuple[dict[str, Any] | None, str, str]:
    """What a flanneld there says; or None, with a word for programs and a sentence for people why it says nothing."""
    if where is None:
        return None, "mute", "flanneld runs without --healthz-port"
    try:
        answer = ask(where, "/status")
    except TimeoutError:
        return None, "late", f"nothing answers at {where} in time"
    except ConnectionRefusedError:
        return None, "refused", f"nothing listens on {where}"
    except OSError as error:
        return None, "failed", f"{where}: {error.strerror or error}"
    except ValueError as error:
        return None, "failed", f"what answers at {where} is not flanneld ({error})"
    return (answer, "", "") if is_status(answer) else (None, "failed", f"what answers at {where} is not flanneld")


def _listens_on(status: dict[str, Any], where: Place) -> bool:
    own = _read_place(status.get("healthz"))
    return own is not None and own.port == where.port


def _age(file: Path) -> float:
    """Seconds since it was written; 0 where it is not."""
    try:
        return round(max(0.0, time.time() - file.stat().st_mtime), 1)
    except OSError:
        return 0.0


def other_daemon(arguments: argparse.Namespace) -> str:
    """Pid and subnet file of a daemon that answers and is not the one that was asked for; else ""."""
    where = place(arguments)
    assert where is not None
    try:
        answer = ask(where, "/status")
    except (OSError, ValueError):
        return ""
    if not is_status(answer) or _same(answer["subnet_file"], subnet_file(arguments)):
        return ""
    return f"pid {answer['pid']}, {answer['subnet_file']}"


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
