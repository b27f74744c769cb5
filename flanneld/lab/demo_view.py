"""What the demo shows: tables, bars, the picture of a run. Colour on a terminal, plain text elsewhere."""

from __future__ import annotations

import re
import sys
import textwrap
from collections.abc import Sequence
from ipaddress import IPv4Network
from typing import IO, Final, cast

from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from flanneld.ctl.output import Trimmed
from flanneld.lab.faults import peers_in_kernel
from flanneld.lab.hosts import Host, Lab
from flanneld.lab.leave import doors
from flanneld.lab.ping import PingResult

DEVICE: Final = "flannel.1"
WIDTH: Final = 80
"""Columns that all of it fits in, but for the ping matrix of more hosts than three."""


def make_console(*, record: bool) -> Console:
    if record:
        return Console(
            record=True, force_terminal=True, width=WIDTH, highlight=False, emoji=False, color_system="truecolor"
        )
    if sys.stdout.isatty():
        return Console(highlight=False, emoji=False)
    return Console(file=cast("IO[str]", Trimmed(sys.stdout)), width=200, no_color=True, highlight=False, emoji=False)


def save_svg(console: Console, file: str) -> None:
    """The run as a picture. Without rich's web fonts: a picture loads nothing from elsewhere."""
    plain = re.sub(r"@font-face \{\{.*?\}\}", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)
    console.save_svg(file, title="sudo script/demo", code_format=plain)


def hosts_table(hosts: Sequence[Host]) -> Table:
    """What each host's kernel and daemon say now."""
    made = table("host", "underlay", "subnet", "VTEP", "MAC", "peers", "state")
    for host in hosts:
        daemon = host.daemon
        subnet = daemon.subnet_env().get("FLANNEL_SUBNET", "")
        link = host.run(f"ip -o link show dev {DEVICE}", check=False)
        mac = re.search(r"link/ether (\S+)", link)
        peers = len(peers_in_kernel(host)) if mac else 0
        state = "[green]ready[/green]" if daemon.ready else "[yellow]starting[/yellow]"
        if not daemon.running:
            state = "[red]dead[/red]"
        network = str(IPv4Network(subnet, strict=False)) if subnet else "-"
        device = DEVICE if mac else "-"
        made.add_row(host.name, host.address, network, device, mac[1] if mac else "-", str(peers), state)
    return made


def table(*columns: str) -> Table:
    """A table without lines."""
    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column in columns:
        made.add_column(column, no_wrap=True)
    return made


def folded(text: str) -> str:
    """What a program printed, no wider than a terminal."""
    return "\n".join(textwrap.fill(line, WIDTH, subsequent_indent="  ") for line in text.splitlines())


def ping_cell(result: PingResult | None) -> Text:
    if result is None:
        return Text("·", style="dim")
    return Text(f"{result.rtt_avg:.3f}", style="green") if result.ok else Text(f"{result.lost} lost", style="bold red")


def milliseconds(seconds: float) -> str:
    """Below a millisecond it is the scheduling of ip(8) that is measured, and it may have read both lines at once."""
    return "< 1 ms" if seconds < 0.001 else f"{seconds * 1000:.1f} ms"


def bar(share: float, width: int = 40) -> str:
    return "█" * max(1, round(share * width))


def explain_keep(console: Console, lab: Lab) -> None:
    """How to look around in what was left running, and how to remove it."""
    first, *others = doors(lab)
    console.print("[bold]It keeps running. Look around:[/bold]")
    for command in (
        f"sudo sh {first} ip -d link show {DEVICE}",
        f"sudo sh {first} ip route",
        f"sudo sh {first} bridge fdb show dev {DEVICE}",
        f"sudo sh {first} flannelctl leases",
        f"sudo sh {first} flannelctl status --diff",
        f"less {lab.hosts[0].daemon.log}",
    ):
        console.print(f"  {escape(command)}", soft_wrap=True)
    console.print(f"On the others likewise: {', '.join(path.name for path in others)}; without a command, a shell.")
    console.print("[bold]Remove it:[/bold]")
    console.print(f"  sudo script/demo --remove {lab.directory}", soft_wrap=True)
