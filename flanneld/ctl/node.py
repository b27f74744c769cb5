"""What this node's daemon says about itself: over HTTP when it listens, else by the status file beside subnet.env."""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

from flanneld.ctl.output import Problem

DEFAULT_PORT = 8081
STATUS_FILE = "flanneld-status.json"


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
        default=os.environ.get("FLANNELD_SUBNET_FILE") or DEFAULT_SUBNET_FILE,
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

    connection = http.client.HTTPConnection(arguments.healthz_ip, arguments.healthz_port, timeout=5)
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


def status_file(arguments: argparse.Namespace) -> Path:
    return Path(arguments.subnet_file).with_name(STATUS_FILE)


def read_status(arguments: argparse.Namespace) -> dict[str, Any]:
    """What is known of this node. ``source`` says from where, ``age`` how old it is in seconds, ``running`` if it is.

    A daemon on this port that keeps another subnet file is not the one that was asked for: then the file counts.
    """
    file = status_file(arguments)
    written = _read_file(file)
    where = f"http://{arguments.healthz_ip}:{arguments.healthz_port}/status"
    try:
        answer = ask(arguments, "/status")
        if not is_status(answer):
            problem = "what answers there is not flanneld"
        elif written is None or written.get("pid") in (None, answer["pid"]):
            return {**answer, "running": True, "source": where, "age": 0.0}
        else:
            problem = "another daemon answers there"
    except OSError as error:
        problem = str(error)
    except ValueError as error:
        problem = f"what answers there is not flanneld ({error})"
    if written is None:
        raise Problem(
            f"no flanneld is known on this host: {where}: {problem}; and there is no {file}",
            "start flanneld with --healthz-port, or name its --healthz-port and --subnet-file here",
        )
    age = max(0.0, time.time() - file.stat().st_mtime)
    return {**written, "running": running(written), "source": str(file), "age": round(age, 1)}


def is_status(answer: Any) -> bool:
    """Whether this is what a flanneld says of itself: any program may listen on that port."""
    return isinstance(answer, dict) and {"pid", "subnet_file"} <= answer.keys()


def running(status: dict[str, Any]) -> bool:
    """Whether the process that wrote this status lives, and still is a flanneld."""
    pid = status.get("pid")
    if not isinstance(pid, int):
        return False
    try:
        return b"flanneld" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def _read_file(file: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
