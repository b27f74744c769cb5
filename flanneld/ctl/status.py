"""``flannelctl status``: how this node fares; with --diff, what its kernel has otherwise than it should."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from flanneld.ctl.output import FAILED, OK, console, duration, put_json

if TYPE_CHECKING:
    from rich.table import Table


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    from flanneld.ctl.node import add_node_arguments

    parser = commands.add_parser(
        "status",
        help="how this node fares: subnet, device, peers, what is wrong",
        description="Exit code 0 if this node is ready (with --diff: and its kernel is as it should be), else 1.",
        allow_abbrev=False,
    )
    parser.add_argument("--json", action="store_true", help="everything, as JSON")
    parser.add_argument(
        "--diff", action="store_true", help="look at the kernel and show what differs from what should be (needs root)"
    )
    add_node_arguments(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from flanneld.ctl.node import read_status

    status = read_status(arguments)
    drift: list[str] | None = None
    if arguments.diff:
        from flanneld.ctl.drift import find_drift

        drift = find_drift(arguments, status)
        status = {**status, "drift": drift}
    if arguments.json:
        put_json(status)
    else:
        show(status)
    return OK if status.get("running") and status.get("ready") and not drift else FAILED


def show(status: dict[str, Any]) -> None:
    """For people: the state first, then facts, then trouble."""
    from rich.text import Text

    from flanneld.ctl.node import own_place

    where = console()
    running, ready = bool(status.get("running")), bool(status.get("ready"))
    state = "ready" if running and ready else "not ready" if running else "not running (the network stays as it was)"
    unheard = status.get("unheard")
    if unheard == "hangs":
        state = status["problem"]
    where.print(_row("flanneld", "", state, "bold green" if running and ready else "bold red"))
    for name, value in facts(status):
        where.print(_row(name, "dim", value))
    if unheard in ("other", "elsewhere"):
        where.print(_row("warning", "yellow", f"{status['problem']}" + (f"; {own_place(status)}" if running else "")))
    for reason in status.get("reasons") or ():
        where.print(_row("wrong", "bold red", str(reason)))
    for text in status.get("warnings") or ():
        where.print(_row("warning", "yellow", str(text)))
    for reason in (status.get("refused") or {}).values():
        where.print(_row("refused", "yellow", str(reason)))
    drift = status.get("drift")
    if drift is not None:
        where.print(
            "kernel    as it should be" if not drift else "kernel    differs (+ missing, ~ otherwise, - left over):"
        )
        for line in drift:
            where.print(Text(f"  {line}", style="green" if line.startswith("+") else "red"))


def _row(name: str, style: str, value: str, value_style: str = "") -> Table:
    """A name and its value, whose further lines stay beside the name."""
    from rich.table import Table
    from rich.text import Text

    made = Table.grid(padding=(0, 1, 0, 0))
    made.add_column(min_width=9, no_wrap=True)
    made.add_column(overflow="fold")
    made.add_row(Text(name, style), Text(value, value_style))
    return made


def facts(status: dict[str, Any]) -> list[tuple[str, str]]:
    """Name and value of what is known, in the order of interest."""
    found: list[tuple[str, str]] = []

    def add(name: str, *values: object) -> None:
        text = ", ".join(str(value) for value in values if value not in (None, "", []))
        if text:
            found.append((name, text))

    add("node", status.get("node"))
    subnets = [status.get("subnet"), status.get("ipv6_subnet"), "reservation" if status.get("reservation") else None]
    add("subnet", *subnets)
    underlay = " ".join(str(part) for part in (status.get("interface"), *(status.get("local") or ())) if part)
    public = [address for address in status.get("public") or () if address not in (status.get("local") or ())]
    add("underlay", underlay, *(f"public {address}" for address in public))
    add("backend", status.get("backend"), *(status.get("devices") or ()), status.get("vtep_mac"))
    for device, told in (status.get("tunnels") or {}).items():
        add("tunnel", device, *(f"{name.replace('_', ' ')} {value}" for name, value in told.items()))
    add("mtu", status.get("mtu"))
    add("peers", status.get("peers"))
    if isinstance(status.get("watch_age"), int | float):
        add("store", f"heard of {status['watch_age']:.1f} s ago")
    elif "watch_age" in status:
        add("store", "never heard of")
    errors = status.get("store_errors")
    if isinstance(errors, dict) and errors:
        add("store errors since start", *(f"{cause} {count}" for cause, count in errors.items()))
    last = status.get("last_pass")
    if isinstance(last, dict) and "at" in last:
        add("last pass", _pass(last))
    if status.get("age"):
        add("as of", f"{duration(float(status['age']))} ago, from {status['source']}")
    return found


def _pass(last: dict[str, Any]) -> str:
    import time

    ago = duration(max(0.0, time.time() - float(last["at"])))
    return (
        f"{ago} ago: {last.get('changes', 0)} changes, {last.get('failures', 0)} failures, "
        f"{float(last.get('seconds', 0)) * 1000:.1f} ms"
    )
