"""What on this host keeps packets from flowing although all of our records stand. Read-only, cheap, from /proc/sys."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Final, Literal

from flanneld.dataplane.netfilter_bridge import bridge_warnings

Family = Literal[4, 6]

FORWARDING: Final[dict[Family, str]] = {4: "net/ipv4/ip_forward", 6: "net/ipv6/conf/all/forwarding"}


def host_warnings(families: Iterable[Family], *, iptables: bool, proc_sys: Path = Path("/proc/sys")) -> tuple[str, ...]:
    """Sentences that name the setting and the remedy; empty is good."""
    families = tuple(families)
    found = []
    for family in families:
        path = proc_sys / FORWARDING[family]
        try:
            off = path.read_text().strip() == "0"
        except OSError:
            off = False
        if off:
            name = FORWARDING[family].replace("/", ".")
            found.append(
                f"IPv{family} forwarding is off, so this host drops what containers send to other hosts;"
                f" Docker and the CNI bridge plugin turn it on, otherwise: sysctl -w {name}=1"
            )
    return (*found, *(bridge_warnings(families, proc_sys) if iptables else ()))
